"""LogicKor with a judge on this machine that has faults: its scores against a plain computation of the procedure."""

from __future__ import annotations

import hashlib
import json
import re
import statistics
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from made_run import make_run

from trainer import evaluate
from trainer.benchmarkspec import JudgeSpec
from trainer.data.chattemplate import Asking
from trainer.data.tokenizer import Tokenizer
from trainer.errors import DataError, ForeseenError, LaunchError, SpecError
from trainer.evaluation import judge as client
from trainer.evaluation import logickor
from trainer.evaluation.questions import OWN, read_instructions, read_questions
from trainer.evaluation.scores import judged_by, rows
from trainer.export import model_card
from trainer.generate import generate
from trainer.report.run import read_run

pytestmark = pytest.mark.enable_socket
KEY = "sk-local-secret"
CATEGORIES = ("추론(Reasoning)", "수학(Math)")


class JudgeServer:
    """Grades by `score`. `faults`: a status (with "+seconds" for Retry-After), "hang" (no answer), "drop", or another
    answer, each used once, in order; None answers well."""

    def __init__(self) -> None:
        self.faults: list[Any] = []
        self.requests: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.pages: dict[str, bytes] = {}
        self.most = self._now = 0
        self.pause = 0.0
        self._lock = threading.Lock()
        self._closed = threading.Event()
        served = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                served.answer(self)

            def do_GET(self) -> None:
                data = served.pages.get(self.path)
                self.send_response(404 if data is None else 200)
                self.send_header("Content-Length", str(len(data or b"")))
                self.end_headers()
                self.wfile.write(data or b"")

            def log_message(self, *_: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._closed.set()
        self._server.shutdown()
        self._server.server_close()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with self._lock:
            self.requests.append(body)
            self.keys.add(handler.headers["Authorization"])
            fault = self.faults.pop(0) if self.faults else None
            self._now += 1
            self.most = max(self.most, self._now)
        time.sleep(self.pause)
        with self._lock:
            self._now -= 1
        if fault == "hang":
            self._closed.wait(60)  # longer than any client that meets it waits
        if fault in ("hang", "drop"):
            handler.close_connection = True
            return handler.connection.close()
        status, data = 200, grade(score(body["messages"][1]["content"]))
        if isinstance(fault, str) and fault[:3].isdigit():
            status, data = int(fault[:3]), {"error": {"message": f"no: {KEY} is not a key"}}
        elif isinstance(fault, dict | list):
            data = fault
        raw = b"{{ not json" if fault == "garbage" else json.dumps(data).encode()
        handler.send_response(status)
        if isinstance(fault, str) and "+" in fault:
            handler.send_header("Retry-After", fault.partition("+")[2])
        handler.send_header("Content-Length", str(len(raw)))
        handler.end_headers()
        handler.wfile.write(raw)


def grade(points: Any, text: str = "평가: 괜찮다.\n**점수: {}**") -> dict[str, Any]:
    usage = {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120}
    return {"choices": [{"message": {"role": "assistant", "content": text.format(points)}}], "usage": usage}


def score(asked: str) -> float:
    """Depends on the question and the turn."""
    return 1 + int(re.findall(r"물음 (\d+)", asked)[-1]) % 9 + (0.5 if "Follow-up" in asked else 0)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(client, "PAUSE_SECONDS", 0.01)
    monkeypatch.setenv("JUDGE_API_KEY", KEY)
    served = JudgeServer()
    yield served
    served.close()


@pytest.fixture
def spec(server, tmp_path):
    """Two categories of three questions."""
    lines = [
        {
            "id": n,
            "category": CATEGORIES[n % 2],
            "questions": [f"물음 {n}", f"물음 {n + 10}", "unused"][: 2 + (n == 3)],
            "references": ["답 하나", None] if n % 3 else None,
        }
        for n in range(1, 7)
    ]
    text = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    (tmp_path / "questions.jsonl").write_text(f"\ufeff{text}\n", encoding="utf-8")
    return JudgeSpec(
        url=server.url, model="m", questions=str(tmp_path / "questions.jsonl"), timeout_seconds=30, max_tokens=8
    )


def told(talks: list[Any]) -> list[str]:
    return [f"답변 {len(talk)} {talk[-1]['content']}" for talk in talks]


def run(spec: JudgeSpec, folder: Path, write: Any = told, **changes: Any) -> dict[str, Any]:
    return logickor.run(spec.model_copy(update=changes), write, str(folder), {"checkpoint": "c"})


def test_scores_are_those_of_the_published_procedure(server, spec, tmp_path):
    result = run(spec, tmp_path, price_input=2.0, price_output=10.0)
    first = {n: score(f"물음 {n}") for n in range(1, 7)}
    second = {n: score(f"물음 {n + 10} Follow-up") for n in range(1, 7)}
    metrics = result["metrics"]
    assert metrics["single_turn"]["value"] == pytest.approx(sum(first.values()) / 6)
    assert metrics["multi_turn"]["value"] == pytest.approx(sum(second.values()) / 6)
    both = [(first[n] + second[n]) / 2 for n in range(1, 7)]
    assert metrics["overall"]["value"] == pytest.approx(sum(both) / 6)
    assert metrics["overall"]["stderr"] == pytest.approx(statistics.stdev(both) / 6**0.5)
    odd = {"single_turn": (first[1] + first[3] + first[5]) / 3, "multi_turn": (second[1] + second[3] + second[5]) / 3}
    assert result["categories"][CATEGORIES[1]] == pytest.approx(odd)
    assert (result["samples"], result["unscored"]) == (6, 0)
    assert (result["prompt_tokens"], result["completion_tokens"]) == (1200, 240)
    assert result["cost"] == pytest.approx(1200 * 2e-6 + 240 * 10e-6)
    assert server.keys == {f"Bearer {KEY}"}

    asked = {body["messages"][1]["content"]: body for body in server.requests}
    (last,) = [text for text in asked if "물음 11" in text]  # the second turn of the first question
    parts = re.findall(r"\*\*(.+?)\*\*\n(.+)", last)
    assert parts == [
        ("Question", "물음 1"),
        ("Additional Reference", "답 하나"),
        ("Model's Response", "답변 1 물음 1"),
        ("Follow-up Question", "물음 11"),
        ("Model's Response", "답변 3 물음 11"),
    ]
    assert asked[last]["messages"][0] == {"role": "system", "content": OWN["multi_turn"]}
    assert (asked[last]["temperature"], asked[last]["model"]) == (0, "m")


FAULTS = {
    "busy": ["429+1", "503"],
    "timeouts": ["hang", "hang"],
    "disconnect": ["drop", "drop"],
    "no JSON": ["garbage"],
    "no choices": [{"choices": []}, ["x"], {"choices": [{"message": {"content": None}}]}],
    "malformed scores": [grade("열"), grade(11), grade("", "점수 없음")],
}


@pytest.mark.parametrize("faults", FAULTS.values(), ids=FAULTS)
def test_a_judge_with_faults_is_asked_again(server, spec, tmp_path, faults):
    (tmp_path / "clean").mkdir()
    clean = run(spec, tmp_path / "clean")
    server.faults, count, began = list(faults), len(server.requests), time.monotonic()
    result = run(spec, tmp_path, timeout_seconds=3 if "hang" in faults else 30)
    assert result["metrics"] == clean["metrics"] and result["unscored"] == 0
    assert not server.faults and len(server.requests) - count == 12 + len(faults)
    assert "429+1" not in faults or time.monotonic() - began >= 1, "it asks for a second"
    answered = sum(isinstance(fault, dict) and "usage" in fault for fault in faults)
    assert result["prompt_tokens"] == 100 * (12 + answered), "failed attempts cost too"


def test_what_stays_malformed_is_unscored_and_counted(server, spec, tmp_path):
    server.faults = [grade("?")] * 3 + ["400"]  # one thread: three attempts of the first answer, then the second
    result = run(spec, tmp_path, retries=2, max_concurrency=1)
    assert result["unscored"] == 2 and len(server.requests) == 14
    lines = [json.loads(line) for line in (tmp_path / logickor.FILE).read_text(encoding="utf-8").splitlines()]
    graded = [line for line in lines if "turn" in line]
    assert [line["score"] for line in graded[:2]] == [None, None]
    assert graded[0]["said"] == ["평가: 괜찮다.\n**점수: ?**"] * 3
    assert result["metrics"]["single_turn"]["value"] == pytest.approx(
        statistics.fmean(score(f"물음 {n}") for n in range(2, 7))
    )
    # only what the server refused is asked again, and then no more
    for _ in range(2):
        again = run(spec, tmp_path, lambda talks: pytest.fail("the model was asked"), retries=2, max_concurrency=1)
        assert again["unscored"] == 1 and len(server.requests) == 15
    assert again["prompt_tokens"] == result["prompt_tokens"] + 100


def test_answers_without_text_do_not_count_as_grades(server, spec, tmp_path):
    """As from another server at a wrong address, which answers everything with a page."""
    server.faults = ["garbage"] * 12
    with pytest.raises(LaunchError, match=r"gave no score for any answer; .* first '\(not JSON\)'; use"):
        run(spec, tmp_path, retries=0, timeout_seconds=30)
    asked = run(spec, tmp_path, lambda talks: pytest.fail("the model was asked"), timeout_seconds=30)
    assert asked["unscored"] == 0


def test_forms_of_scores():
    for text in ("점수: 8", "**점수**: 8.0/10", "점수: [[8]]", "점수: (8)", "점수：8점", "평가: 좋다.\n점수 : 8"):
        assert logickor.score_in(text) == 8
    assert logickor.score_in("점수: 80") is logickor.score_in("8") is None


def test_a_judge_that_is_gone_is_one_line_and_its_answers_are_kept(server, spec, tmp_path):
    server.faults = [None, None, None, "hang", "hang"]
    with pytest.raises(LaunchError, match=r"does not answer \(.*timed out.*run the evaluation again") as caught:
        run(spec, tmp_path, retries=1, max_concurrency=1, timeout_seconds=3)
    assert "\n" not in str(caught.value)
    file = tmp_path / logickor.FILE
    with file.open("ab") as cut:
        cut.write(b'{"key": "cut o')  # by a crash
    server.requests.clear()
    result = run(spec, tmp_path, lambda talks: pytest.fail("the model was asked"))
    assert len(server.requests) == 9 and result["unscored"] == 0
    server.requests.clear()
    assert run(spec, tmp_path) == result and not server.requests
    server.close()
    with pytest.raises(LaunchError, match="does not answer"):
        run(spec, tmp_path, model="another", retries=0)


def test_refusals_are_one_line_without_the_key(server, spec, tmp_path, monkeypatch):
    for fault, said in (
        ("401", "refuses access \\(401\\); check the key in JUDGE_API_KEY"),
        ("404", "answered 404 \\(no: … is not a key\\); check train.evaluate.judge.url and model"),
        ("302", "answered 302"),
    ):
        server.faults = [fault] * 40
        with pytest.raises(LaunchError, match=said) as caught:
            run(spec, tmp_path, max_concurrency=1)
        assert KEY not in str(caught.value) and "\n" not in str(caught.value)
    server.faults = [grade("?")] * 40
    with pytest.raises(LaunchError, match="gave no score for any answer"):
        run(spec, tmp_path, retries=0)
    assert KEY not in (tmp_path / logickor.FILE).read_text(encoding="utf-8")
    for value, said in (("", "is not set"), (f"{KEY}\n{KEY}", "holds more than a key"), (f"{KEY} 열쇠", "holds more")):
        monkeypatch.setenv("JUDGE_API_KEY", value)
        with pytest.raises(SpecError, match=f"the environment variable JUDGE_API_KEY {said}") as missing:
            logickor.refuse(spec)
        assert KEY not in str(missing.value)
    server.faults, server.keys = [], set()
    assert run(spec, tmp_path, api_key_env=None, model="n")["unscored"] == 0
    assert server.keys == {None}
    with pytest.raises(ValueError) as refused:
        JudgeSpec.model_validate({**spec.model_dump(), "api_key_env": "sk-written-by-mistake"})
    assert "never the key itself" in str(refused.value)
    for field, value in (
        ("url", "https://me:secret@host/v1"),
        ("url", "https://host/v1?key=secret"),
        ("questions", "https://me:secret@host/questions.jsonl"),
    ):
        with pytest.raises(ValueError, match=f"(?s){field}.*without name"):
            JudgeSpec.model_validate({**spec.model_dump(), field: value})


def test_requests_run_side_by_side_up_to_the_limit(server, spec, tmp_path):
    server.pause = 0.05
    run(spec, tmp_path, max_concurrency=3)
    assert server.most == 3


QUESTIONS = {
    "line 2: is not a JSON object": '{"id": 1, "category": "a", "questions": ["x", "y"], "references": null}\n[]',
    "line 1: id must be": '{"id": null, "category": "a", "questions": ["x", "y"]}',
    "line 1: category must be": '{"id": 1, "category": 3, "questions": ["x", "y"]}',
    "line 1: questions must be a list of two": '{"id": 1, "category": "a", "questions": ["x"]}',
    "line 1: references must be": '{"id": 1, "category": "a", "questions": ["x", "y"], "references": [3]}',
    "line 2: id 1 is there twice": '{"id": 1, "category": "a", "questions": ["x", "y"]}\n' * 2,
    "has no questions": "\n",
}


@pytest.mark.parametrize("said", QUESTIONS)
def test_wrong_questions_are_one_line(spec, tmp_path, said):
    file = tmp_path / "wrong.jsonl"
    file.write_text(QUESTIONS[said], encoding="utf-8")
    with pytest.raises(DataError, match=said) as caught:
        read_questions(spec.model_copy(update={"questions": str(file)}))
    assert str(caught.value).startswith(str(file)) and "\n" not in str(caught.value)


def test_a_question_may_have_other_separators_of_lines(spec, tmp_path):
    """Of JSON, only line feeds separate lines; the others may stand in texts."""
    text, file = "가\u2028나\x85다", tmp_path / "odd.jsonl"
    row = {"id": 1, "category": "a", "questions": [text, "y"]}
    file.write_text(json.dumps(row, ensure_ascii=False) + "\r\n", encoding="utf-8", newline="")
    (question,), _ = read_questions(spec.model_copy(update={"questions": str(file)}))
    assert question.turns == (text, "y")


def test_questions_may_have_an_address(server, spec):
    server.pages["/q.jsonl"] = Path(spec.questions).read_bytes()
    root = server.url.removesuffix("/v1")
    assert read_questions(spec.model_copy(update={"questions": f"{root}/q.jsonl"})) == read_questions(spec)
    with pytest.raises(LaunchError, match=r"other\.jsonl: answered 404; check train\.evaluate\.judge\.questions"):
        read_questions(spec.model_copy(update={"questions": f"{root}/other.jsonl"}))


def test_published_instructions_are_read_and_not_run(spec, tmp_path):
    python, other = tmp_path / "templates.py", tmp_path / "mine.json"
    python.write_text('raise SystemExit\nJUDGE_TEMPLATE = {"single_turn": """하나""", "multi_turn": "둘"}\n')
    other.write_text('{"single_turn": "하나", "multi_turn": "둘"}')
    for file in (python, other):
        found, source = read_instructions(spec.model_copy(update={"prompts": str(file)}))
        assert found == {"single_turn": "하나", "multi_turn": "둘"} and len(source) == 64
    assert read_instructions(spec) == (OWN, "own")
    python.write_text("JUDGE_TEMPLATE = make()")
    for path in (str(python), str(tmp_path / "none.py")):
        with pytest.raises(DataError, match=re.escape(path)):
            read_instructions(spec.model_copy(update={"prompts": path}))


def test_the_evaluation_asks_the_judge_about_the_models_own_answers(server, spec, tmp_path):
    wanted = {"max_tokens": 50, "judge": spec.model_dump() | {"max_tokens": 4}}
    made, model = make_run(tmp_path, evaluate=wanted, tokens={"seq_len": 64})
    result = evaluate.run(made)
    shown = {row.metric: row for row in rows(result)}
    assert set(shown) == {"overall", "single_turn", "multi_turn"} and shown["overall"].task == "logickor"
    assert shown["overall"].value == result["logickor"]["metrics"]["overall"]["value"]
    page = (Path(made.run_dir) / "report.html").read_text(encoding="utf-8")
    assert f"<b>{shown['overall'].text}</b>" in page
    for category, means in result["logickor"]["categories"].items():
        numbers = "".join(f'<td class="n">{means[turn]:.2f}</td>' for turn in ("single_turn", "multi_turn"))
        assert f"<td>{category}</td>{numbers}" in page
    lines = [json.loads(line) for line in (Path(made.run_dir) / logickor.FILE).read_text("utf-8").splitlines()]
    answers = [line["answers"] for line in lines if "answers" in line]
    asking, tokenizer = Asking(made.tokens.tokenizer), Tokenizer.load(made.tokens.tokenizer)
    lengths = tokenizer.byte_lengths()
    for n, (first, _) in enumerate(answers, start=1):
        (ids,) = generate(model, [asking(f"물음 {n}")], max_tokens=4, temperature=0, seed=0, stops=asking.stops)
        assert first == tokenizer.decode([token for token in ids if lengths[token]]).strip()
    manifest = {"name": "n", "parameters": 1, "step": 1, "code_version": "1", "data": {}}
    card = model_card(read_run(made.run_dir), manifest | {"checkpoint_digest": result["checkpoint_digest"]})
    assert "LogicKor was graded by m, by yaongi's own instructions." in card
    digest = hashlib.sha256(Path(spec.questions).read_bytes()).hexdigest()
    assert judged_by(result) == {"judge": "m", "questions": digest, "instructions": "own", "unscored": 0}
    count = len(server.requests)
    assert evaluate.run(made)["logickor"] == result["logickor"] and len(server.requests) == count
    with pytest.raises(ForeseenError, match="leaves no room for a question"):
        evaluate.run(made.updated({"evaluate": {"judge": {"max_tokens": 64}}}))
