"""The process of the server: it listens while the model is loaded, and leaves without breaking an answer.

SIGTERM or SIGINT: new requests get 503, those that run have `grace` seconds to end; then the exit code is 0. SIGUSR1
announces that: everything is answered as before, but connections are closed after each answer and /ready says 503, so
that clients come to another process with their next request. A pod gets it from its preStop hook.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import time
from pathlib import Path
from types import FrameType

import torch
import uvicorn

from trainer.data.chattemplate import Asking
from trainer.errors import CheckpointError, DataError, LaunchError, SpecError, in_words
from trainer.export import MANIFEST, TRANSFORMERS
from trainer.inference import memory
from trainer.inference.engine import Engine
from trainer.inference.sampling import Sampling
from trainer.loading import load
from trainer.parameters import parameters
from trainer.recording.exporter import Metrics
from trainer.serving.app import Service, app_of
from trainer.serving.engine_thread import EngineThread
from trainer.serving.options import Device, Options
from trainer.serving.parameters import Reader

KEY_VARIABLE = "YAONGI_API_KEY"
BODY_BYTES = 2**22
LENGTH = 4096  # where the export does not say what it was trained on
KEEP_ALIVE_SECONDS = 75  # longer than usual clients keep idle connections, so that it is they who close them
CLOSING_SECONDS = 5  # at the end, for connections


def run(options: Options) -> None:
    """Serve until a signal.

    Raises:
        CheckpointError, DataError: the export cannot be used.
        SpecError: its texts do not fit into memory, there is no GPU as wanted, the metrics port is taken, or the key
            cannot be sent.
        LaunchError: the port is taken or not allowed.
    """
    asyncio.run(_run(options))


async def _run(options: Options) -> None:
    name, created = _named(options.export)
    metrics = Metrics(rank=0, port=options.metrics_port, process="server", setting="--metrics-port")
    thread = None
    try:
        sockets = [_listening(options.host, options.port)]
        thread = EngineThread(lambda: _loaded(options, name), metrics, options.max_waiting)
        key = _key()
        service = Service(thread, metrics, name, created, key, options.timeout, BODY_BYTES)
        config = uvicorn.Config(
            app_of(service),
            log_level="warning",
            access_log=False,
            lifespan="off",
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=CLOSING_SECONDS,
        )
        host, port = sockets[0].getsockname()[:2]
        access = "with the key in" if key else "without a key: anyone who reaches it may use it; set"
        _say(f"listening on http://{f'[{host}]' if ':' in host else host}:{port}/v1 {access} {KEY_VARIABLE}")
        server = Server(config, service, options.grace)
        signal.signal(signal.SIGUSR1, server.announce)
        await server.serve(sockets)
        if thread.engine is None and thread.failure is not None:
            raise thread.failure
    finally:
        if thread is not None:
            thread.close()
        metrics.close()


class Server(uvicorn.Server):
    """Ends when the last answer is complete, or the time for that is up."""

    def __init__(self, config: uvicorn.Config, service: Service, grace: float) -> None:
        super().__init__(config)
        self._service, self._grace = service, grace
        self._until: float | None = None
        self._is_ready = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The handler of SIGTERM and SIGINT, which uvicorn installs. A second one ends at once."""
        if self._service.draining:
            self.should_exit = self.force_exit = True
        self._service.draining = True

    def announce(self, sig: int, frame: FrameType | None) -> None:
        """The handler of SIGUSR1."""
        self._service.leaving = True

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second."""
        service, now = self._service, time.monotonic()
        if service.state == "ready" and not self._is_ready:
            self._is_ready = True
            _say(f"ready: model {service.model}")
        if service.draining and self._until is None:
            self._until = now + self._grace
            _say(f"ending, with {service.answering} requests in progress")
        ended = self._until is not None and (not service.answering or now >= self._until)
        if ended or (service.thread.engine is None and service.thread.failure is not None):
            self.should_exit = True
        return await super().on_tick(counter)


def _loaded(options: Options, name: str) -> tuple[Engine, Reader]:
    """The engine and what makes its texts of requests; in the thread of the engine."""
    device = _device(options.device)
    model, tokenizer = load(options.export, device, options.weights)
    length = options.length or _trained_length(options.export)
    taken = memory.check(model, options.rows, length)
    count = sum(parameter.count for parameter in parameters(model.spec))
    held = sum(tensor.nbytes for tensor in model.state_dict().values())
    _say(
        f"{name}: {count:,} parameters, {held / memory.MIB:,.0f} MiB, on {device}; {options.rows} texts at the "
        f"same time of at most {length} tokens, whose states take {taken / memory.MIB:,.0f} MiB"
    )
    engine = Engine(model, tokenizer, rows=options.rows, length=length)
    engine.submit([tokenizer.eod_id], Sampling(max_tokens=min(4, length - 1)))
    engine.run()  # what the first pass has to set up is not in anyone's answer
    asking: Asking | DataError
    try:
        asking = Asking(options.export)
    except DataError as error:
        asking = error
    return engine, Reader(name, tokenizer, asking, model.spec.vocab_size, length)


def _key() -> str:
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if key and not re.fullmatch("[ -~]+", key):
        raise SpecError(f"{KEY_VARIABLE} has characters that clients cannot send; use printable ASCII")
    return key


def _device(wanted: Device) -> torch.device:
    if wanted == "cuda" and not torch.cuda.is_available():
        raise SpecError("--device is cuda but this machine has no usable GPU; write auto or cpu")
    return torch.device("cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu")


def _named(export: Path) -> tuple[str, int]:
    """Name of the model, and when it was exported."""
    manifest = export / MANIFEST
    try:
        return str(json.loads(manifest.read_bytes())["name"]), int(manifest.stat().st_mtime)
    except (OSError, ValueError, LookupError, TypeError):
        raise CheckpointError(f"{manifest}: not there or damaged; give the folder of an exported model") from None


def _trained_length(export: Path) -> int:
    """Tokens of the longest text of the training, from the folder for transformers, or the manifest of an export
    without one (trainer/quantise.py)."""
    for file in (export / TRANSFORMERS / "config.json", export / MANIFEST):
        try:
            return int(json.loads(file.read_bytes())["max_position_embeddings"]) or LENGTH
        except (OSError, ValueError, LookupError, TypeError):
            continue
    return LENGTH


def _listening(host: str, port: int) -> socket.socket:
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=2048)
    except OSError as error:
        why = in_words(error).partition(" (while")[0]
        raise LaunchError(f"cannot listen on {host}, port {port} ({why}); choose others: --host, --port") from None


def _say(line: str) -> None:
    print(line, flush=True)
