"""The HTTP side: paths, the API key, limits, streams, and what happens when a client leaves."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TypeVar

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trainer.errors import in_words
from trainer.recording.exporter import Metrics
from trainer.serving import refusal
from trainer.serving.answers import Answer, ChatAnswer, encoded, event
from trainer.serving.engine_thread import Call, EngineThread, Piece
from trainer.serving.parameters import Chat, Completion, Reader, read
from trainer.serving.refusal import Refusal

BODY_SECONDS = 30.0  # for a request to arrive
SENDING_SECONDS = 30.0  # for a client to take what is left of its answer
STREAM_HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
COMPLETIONS, CHAT, MODELS = "/v1/completions", "/v1/chat/completions", "/v1/models"
Asked = TypeVar("Asked", Completion, Chat)


@dataclass
class Service:
    """What the handlers work with.

    Attributes:
        created: of the model, Unix seconds.
        key: that clients must send; "": none.
        timeout: seconds for an answer, its wait included.
        body_bytes: of a request at most.
        leaving: connections are closed after each answer, because the process ends soon.
        draining: no new requests.
        answering: requests at the moment.
    """

    thread: EngineThread
    metrics: Metrics
    model: str
    created: int
    key: str
    timeout: float
    body_bytes: int
    leaving: bool = False
    draining: bool = False
    answering: int = 0

    @property
    def state(self) -> str:
        """ready, leaving, loading, draining or failed."""
        if self.thread.failure is not None:
            return "failed"
        if self.draining:
            return "draining"
        if self.thread.engine is None:
            return "loading"
        return "leaving" if self.leaving else "ready"

    def check_key(self, request: Request) -> None:
        """Raises Refusal if the request lacks the key."""
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if self.key and not hmac.compare_digest(given.encode(), self.key.encode()):
            raise refusal.unauthorized()

    def admitted(self, request: Request) -> Reader:
        """
        Raises:
            Refusal: the key is wrong, or the server takes no requests now.
        """
        self.check_key(request)
        if self.thread.failure is not None:
            raise refusal.failed(in_words(self.thread.failure))
        if self.draining or self.thread.reader is None:
            raise refusal.not_ready(self.state)
        return self.thread.reader

    async def body(self, request: Request) -> bytes:
        """
        Raises:
            Refusal: it is too large or too slow.
        """
        data = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for chunk in request.stream():
                    data += chunk
                    if len(data) > self.body_bytes:
                        raise refusal.body_too_large(self.body_bytes)
        except TimeoutError:
            raise Refusal(408, "The request took too long to arrive.", code="request_timeout") from None
        return bytes(data)


def app_of(service: Service) -> ASGIApp:
    app = FastAPI(title="yaongi", openapi_url=None)  # its pages would load scripts from elsewhere

    @app.get("/health")
    async def health() -> Response:
        return _state(service, bad=("failed",))

    @app.get("/ready")
    async def ready() -> Response:
        return _state(service, bad=("failed", "loading", "draining", "leaving"))

    @app.get(MODELS)
    async def models(request: Request) -> Response:
        service.check_key(request)
        return _json({"object": "list", "data": [_model(service)]})

    @app.get(f"{MODELS}/{{name:path}}")
    async def model(request: Request, name: str) -> Response:
        service.check_key(request)
        if name != service.model:
            raise refusal.no_such_model(name)
        return _json(_model(service))

    @app.post(COMPLETIONS)
    async def completions(request: Request) -> Response:
        return await _generation(service, request, Completion)

    @app.post(CHAT)
    async def chat(request: Request) -> Response:
        return await _generation(service, request, Chat)

    @app.exception_handler(Refusal)
    async def refused(request: Request, error: Refusal) -> Response:
        return _refused(service, error)

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> Response:
        return _refused(service, Refusal(error.status_code, f"{request.method} {request.url.path}: {error.detail}."))

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=499)  # nobody reads it

    @app.exception_handler(Exception)
    async def fault(request: Request, error: Exception) -> Response:
        return _refused(service, Refusal(500, "A bug in this server; its log has more.", kind=refusal.SERVER))

    return Watched(app, service)


class Watched:
    """Counts and times requests, and closes connections when the process is about to end."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            await self._app(scope, receive, send)
            return
        service, began, status = self._service, time.monotonic(), 499

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if service.leaving or service.draining:
                    message["headers"] = [*message["headers"], (b"connection", b"close")]
            await send(message)

        service.answering += 1
        try:
            await self._app(scope, receive, watched)
        finally:
            service.answering -= 1
            path = scope["path"] if scope["path"] in (COMPLETIONS, CHAT, MODELS) else "other"
            service.metrics.add("serve_requests_total", path=path, code=str(status))
            if path in (COMPLETIONS, CHAT) and status == 200:
                service.metrics.observe("serve_request_seconds", time.monotonic() - began)


async def _generation(service: Service, request: Request, kind: type[Asked]) -> Response:
    began = time.monotonic()
    reader = service.admitted(request)
    asked = read(kind, await service.body(request))
    # Tokenising a long prompt takes a while.
    make, of = (reader.chat, ChatAnswer) if isinstance(asked, Chat) else (reader.completion, Answer)
    texts = await asyncio.to_thread(make, asked)
    prompts = sum(len(prompt) for prompt, _ in texts[:: asked.n or 1])
    call = service.thread.submit(texts, began)
    service.metrics.add("serve_prompt_tokens_total", prompts)
    logprobs = texts[0][1].logprobs is not None
    answer = of(service.model, reader.tokenizer, prompts, logprobs, usage=asked.include_usage)
    return Generation(service, call, answer, streamed=bool(asked.stream))


class Generation(Response):
    """Sends an answer while it is made. If the client leaves, or time is up, its texts are cancelled."""

    def __init__(self, service: Service, call: Call, answer: Answer, *, streamed: bool) -> None:
        super().__init__()
        self._service, self._call, self._answer, self._streamed = service, call, answer, streamed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        call, service = self._call, self._service
        left = call.began + service.timeout - time.monotonic()
        alarm = asyncio.get_running_loop().call_later(left, call.fail, refusal.timed_out(service.timeout))
        work = asyncio.create_task((self._stream if self._streamed else self._whole)(scope, receive, send))
        gone = asyncio.create_task(_gone(receive))
        try:
            # A client that does not read its answer gets some time more.
            await asyncio.wait({work, gone}, timeout=left + SENDING_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        finally:
            alarm.cancel()
            service.thread.cancel(call)
            for task in (work, gone):
                task.cancel()
            await asyncio.wait({work, gone})
        if not work.cancelled():
            work.result()

    async def _whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            response = _json(self._answer.whole([piece async for news in self._news() for piece in news]))
        except Refusal as error:
            response = _refused(self._service, error)
        await response(scope, receive, send)

    async def _stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Nothing is sent before the first piece, so that what goes wrong until then has a status of its own."""
        begun = False
        try:
            async for news in self._news():
                events = [*self._answer.events(news)]
                if not begun:
                    events = [*self._answer.begin(len(self._call.texts)), *events]
                    await send({"type": "http.response.start", "status": 200, "headers": STREAM_HEADERS})
                    begun = True
                if events:
                    await send({"type": "http.response.body", "body": b"".join(events), "more_body": True})
            last = b"".join(self._answer.end())
        except Refusal as error:
            response = _refused(self._service, error)
            if not begun:
                await response(scope, receive, send)
                return
            last = event(error.body)
        await send({"type": "http.response.body", "body": last})

    async def _news(self) -> AsyncIterator[list[Piece]]:
        """The pieces until all texts have ended. Raises Refusal."""
        left = len(self._call.texts)
        while left:
            news = await self._call.pieces()
            left -= sum(piece.ended is not None for piece in news)
            yield news


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _json(value: object, status: int = 200) -> Response:
    return Response(encoded(value), status, media_type="application/json")


def _refused(service: Service, error: Refusal) -> Response:
    service.metrics.add("serve_refused_total", reason=error.reason)
    # ASCII, as a name in the message may contain what is not UTF-8.
    return Response(json.dumps(error.body), error.status, error.headers, media_type="application/json")


def _state(service: Service, bad: tuple[str, ...]) -> Response:
    return _json({"status": service.state}, 503 if service.state in bad else 200)


def _model(service: Service) -> dict[str, object]:
    return {"id": service.model, "object": "model", "created": service.created, "owned_by": "yaongi"}
