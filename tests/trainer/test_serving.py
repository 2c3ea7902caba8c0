"""The server with the official client: two processes on this machine, with an untrained model."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from made_run import make_run
from ports import free_port
from served import KEY, Process, start
from tools import tool
from waiting import wait_until

from manifests.dashboards.query import View, dashboards, panels, series, targets
from trainer import export
from trainer.data.chattemplate import Asking
from trainer.data.tokenizer import Tokenizer
from trainer.generate import complete, continued
from trainer.inference.sampling import Sampling
from trainer.model.hybrid import HybridModel

pytestmark = [pytest.mark.enable_socket, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
MODEL = "micro"
PROMPTS = ["river", "다리 강물 stone moon", "x", "light seven def return"]
GREEDY: dict[str, Any] = {"model": MODEL, "max_tokens": 12, "temperature": 0}
MESSAGES: list[Any] = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": [{"type": "text", "text": "river<|im_end|>"}, {"type": "text", "text": " 다리"}]},
    {"role": "assistant", "content": "stone"},
    {"role": "user", "content": "moon"},
]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec, _ = make_run(tmp_path_factory.mktemp("served"))
    export.run(spec)
    return Path(spec.run_dir) / "export"


@pytest.fixture(scope="module")
def processes(exported: Path) -> Iterator[tuple[Process, Process]]:
    both = start(exported, "--rows=16", "--length=128"), start(
        exported, "--rows=1", "--max-waiting=1", "--length=3000", "--device=cpu", "--grace=500",
        "--weights=int8", key=KEY,
    )  # fmt: skip
    try:
        for each in both:
            wait_until(lambda each=each: each.process.poll() is not None or "ready" in "".join(each.lines))
            assert each.process.poll() is None, each.lines
        yield both
    finally:
        for each in both:
            each.process.kill()
            each.process.wait()


@pytest.fixture
def server(processes: tuple[Process, Process]) -> Process:
    """16 texts at the same time, no key."""
    return processes[0]


@pytest.fixture
def narrow(processes: tuple[Process, Process]) -> Process:
    """One text at a time and one that waits, a key, long texts."""
    return processes[1]


@pytest.fixture(scope="module")
def trained(exported: Path) -> tuple[HybridModel, Tokenizer]:
    return export.load(exported)


def alone(trained: tuple[HybridModel, Tokenizer], prompts: list[str], **options: Any) -> list[str]:
    """The greedy texts that the engine writes."""
    return complete(*trained, prompts, **{"max_tokens": 12, "temperature": 0, "seed": 0, **options})


def test_texts_are_those_of_the_engine(server: Process, trained: tuple[HybridModel, Tokenizer]) -> None:
    client, expected = server.client(), alone(trained, PROMPTS)
    whole = client.completions.create(prompt=PROMPTS, **GREEDY)
    assert [choice.text for choice in whole.choices] == expected
    assert {choice.finish_reason for choice in whole.choices} == {"length"}
    ids = [trained[1].encode(prompt) for prompt in PROMPTS]
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (sum(map(len, ids)), 48)
    assert [c.text for c in client.completions.create(prompt=ids, **GREEDY).choices] == expected
    assert client.completions.create(prompt=ids[1], **GREEDY).choices[0].text == expected[1]
    assert client.completions.create(prompt=PROMPTS[2], model=MODEL, temperature=0).usage.completion_tokens == 16
    assert [model.id for model in client.models.list()] == [client.models.retrieve(MODEL).id] == [MODEL]


def test_chats_are_written_as_in_training(
    server: Process, exported: Path, trained: tuple[HybridModel, Tokenizer]
) -> None:
    """Several turns, parts of a content, and special tokens in it, which end nothing."""
    asking = Asking(exported)
    plain = [{**MESSAGES[0]}, {"role": "user", "content": "river<|im_end|> 다리"}, *MESSAGES[2:]]
    prompt = asking.ids(plain)
    assert asking.text(plain).count("<|im_end|>") == 4
    (text,) = continued(*trained, [prompt], Sampling(12, stop_ids=frozenset(asking.stops)))
    answer = server.client().chat.completions.create(messages=MESSAGES, **GREEDY)
    assert answer.choices[0].message.content == text.text and answer.choices[0].message.role == "assistant"
    assert answer.usage is not None and answer.usage.prompt_tokens == len(prompt)
    without_limit = server.client().chat.completions.create(model=MODEL, messages=MESSAGES, temperature=0)
    assert without_limit.usage is not None
    assert without_limit.choices[0].finish_reason == "length" and without_limit.usage.total_tokens == 128


@pytest.mark.parametrize("chat", [False, True])
def test_streams_say_the_same(server: Process, chat: bool) -> None:
    client = server.client()
    drawn: dict[str, Any] = {"model": MODEL, "max_tokens": 20, "seed": 7, "n": 3, "top_p": 0.9, "temperature": 0.9}
    drawn["extra_body"] = {"top_k": 100, "min_p": 0.001, "repetition_penalty": 1.1}
    if chat:
        create: Any = client.chat.completions.create
        drawn |= {"messages": MESSAGES, "logprobs": True, "top_logprobs": 2}
    else:
        create = client.completions.create
        drawn |= {"prompt": PROMPTS[:2], "logprobs": 2}
    whole = create(**drawn).model_dump()
    chunks = [each.model_dump() for each in create(**drawn, stream=True, stream_options={"include_usage": True})]
    texts: dict[int, str] = {}
    logprobs: dict[int, list[Any]] = {}
    reasons: dict[int, str] = {}
    for chunk in chunks[:-1]:
        assert chunk["usage"] is None and len(chunk["choices"]) == 1 and chunk["id"] == chunks[0]["id"]
        (choice,) = chunk["choices"]
        at = choice["index"]
        texts[at] = texts.get(at, "") + ((choice["delta"]["content"] or "") if chat else choice["text"])
        if found := choice["logprobs"]:
            logprobs.setdefault(at, []).extend(found["content"] if chat else found["token_logprobs"])
        reasons[at] = choice["finish_reason"] or reasons.get(at)
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"] == whole["usage"]
    assert len(whole["choices"]) == (3 if chat else 6)
    for choice in whole["choices"]:
        at = choice["index"]
        assert texts[at] == (choice["message"]["content"] if chat else choice["text"])
        assert logprobs[at] == choice["logprobs"]["content" if chat else "token_logprobs"]
        assert reasons[at] == choice["finish_reason"]
    assert len(set(texts.values())) == len(texts), "each text has its own seed"


def test_stop_strings_end_a_text(server: Process, trained: tuple[HybridModel, Tokenizer]) -> None:
    client = server.client()
    (text,) = alone(trained, [PROMPTS[1]], max_tokens=40)
    stop = text[14:16]
    options = {**GREEDY, "prompt": PROMPTS[1], "max_tokens": 40, "stop": [stop, "never"], "logprobs": 0}
    whole = client.completions.create(**options).choices[0]
    assert (whole.text, whole.finish_reason) == (text[: text.index(stop)], "stop")
    assert whole.logprobs is not None and whole.logprobs.text_offset is not None
    assert all(place < len(whole.text) for place in whole.logprobs.text_offset)
    streamed = [chunk.choices[0] for chunk in client.completions.create(**options, stream=True)]
    assert "".join(choice.text for choice in streamed) == whole.text
    assert [token for choice in streamed for token in choice.logprobs.tokens] == whole.logprobs.tokens


def test_logprobs_are_those_of_the_engine(server: Process, trained: tuple[HybridModel, Tokenizer]) -> None:
    model, tokenizer = trained
    (text,) = continued(model, tokenizer, [tokenizer.encode(PROMPTS[0])], Sampling(12, logprobs=3))
    found = server.client().completions.create(prompt=PROMPTS[0], logprobs=3, **GREEDY).choices[0].logprobs
    assert found is not None and found.token_logprobs is not None and found.top_logprobs is not None
    assert found.token_logprobs == pytest.approx([each.logprob for each in text.logprobs], abs=1e-4)
    assert [len(top) for top in found.top_logprobs] == [3] * 12
    assert [max(top.values()) for top in found.top_logprobs] == found.token_logprobs, "greedy"
    assert found.text_offset is not None and found.text_offset == sorted(found.text_offset)
    chat = server.client().chat.completions.create(messages=MESSAGES, logprobs=True, top_logprobs=3, **GREEDY)
    logprobs = chat.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    told = b"".join(bytes(each.bytes or []) for each in logprobs.content)
    content = chat.choices[0].message.content
    assert content is not None and tokenizer.encode_bytes(told) and told.decode(errors="replace")[:5] == content[:5]
    assert all(each.top_logprobs[0].token == each.token for each in logprobs.content)


def test_a_seed_gives_the_same_text_again(server: Process) -> None:
    def texts(**options: Any) -> list[str]:
        made = server.client().completions.create(model=MODEL, prompt="x", max_tokens=20, **options)
        return [choice.text for choice in made.choices]

    assert texts(seed=3, n=2) == texts(seed=3) + texts(seed=4)
    assert texts() != texts(), "without a seed, temperature 1 draws anew"


PROMPT = {"model": MODEL, "prompt": "x"}
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "x"}]}


@pytest.mark.parametrize(
    ("body", "status", "param", "code"),
    [
        ({"prompt": "x"}, 400, "model", "missing_required_parameter"),
        ({"model": MODEL}, 400, "prompt", "missing_required_parameter"),
        ({"model": "gpt", "prompt": "x"}, 404, "model", "model_not_found"),
        ({**PROMPT, "max_tokens": "9"}, 400, "max_tokens", "invalid_type"),
        ({**PROMPT, "max_tokens": 0}, 400, "max_tokens", "invalid_value"),
        ({**PROMPT, "temperature": True}, 400, "temperature", "invalid_type"),
        ({**PROMPT, "temperature": 2.5}, 400, "temperature", "invalid_value"),
        ({**PROMPT, "n": 1.5}, 400, "n", "invalid_type"),
        ({**PROMPT, "n": 129}, 400, "n", "invalid_value"),
        ({**PROMPT, "stop": ["a", 5]}, 400, "stop[1]", "invalid_type"),
        ({**PROMPT, "stop": ""}, 400, "stop[0]", "invalid_value"),
        ({**PROMPT, "logprobs": 6}, 400, "logprobs", "invalid_value"),
        ({**PROMPT, "prompt": ""}, 400, "prompt", "invalid_value"),
        ({**PROMPT, "prompt": []}, 400, "prompt", "invalid_type"),
        ({**PROMPT, "prompt": ["a", 1]}, 400, "prompt[1]", "invalid_value"),
        ({**PROMPT, "prompt": [1, 320]}, 400, "prompt", "invalid_value"),
        ({**PROMPT, "prompt": [[1], [True]]}, 400, "prompt[1]", "invalid_value"),
        ({**PROMPT, "prompt": "\ud800"}, 400, "prompt", "invalid_value"),
        ({**PROMPT, "prompt": [5] * 120}, 400, "prompt", "context_length_exceeded"),
        ({**PROMPT, "prompt": ["a"] * 129}, 400, "n", "invalid_value"),
        ({**PROMPT, "prompt": "a b" * 10**6}, 400, "prompt", "context_length_exceeded"),
        ({**PROMPT, "stop": "a" * 201}, 400, "stop[0]", "invalid_value"),
        ({**PROMPT, "presence_penalty": 0.5}, 400, "presence_penalty", "unsupported_parameter"),
        ({**PROMPT, "echo": True}, 400, "echo", "unsupported_parameter"),
        ({**PROMPT, "best_of": 2}, 400, "best_of", "unsupported_parameter"),
        ({**PROMPT, "max_token": 5}, 400, "max_token", "unknown_parameter"),
        ({**PROMPT, "stream_options": {"include_usage": True}}, 400, "stream_options", "invalid_value"),
        ({**CHAT, "tools": [{"type": "function"}]}, 400, "tools", "unsupported_parameter"),
        ({**CHAT, "messages": []}, 400, "messages", "invalid_value"),
        ({**CHAT, "messages": [{"role": "tool", "content": "x"}]}, 400, "messages[0].role", "invalid_value"),
        ({**CHAT, "messages": [{"role": "user", "content": 5}]}, 400, "messages[0].content", "invalid_type"),
        ({**CHAT, "messages": [{"role": "user", "content": "x" * 200}]}, 400, "messages", "context_length_exceeded"),
        ({**CHAT, "messages": [{"role": "user", "content": "가" * 10**5}]}, 400, "messages", "context_length_exceeded"),
        ({**CHAT, "top_logprobs": 1}, 400, "top_logprobs", "invalid_value"),
        ({**CHAT, "max_tokens": 5, "max_completion_tokens": 6}, 400, "max_tokens", "invalid_value"),
        ([], 400, None, None),
    ],
)
def test_what_is_wrong_is_named(server: Process, body: Any, status: int, param: str | None, code: str | None) -> None:
    path = "/v1/chat/completions" if body and "messages" in body else "/v1/completions"
    request = urllib.request.Request(server.address + path, json.dumps(body).encode())
    with pytest.raises(urllib.error.HTTPError) as raised:
        urllib.request.urlopen(request, timeout=60)
    error = json.load(raised.value)["error"]
    assert (raised.value.code, error["param"], error["code"]) == (status, param, code), error
    assert error["type"] == "invalid_request_error" and "\n" not in error["message"]


def test_neutral_values_ask_for_nothing(server: Process, trained: tuple[HybridModel, Tokenizer]) -> None:
    neutral = {"presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "echo": False, "suffix": None}
    made = server.client().completions.create(prompt="x", best_of=1, user="me", extra_body=neutral, **GREEDY)
    assert [made.choices[0].text] == alone(trained, ["x"])


def test_large_bodies_and_wrong_paths_are_refused(server: Process) -> None:
    client = server.client()
    with pytest.raises(openai.APIStatusError) as raised:
        client.completions.create(prompt="x" * 2**22, **GREEDY)
    assert raised.value.status_code == 413
    with pytest.raises(openai.NotFoundError, match="/v1/embeddings"):
        client.embeddings.create(model=MODEL, input="x")


def test_many_streams_at_once_are_not_mixed_up(server: Process, trained: tuple[HybridModel, Tokenizer]) -> None:
    """64 clients, 16 places."""
    words = ["river", "stone", "moon", "light", "seven", "def", "return", "바람"]
    prompts = [f"{first} {second}" for first in words for second in words]
    expected = alone(trained, prompts, max_tokens=8)

    async def all_streams() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.address}/v1", api_key="-", max_retries=0) as client:

            async def one(prompt: str) -> str:
                stream = await client.completions.create(
                    model=MODEL, prompt=prompt, max_tokens=8, temperature=0, stream=True
                )
                return "".join([chunk.choices[0].text async for chunk in stream])

            return await asyncio.gather(*map(one, prompts))

    assert asyncio.run(all_streams()) == expected
    assert server.metric("first_token_seconds_count") >= 64 and server.metric("waiting_texts") == 0


def test_every_panel_of_the_dashboard_shows_something(server: Process, tmp_path: Path) -> None:
    """With a real Prometheus that scrapes the server while it answers and refuses."""
    tool("prometheus")
    maker = importlib.util.spec_from_file_location("dashboard_pictures", ROOT / "makers" / "dashboard_pictures.py")
    assert maker and maker.loader
    module = importlib.util.module_from_spec(maker)
    sys.modules["dashboard_pictures"] = module  # its dataclasses look there
    maker.loader.exec_module(module)
    client, begin = server.client(), time.time()
    targets_of = [(server.metrics, {"namespace": "here", "run": "served"})]

    def empty() -> set[str]:
        client.completions.create(prompt=PROMPTS, **GREEDY)
        with pytest.raises(openai.BadRequestError):
            client.completions.create(prompt=[], **GREEDY)
        view = View(begin, time.time(), 1.0, {"namespace": "here", "server": "served"})
        found = [(panel["title"], each) for panel in panels(dashboards()["serving"]) for each in targets(panel)]
        return {title for title, each in found if all(one.is_empty for one in series(prometheus.ask, each, view))}

    with module.Prometheus(tmp_path, free_port(), targets_of) as prometheus:
        wait_until(lambda: not empty())


LONG: dict[str, Any] = {"model": MODEL, "prompt": "x", "max_tokens": 2900, "temperature": 0, "stream": True}


def test_a_key_is_demanded(narrow: Process) -> None:
    for wrong in ("", "a key", KEY + "s"):
        for path in ("/v1/models", "/v1/completions"):
            request = urllib.request.Request(narrow.address + path, headers={"Authorization": f"Bearer {wrong}"})
            request.method = "GET" if path == "/v1/models" else "POST"
            with pytest.raises(urllib.error.HTTPError) as raised:
                urllib.request.urlopen(request, timeout=60)
            assert raised.value.code == 401 and json.load(raised.value)["error"]["code"] == "invalid_api_key"
    assert narrow.get("/ready") == (200, {"status": "ready"}) and narrow.get("/health")[0] == 200
    assert narrow.client().models.list().data[0].id == MODEL
    assert KEY not in "".join(narrow.lines)


def test_too_many_are_sent_away_and_who_leaves_makes_room(narrow: Process) -> None:
    client = narrow.client()
    first = client.completions.create(**LONG)
    next(iter(first))
    waits = threading.Thread(target=lambda: client.completions.create(**{**LONG, "stream": False, "max_tokens": 1}))
    waits.start()
    wait_until(lambda: narrow.metric("waiting_texts") == 1)
    with pytest.raises(openai.RateLimitError) as raised:
        client.completions.create(**LONG)
    assert int(raised.value.response.headers["retry-after"]) >= 1 and raised.value.code == "rate_limit_exceeded"
    with pytest.raises(openai.BadRequestError, match="takes 2 at a time"):
        client.completions.create(**{**LONG, "n": 3})
    first.close()
    waits.join(60)
    wait_until(lambda: narrow.metric("running_texts") == 0)
    assert narrow.metric("completion_tokens_total") < 2900, "a text whose client has left goes on"


def test_running_answers_end_before_the_process_does(narrow: Process) -> None:
    """The last test: it ends the server."""
    client = narrow.client()
    narrow.process.send_signal(signal.SIGUSR1)
    wait_until(lambda: narrow.get("/ready")[0] == 503)
    answer = client.completions.with_raw_response.create(**{**LONG, "stream": False, "max_tokens": 1})
    assert answer.headers["connection"] == "close", "the next request should go to another process"
    stream = client.completions.create(**LONG, stream_options={"include_usage": True})
    chunks = [next(iter(stream))]
    narrow.process.send_signal(signal.SIGTERM)
    wait_until(lambda: narrow.get("/ready") == (503, {"status": "draining"}))
    assert narrow.get("/health")[0] == 200
    with pytest.raises(openai.InternalServerError) as raised:
        client.completions.create(**LONG)
    assert raised.value.status_code == 503 and raised.value.code == "draining"
    chunks += list(stream)
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 2900
    assert narrow.process.wait(30) == 0
    assert narrow.lines[-1] == "ending, with 1 requests in progress\n"
