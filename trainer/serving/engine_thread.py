"""The thread that runs the model, and how the event loop talks with it.

The engine belongs to this thread alone. The loop puts what it wants (a new call, a cancelled one) into an inbox, which
the thread empties between two passes; after each pass the thread hands all new pieces of all texts to the loop at once.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from trainer.errors import foreseen, in_words
from trainer.inference.engine import Engine
from trainer.inference.sampling import Sampling
from trainer.inference.text import Decoder, Ending, Text, TokenLogprobs
from trainer.recording.exporter import Metrics
from trainer.serving.parameters import Reader
from trainer.serving.refusal import Refusal, busy, failed, invalid

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Piece:
    """What is new of a text.

    Attributes:
        index: of the text in its call.
        logprobs: of the tokens that begin in `text` or earlier, with the place of their first character in the text.
        tokens: new ones, counted.
    """

    index: int
    text: str
    logprobs: list[tuple[int, TokenLogprobs]]
    tokens: int
    ended: Ending | None


@dataclass(eq=False)
class Call:
    """The texts of one request. Only the event loop reads and changes it, except `texts` (the thread)."""

    texts: list[tuple[list[int], Sampling]]
    began: float
    open: int = 0
    news: list[Piece] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    failure: Refusal | None = None

    async def pieces(self) -> list[Piece]:
        """What came since the last call of this, waiting until there is something.

        Raises:
            Refusal: `fail` was called.
        """
        await self.changed.wait()
        news, self.news = self.news, []
        if self.failure is None:
            self.changed.clear()
        elif not news:
            raise self.failure
        return news

    def fail(self, why: Refusal) -> None:
        """Let `pieces` raise this after the last piece."""
        self.failure = why
        self.changed.set()


class _Going:
    """A text of the engine, and what of it was handed over."""

    def __init__(self, call: Call, index: int, text: Text, engine: Engine) -> None:
        self.call, self.index, self.text = call, index, text
        self.shown = self.counted = self.given = 0
        self.at = call.began
        self.places: list[int] = []  # for log-probabilities: characters before each token
        self._decoder = Decoder(engine.tokenizer) if engine.tokenizer and text.sampling.logprobs is not None else None
        self._characters = 0

    def piece(self) -> Piece | None:
        text = self.text
        shown, count = text.text[self.shown :], len(text.ids) - text.num_prompt
        piece = Piece(self.index, shown, self._logprobs(count), count - self.counted, text.ended)
        self.shown += len(shown)
        self.counted = count
        return piece if piece.text or piece.logprobs or piece.tokens or piece.ended else None

    def _logprobs(self, count: int) -> list[tuple[int, TokenLogprobs]]:
        """Those of tokens whose text is out. What a stop string removed gets none."""
        if self._decoder is None:
            return []
        for token in self.text.ids[self.text.num_prompt + len(self.places) :]:
            self.places.append(self._characters)
            self._characters += len(self._decoder.push(token))
        whole = self.text.ended is not None and self._characters <= len(self.text.text)
        first = self.given
        while self.given < count and (whole or self.places[self.given] < len(self.text.text)):
            self.given += 1
        found = zip(self.places[first : self.given], self.text.logprobs[first : self.given], strict=True)
        return list(found)


class EngineThread:
    """
    Args:
        load: makes the engine and the reader of requests, in the thread.
        max_waiting: texts that may wait for a place beside others.

    Attributes:
        engine, reader: None as long as they are loaded.
        failure: why there is no engine any more.
        open: texts that have not ended.
        loaded: set when `engine` or `failure` is.
    """

    def __init__(self, load: Callable[[], tuple[Engine, Reader]], metrics: Metrics, max_waiting: int) -> None:
        self._load, self._metrics, self._max_waiting = load, metrics, max_waiting
        self.engine: Engine | None = None
        self.reader: Reader | None = None
        self.failure: Exception | None = None
        self.open = 0
        self.loaded = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._wake = threading.Condition()
        self._inbox: list[Callable[[Engine], None]] = []
        self._closing = False
        self._calls: set[Call] = set()
        self._going: dict[Text, _Going] = {}
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Texts beyond the places for running ones."""
        return max(0, self.open - self.engine.rows) if self.engine else 0

    def submit(self, texts: Sequence[tuple[list[int], Sampling]], began: float) -> Call:
        """Begin a call. Its `texts` were checked (Engine.check); `began`: reading of time.monotonic.

        Raises:
            Refusal: too many wait, or the engine has failed.
        """
        engine = self.engine
        assert engine is not None, "not loaded"
        if self.failure is not None:
            raise failed(in_words(self.failure))
        room = engine.rows + self._max_waiting
        if len(texts) > room:
            raise invalid("n", f"The request has {len(texts)} texts; this server takes {room} at a time.")
        if self.open + len(texts) > room:
            raise busy(self.waiting)
        call = Call(list(texts), began, open=len(texts))
        self._calls.add(call)
        self._count(len(texts))
        self._tell(lambda engine: self._begin(engine, call))
        return call

    def cancel(self, call: Call) -> None:
        """Stop the texts of a call that still run."""
        if call in self._calls:
            self._calls.discard(call)
            self._count(-call.open)
            call.open = 0
            self._tell(lambda engine: self._stop(call))

    def close(self) -> None:
        """End the thread after its current pass."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self.loaded.is_set():
            self._thread.join(timeout=10)

    # In the event loop

    def _count(self, change: int) -> None:
        self.open += change
        self._metrics.set("serve_waiting_texts", self.waiting)
        self._metrics.set("serve_running_texts", self.open - self.waiting)

    def _tell(self, wish: Callable[[Engine], None]) -> None:
        with self._wake:
            self._inbox.append(wish)
            self._wake.notify()

    def _is_loaded(self, engine: Engine, reader: Reader) -> None:
        self.engine, self.reader = engine, reader
        self._count(0)
        self.loaded.set()

    def _deliver(self, news: list[tuple[Call, Piece]]) -> None:
        for call, piece in news:
            if call not in self._calls:
                continue
            call.news.append(piece)
            call.changed.set()
            if piece.ended is not None:
                call.open -= 1
                self._count(-1)
                if not call.open:
                    self._calls.discard(call)

    def _fail(self, error: Exception) -> None:
        self.failure = error
        if self.engine is not None:  # else it is the reason why the process ends
            log.error("the engine has failed: %s", error, exc_info=error if foreseen(error) is None else None)
        self.loaded.set()
        for call in self._calls:
            call.fail(failed(in_words(error)))
            self._count(-call.open)
            call.open = 0
        self._calls.clear()

    # In the thread

    def _run(self) -> None:
        try:
            engine, reader = self._load()
            self._in_loop(self._is_loaded, engine, reader)
            while self._obey(engine):
                if engine.busy:
                    self._report(engine.step())
        except Exception as error:
            self._in_loop(self._fail, error)

    def _obey(self, engine: Engine) -> bool:
        """Do what the loop wants, waiting for it if there is nothing else to do; False: end."""
        with self._wake:
            while not (self._inbox or engine.busy or self._closing):
                self._wake.wait()
            wishes, self._inbox = self._inbox, []
        for wish in wishes:
            wish(engine)
        return not self._closing

    def _begin(self, engine: Engine, call: Call) -> None:
        for index, (prompt, sampling) in enumerate(call.texts):
            text = engine.submit(prompt, sampling)
            self._going[text] = _Going(call, index, text, engine)

    def _stop(self, call: Call) -> None:
        for text in [text for text, going in self._going.items() if going.call is call]:
            text.cancel()
            del self._going[text]

    def _report(self, changed: list[Text]) -> None:
        news, now = [], time.monotonic()
        for text in changed:
            going = self._going.get(text)
            if going is None:
                continue
            before = going.counted
            piece = going.piece()
            if piece is not None:
                self._measure(going, before, piece.tokens, now)
                news.append((going.call, piece))
            if text.ended is not None:
                del self._going[text]
        if news:
            self._in_loop(self._deliver, news)

    def _measure(self, going: _Going, before: int, tokens: int, now: float) -> None:
        metrics = self._metrics
        if not tokens:
            return
        metrics.add("serve_completion_tokens_total", tokens)
        first = before == 0
        if first:
            metrics.observe("serve_first_token_seconds", now - going.at)
        for _ in range(tokens - first):
            metrics.observe("serve_inter_token_seconds", (now - going.at) / tokens)
        going.at = now

    def _in_loop(self, function: Callable[..., None], *arguments: object) -> None:
        with suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(function, *arguments)
