"""The texts that our model writes for benchmarks."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from trainer.data.chat import CHATML
from trainer.data.chattemplate import Asking
from trainer.data.tokenizer import Tokenizer
from trainer.generate import ROWS
from trainer.inference import memory
from trainer.inference.engine import Engine
from trainer.inference.sampling import Sampling
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
        if not prompts:
            return []
        length = max(map(len, prompts)) + max_tokens
        rows = memory.fitting_rows(self._model, min(len(prompts), ROWS), length)
        engine = Engine(self._model, self._tokenizer, rows=rows, length=length)
        stop = tuple(text for text in until if text)
        texts = [
            engine.submit(
                prompt, Sampling(max_tokens, temperature, seed=seed + n, stop=stop, stop_ids=self._ends, **filters)
            )
            for n, prompt in enumerate(prompts)
        ]
        told = Teller(len(texts))
        with self._autocast():
            while engine.busy:
                told.done(sum(text.ended is not None for text in engine.step()))
        return [cut(self._tokenizer.decode([i for i in t.made if i not in self._special]), stop) for t in texts]


def stops(folder: Path, tokenizer: Tokenizer, asking: Asking | None = None) -> set[int]:
    """The ids that end a text: as generation_config.json beside the tokenizer says, else the end of a document and of a
    turn in our own markup; with a chat template also the end of its answers."""
    found = read_object(folder / "generation_config.json").get("eos_token_id")
    ends = {found} if isinstance(found, int) else set(found) if isinstance(found, list) else set[int]()
    if not ends and (turn := tokenizer.markup.get(CHATML.end)) is not None:
        ends = {turn}
    return ends | {tokenizer.eod_id} | (asking.stops if asking else set())


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if there is none."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def cut(text: str, until: Sequence[str]) -> str:
    """The text before the first of the strings."""
    return min((text.split(stop)[0] for stop in until if stop), key=len, default=text)


class Teller:
    """Logs progress once a minute."""

    def __init__(self, total: int) -> None:
        self._total, self._done, self._at = total, 0, time.monotonic()

    def done(self, number: int) -> None:
        self._done += number
        if time.monotonic() - self._at > TELL_SECONDS:
            self._at = time.monotonic()
            log.info("  %s of %s", f"{self._done:,}", f"{self._total:,}")
