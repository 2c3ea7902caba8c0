"""The texts that our model writes for benchmarks."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from trainer.data.chat import CHATML
from trainer.data.chattemplate import Asking
from trainer.data.tokenizer import Tokenizer
from trainer.files import read_object
from trainer.generate import continued
from trainer.inference.engine import Engine
from trainer.inference.sampling import Sampling
from trainer.inference.text import Text
from trainer.model.hybrid import HybridModel

log = logging.getLogger(__name__)

TELL_SECONDS = 60.0
Autocast = Callable[[], AbstractContextManager[Any]]


class Writer:
    """
    Args:
        ends: ids that end a text.
        autocast: makes the context of the forward passes.
    """

    def __init__(
        self, model: HybridModel, tokenizer: Tokenizer, ends: Collection[int], autocast: Autocast = nullcontext
    ) -> None:
        self._model, self._tokenizer, self._ends, self._autocast = model, tokenizer, frozenset(ends), autocast
        self._special = {n for n, size in enumerate(tokenizer.byte_lengths()) if size == 0}

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        temperature: float = 0.0,
        until: Sequence[str] = (),
        seed: int = 0,
        **filters: Any,
    ) -> list[str]:
        """What follows each prompt: at most `max_tokens`, up to the first of the strings `until`, without special
        tokens. Prompt n draws with the seed `seed` + n.

        Args:
            filters: further fields of `Sampling`, such as top_p.

        Raises:
            SpecError: the states of not even one text fit into memory, or a filter is out of range.
        """
        stop, told = tuple(text for text in until if text), Teller(len(prompts))

        def each(texts: list[Text], engine: Engine) -> None:
            told.done(len(texts) - len(engine.waiting) - engine.running - told.count)

        sampling = Sampling(max_tokens, temperature, stop=stop, stop_ids=self._ends, **filters)
        with self._autocast():
            texts = continued(self._model, self._tokenizer, prompts, sampling, seed, each=each)
        return [cut(self._tokenizer.decode([i for i in t.made if i not in self._special]), stop) for t in texts]


def stops(folder: Path, tokenizer: Tokenizer, asking: Asking | None = None) -> set[int]:
    """The ids that end a text: as generation_config.json beside the tokenizer says, else the end of a document and of a
    turn in our own markup; with a chat template also the end of its answers."""
    found = read_object(folder / "generation_config.json").get("eos_token_id")
    ends = {found} if isinstance(found, int) else set(found) if isinstance(found, list) else set[int]()
    if not ends and (turn := tokenizer.markup.get(CHATML.end)) is not None:
        ends = {turn}
    return ends | {tokenizer.eod_id} | (asking.stops if asking else set())


def cut(text: str, until: Sequence[str]) -> str:
    """The text before the first of the strings."""
    return min((text.split(stop)[0] for stop in until if stop), key=len, default=text)


class Teller:
    """Logs progress once a minute.

    Attributes:
        count: what has been done.
    """

    def __init__(self, total: int) -> None:
        self._total, self.count, self._at = total, 0, time.monotonic()

    def done(self, number: int) -> None:
        self.count += number
        if time.monotonic() - self._at > TELL_SECONDS:
            self._at = time.monotonic()
            log.info("  %s of %s", f"{self.count:,}", f"{self._total:,}")
