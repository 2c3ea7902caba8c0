"""LogicKor: two-turn answers in Korean, in six categories of seven questions, graded by a judge model.

The procedure is that of github.com/instructkr/LogicKor (evaluator.py, score.py): the model answers the first question,
then the second one with the first in view, greedily. The judge grades each turn by itself, the second with the whole
conversation in view, and ends with "점수: <number>". Scores are means over questions, and the overall score is the mean
of both turns. Different from it: an answer that the judge does not grade counts as unscored instead of as 0, and the
judge's instructions are our own unless the job names the published ones (trainer/evaluation/questions.py).

All answers of the model and of the judge are lines of run_dir/logickor.jsonl. Nothing in it is asked again, except
what the judge's server refused or answered without text.
"""

from __future__ import annotations

import json
import logging
import os
import re
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from threading import Lock
from typing import Any

from trainer.benchmarkspec import JudgeSpec
from trainer.errors import LaunchError
from trainer.evaluation.judge import Judge
from trainer.evaluation.questions import TURNS, Question, read_instructions, read_questions
from trainer.specbase import canonical_digest

log = logging.getLogger(__name__)

FILE = "logickor.jsonl"
MOST = 10.0
_SCORE = re.compile(r"점수\s*[:：]\s*[\[(]*(\d+(?:\.\d+)?)")
Messages = list[dict[str, str]]
Write = Callable[[list[Messages]], list[str]]
Record = dict[str, Any]


def refuse(spec: JudgeSpec) -> None:
    """Refuse, before anything is loaded, a judge that cannot work.

    Raises:
        SpecError: no key.
        DataError, LaunchError: no questions or instructions.
    """
    Judge(spec)
    read_questions(spec)
    read_instructions(spec)


def run(spec: JudgeSpec, write: Write, run_dir: str, known: dict[str, Any]) -> Record:
    """The scores, the number of answers without one, and what the judge cost.

    Args:
        write: the model's answers to conversations.
        known: what these depend on: the checkpoint, and how it is computed.

    Raises:
        LaunchError: the judge does not answer, or gave no score at all; what it said is kept.
        DataError: wrong questions or instructions.
    """
    judge = Judge(spec)
    questions, file_digest = read_questions(spec)
    instructions, source = read_instructions(spec)
    kept = Kept(Path(run_dir) / FILE)
    answers = _answered(questions, write, kept, [known, spec.max_tokens])
    grader = _Grader(spec, judge, instructions, kept)
    asked = [(q, turn, answers[q.id]) for q in questions for turn in TURNS]
    log.info("logickor: %s grades %d answers", spec.model, len(asked))
    with ThreadPoolExecutor(spec.max_concurrency) as threads:
        futures = [threads.submit(grader, *each) for each in asked]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            threads.shutdown(wait=True, cancel_futures=True)  # those under way are kept
    for error in (future.exception() for future in futures if not future.cancelled()):
        if isinstance(error, LaunchError):
            raise LaunchError(f"{error}; what it graded is kept in {Path(run_dir) / FILE}, run the evaluation again")
        if error is not None:
            raise error
    graded = [future.result() for future in futures]
    return _result(spec, questions, graded, {"questions": file_digest, "instructions": source, "judge": spec.model})


class Kept:
    """A file of JSON lines, each written at once; a last line that a crash cut off does not count."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, Lock()
        self._lines: dict[str, Record] = {}
        data = path.read_bytes() if path.exists() else b""
        for line in data.split(b"\n"):
            try:
                record = json.loads(line)
                self._lines[record["key"]] = record
            except (ValueError, KeyError, TypeError):
                continue
        self._cut = bool(data) and not data.endswith(b"\n")

    def get(self, key: str) -> Record | None:
        return self._lines.get(key)

    def add(self, record: Record) -> Record:
        line = (json.dumps(record, ensure_ascii=False) + "\n").encode()
        with self._lock:
            self._lines[record["key"]] = record
            with self._path.open("ab") as file:
                file.write(b"\n" + line if self._cut else line)
                file.flush()
                os.fsync(file.fileno())
            self._cut = False
        return record


def _answered(questions: Sequence[Question], write: Write, kept: Kept, known: Any) -> dict[int | str, tuple[str, str]]:
    """The model's answers to both turns of each question."""
    keys = {q.id: canonical_digest(["answers", known, q.turns]) for q in questions}
    new = [q for q in questions if kept.get(keys[q.id]) is None]
    if new:
        log.info("logickor: the model answers %d questions in two turns", len(new))
        first = write([[_user(q.turns[0])] for q in new])
        talks = [[_user(q.turns[0]), {"role": "assistant", "content": a}] for q, a in zip(new, first, strict=True)]
        second = write([[*talk, _user(q.turns[1])] for q, talk in zip(new, talks, strict=True)])
        for q, a, b in zip(new, first, second, strict=True):
            kept.add({"key": keys[q.id], "id": q.id, "category": q.category, "answers": [a, b]})
    found = {name: kept.get(key) for name, key in keys.items()}
    return {name: (record["answers"][0], record["answers"][1]) for name, record in found.items() if record}


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


class _Grader:
    """Asks the judge about one turn, again while its answer has no score, and keeps what it said."""

    def __init__(self, spec: JudgeSpec, judge: Judge, instructions: dict[str, str], kept: Kept) -> None:
        self._spec, self._judge, self._instructions, self._kept = spec, judge, instructions, kept
        self._gone: LaunchError | None = None  # the judge does not answer any more

    def __call__(self, question: Question, turn: str, answers: tuple[str, str]) -> Record:
        """What is kept of it. Raises as `Judge.ask`, and so do all further calls."""
        if self._gone:
            raise self._gone
        try:
            return self._graded(question, turn, answers)
        except LaunchError as error:
            self._gone = error
            raise

    def _graded(self, question: Question, turn: str, answers: tuple[str, str]) -> Record:
        system, asked = self._instructions[turn], conversation(question, turn, answers)
        key = canonical_digest(["grade", self._spec.model, system, asked])
        if (before := self._kept.get(key)) is not None and not before.get("refused"):
            return before
        said, score, refused, prompt, completion = list[str](), None, False, 0, 0
        for _ in range(self._spec.retries + 1):
            reply = self._judge.ask(system, asked)
            prompt, completion = prompt + reply.prompt_tokens, completion + reply.completion_tokens
            said.append(reply.text if reply.text is not None else f"({reply.why_not})")
            score = None if reply.text is None else score_in(reply.text)
            refused = reply.text is None  # the next evaluation asks again
            if score is not None or reply.why_not.startswith("status"):  # that would be again, now
                break
        record = {
            "key": key,
            "id": question.id,
            "category": question.category,
            "turn": turn,
            "judge": self._spec.model,
            "score": score,
            "refused": refused,
            "said": said,
            "prompt_tokens": prompt,
            "completion_tokens": completion,
        }
        return self._kept.add(record)


def conversation(question: Question, turn: str, answers: tuple[str, str]) -> str:
    """What the judge is to grade: a question, the reference if there is one, and the answer; twice for the second
    turn."""
    parts = []
    names = ("Question", "Follow-up Question") if turn == TURNS[1] else ("Question",)
    for number, name in enumerate(names):
        parts.append(f"**{name}**\n{question.turns[number]}")
        if reference := question.references[number]:
            parts.append(f"**Additional Reference**\n{reference}")
        parts.append(f"**Model's Response**\n{answers[number]}")
    return "\n\n".join([*parts, "대화는 여기까지입니다. 위의 기준으로 평가하십시오."])


def score_in(text: str) -> float | None:
    """The score in a judge's answer; None if there is none from 0 to 10."""
    found = _SCORE.search(text.replace("*", ""))
    score = float(found[1]) if found else None
    return score if score is not None and score <= MOST else None


def _result(spec: JudgeSpec, questions: Sequence[Question], graded: list[Record], sources: dict[str, str]) -> Record:
    scores = {(record["id"], record["turn"]): record["score"] for record in graded}
    unscored = sum(score is None for score in scores.values())
    if unscored == len(scores):
        said = " ".join(str(graded[0]["said"][-1]).split())[:100]
        raise LaunchError(
            f"the judge {spec.model} gave no score for any answer; what it said is in {FILE} of the run, "
            f"first {said!r}; use a model that follows the instructions"
        )
    if unscored:
        log.warning("logickor: %d of %d answers have no score, as the judge gave none", unscored, len(scores))

    def of(turn: str, category: str | None = None) -> list[float]:
        found = (scores[q.id, turn] for q in questions if category in (None, q.category))
        return [score for score in found if score is not None]

    both = [pair for q in questions if None not in (pair := [scores[q.id, turn] for turn in TURNS])]
    turns = {turn: of(turn) for turn in TURNS}
    metrics = {turn: _number(values, values) for turn, values in turns.items() if values}
    means = [statistics.fmean(values) for values in turns.values() if values]
    overall = {"overall": _number(means, [statistics.fmean(pair) for pair in both])}
    categories = {
        category: {turn: statistics.fmean(values) if (values := of(turn, category)) else None for turn in TURNS}
        for category in dict.fromkeys(q.category for q in questions)
    }
    tokens = {name: sum(record[name] for record in graded) for name in ("prompt_tokens", "completion_tokens")}
    return {
        "metrics": overall | metrics,
        "categories": categories,
        "samples": len(questions),
        "unscored": unscored,
        **tokens,
        "cost": _cost(spec, tokens),
        **sources,
    }


def _number(values: Sequence[float], samples: Sequence[float]) -> dict[str, float | bool | None]:
    """The mean of `values`, and the standard error of the mean of `samples`."""
    error = statistics.stdev(samples) / len(samples) ** 0.5 if len(samples) > 1 else None
    return {"value": statistics.fmean(values), "stderr": error, "higher_is_better": True}


def _cost(spec: JudgeSpec, tokens: dict[str, int]) -> float | None:
    """Money, in the currency of the prices; None without prices."""
    if spec.price_input is None and spec.price_output is None:
        return None
    prices = {"prompt_tokens": spec.price_input or 0.0, "completion_tokens": spec.price_output or 0.0}
    return sum(tokens[name] * price / 1e6 for name, price in prices.items())
