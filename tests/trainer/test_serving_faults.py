"""What the server does when its engine fails, or it cannot start."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
from test_inference_cache import BASE

from trainer import loading
from trainer.inference.engine import Engine
from trainer.inference.sampling import Sampling
from trainer.inference.text import Text
from trainer.model.hybrid import build_model
from trainer.modelspec import ModelSpec
from trainer.recording.exporter import Metrics
from trainer.serving.__main__ import main
from trainer.serving.app import Service, app_of
from trainer.serving.engine_thread import EngineThread
from trainer.serving.options import Options, Weights
from trainer.serving.parameters import Reader


class Breaks(Engine):
    """Fails in its third pass, or stands still."""

    stands = False

    def step(self) -> list[Text]:
        if self.stands:
            time.sleep(0.002)
            return []
        if self.passes == 2:
            raise RuntimeError("CUDA error: an illegal memory access\nmore of it")
        return super().step()


class NoTokenizer:
    """Only ids go in."""

    eod_id = -1

    def decode_bytes(self, ids: list[int]) -> bytes:
        return b"a"


def service_of(engine: Engine, timeout: float) -> Service:
    reader = Reader("m", NoTokenizer(), None, engine.model.spec.vocab_size, engine.length)  # type: ignore[arg-type]
    metrics = Metrics(rank=0, port=0, process="server")
    thread = EngineThread(lambda: (engine, reader), metrics, max_waiting=4)
    return Service(thread, metrics, "m", 0, "", timeout, 1000)


async def asked(app: Any, method: str, path: str, body: Any = None) -> tuple[int, str]:
    """Status and body of a request, by a client that waits for the end."""
    sent: list[dict[str, Any]] = []
    incoming = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

    async def receive() -> dict[str, Any]:
        return incoming.pop() if incoming else await asyncio.Event().wait()  # type: ignore[return-value]  # never

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {"type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": b""}
    scope |= {"headers": [], "http_version": "1.1", "scheme": "http", "server": ("h", 1), "client": ("c", 1)}
    await app(scope, receive, send)
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent).decode()


@pytest.fixture(scope="module")
def engine() -> Callable[[], Breaks]:
    model = build_model(ModelSpec.model_validate(BASE), seed=0).eval()
    return lambda: Breaks(model, NoTokenizer(), rows=2, length=60)  # type: ignore[arg-type]


ASK = {"model": "m", "prompt": [1, 2, 3], "max_tokens": 50, "temperature": 0}


def test_requests_end_with_an_error_when_the_engine_fails(engine: Callable[[], Breaks]) -> None:
    async def story() -> None:
        breaks = engine()
        breaks.stands = True
        service = service_of(breaks, timeout=60)
        app = app_of(service)
        await service.thread.loaded.wait()
        asks = (ASK, {**ASK, "stream": True}, {**ASK, "n": 2})
        answers = [asyncio.create_task(asked(app, "POST", "/v1/completions", each)) for each in asks]
        while service.thread.open < 4:
            await asyncio.sleep(0.01)
        breaks.stands = False
        whole, stream, waits = await asyncio.gather(*answers)
        assert whole[0] == waits[0] == 500
        error = json.loads(whole[1])["error"]
        assert (error["type"], error["code"]) == ("server_error", "failed")
        assert "CUDA error: an illegal memory access" in error["message"] and "more of it" not in error["message"]
        assert stream[0] == 200 and '"failed"' in stream[1].splitlines()[-2] and "[DONE]" not in stream[1]
        assert await asked(app, "GET", "/health") == (503, '{"status":"failed"}')
        assert (await asked(app, "GET", "/ready"))[0] == 503
        assert (await asked(app, "POST", "/v1/completions", ASK))[0] == 500
        assert service.thread.open == 0
        assert service.metrics.registry.get_sample_value("yaongi_serve_refused_total", {"reason": "failed"}) == 4

    asyncio.run(story())


def test_an_answer_that_takes_too_long_is_an_error(engine: Callable[[], Breaks]) -> None:
    async def story() -> None:
        stuck = engine()
        stuck.stands = True
        service = service_of(stuck, timeout=0.1)
        app = app_of(service)
        await service.thread.loaded.wait()
        for stream in (True, False):
            status, body = await asked(app, "POST", "/v1/completions", {**ASK, "stream": stream})
            assert (status, json.loads(body)["error"]["code"]) == (504, "timeout")
        assert service.thread.open == 0
        service.thread.close()

    asyncio.run(story())


def test_before_the_model_is_there_the_server_is_alive_but_not_ready() -> None:
    async def story() -> None:
        release = asyncio.Event()
        loop = asyncio.get_running_loop()

        def load() -> Any:
            asyncio.run_coroutine_threadsafe(release.wait(), loop).result(60)
            raise MemoryError("no room")

        thread = EngineThread(load, Metrics(rank=0, port=0, process="server"), max_waiting=4)
        app = app_of(Service(thread, Metrics(rank=0, port=0, process="server"), "m", 0, "", 9, 1000))
        assert await asked(app, "GET", "/health") == (200, '{"status":"loading"}')
        assert (await asked(app, "GET", "/ready"))[0] == 503
        assert (await asked(app, "POST", "/v1/completions", ASK))[0] == 503
        release.set()
        await thread.loaded.wait()
        assert isinstance(thread.failure, MemoryError)

    asyncio.run(story())


def test_a_cancelled_call_leaves_the_engine(engine: Callable[[], Breaks]) -> None:
    async def story() -> None:
        slow = engine()
        slow.stands = True
        thread = service_of(slow, timeout=60).thread
        await thread.loaded.wait()
        call = thread.submit([([1, 2], Sampling(max_tokens=50))] * 3, 0.0)
        assert (thread.open, thread.waiting) == (3, 1)
        thread.cancel(call)
        assert thread.open == 0
        slow.stands = False
        while slow.busy:
            await asyncio.sleep(0.01)
        assert slow.passes == 0, "nothing was continued"
        thread.close()

    asyncio.run(story())


@pytest.mark.usefixtures("leave_no_traces")
@pytest.mark.enable_socket
def test_what_keeps_it_from_starting_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(code: int, *arguments: str) -> str:
        assert main(arguments) == code
        captured = capsys.readouterr()
        (line,) = captured.err.splitlines()
        return line

    assert "manifest.json: not there or damaged; give the folder" in said(66, str(tmp_path))
    (tmp_path / "manifest.json").write_text('{"name": "m"}')
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"cannot listen on 127.0.0.1, port {port} (Address already in use)" in said(
            69, str(tmp_path), "--port", port
        )
        assert f"metrics port {port} is taken; set --metrics-port" in said(2, str(tmp_path), "--metrics-port", port)
    assert "manifest.json has format None" in said(66, str(tmp_path), "--port", "0")
    assert "--rows is 0; it must be at least 1" in said(2, str(tmp_path), "--rows", "0")
    for key in ("열쇠", "two\nlines"):
        monkeypatch.setenv("YAONGI_API_KEY", key)
        line = said(2, str(tmp_path), "--port", "0")
        assert "YAONGI_API_KEY has characters that clients cannot send" in line and key not in line
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else found(name))
    assert said(69, str(tmp_path)) == "error: uvicorn is not installed; run: pip install 'yaongi[serve]'"


def test_the_verb_finds_the_export_and_has_the_servers_options(
    yaongi: Callable[..., tuple[int, str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainer.serving import server

    given: list[Options] = []
    monkeypatch.setattr(server, "run", given.append)
    assert yaongi("serve", "nothing")[0] == 2
    (tmp_path / "model.safetensors").touch()
    assert yaongi("serve", str(tmp_path), "--rows", "3", "--grace", "5", "--device", "cpu", "--weights", "int8")[0] == 0
    assert given == [Options(tmp_path, rows=3, grace=5.0, device="cpu", weights="int8")]
    assert get_args(Weights) == get_args(loading.Weights)
