"""The verb `generate`: texts on stdout as they are written, what it took on stderr."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.data.chattemplate import Asking

if TYPE_CHECKING:  # they import torch
    from trainer.inference.engine import Engine
    from trainer.inference.sampling import Sampling
    from trainer.inference.text import Text
    from trainer.loading import Weights

MIB = 2**20


def generate(
    directory: Path, prompts: list[str], sampling: Sampling, *, chat: bool, drafts: bool, weights: Weights = "auto"
) -> None:
    """Print the continuation of each prompt, or the answer to it. A single one appears while it is written.

    Args:
        sampling: of the first prompt; each further one has the next seed.
        drafts: propose tokens by multi-token prediction; only for greedy texts.
        weights: how they are held in memory.

    Raises:
        SpecError: a value out of range, or not enough memory.
        CheckpointError, DataError: the export cannot be used.
    """
    from trainer.distributed import pick_device
    from trainer.generate import asked, continued
    from trainer.loading import load

    model, tokenizer = load(directory, pick_device("auto"), weights)
    ids, stops = asked(tokenizer, prompts, Asking(directory) if chat else None)
    stream, began = Stream(prompts[0], chat) if len(prompts) == 1 else None, time.monotonic()
    engines: list[Engine] = []

    def each(texts: list[Text], engine: Engine) -> None:
        if not engines:
            engines.append(engine)
            size, many = engine.cache.bytes / MIB, "s" if len(texts) > 1 else ""
            rows = f"{len(texts)} text{many} of up to {engine.length:,} tokens, {engine.rows} at a time"
            _note(f"{rows}: states of {size:,.1f} MiB")
        if stream:
            stream.show(texts[0])

    texts = continued(
        model,
        tokenizer,
        ids,
        replace(sampling, stop_ids=stops),
        sampling.seed,
        drafts=drafts,
        each=each,
    )
    for prompt, text in zip(prompts, texts, strict=True):
        print("" if stream else f"{prompt}\n{text.text}" if chat else prompt + text.text)
    written, seconds = sum(len(text.made) for text in texts), time.monotonic() - began
    _note(f"{written:,} tokens in {seconds:.1f} s, {written / seconds:,.1f} tokens/s")
    if drafts:
        engine = engines[0]
        _note(
            f"{engine.accepted} of {engine.proposed} proposals accepted"
            + (f" ({engine.accepted / engine.proposed:.0%})" if engine.proposed else "")
            + f", {engine.passes} passes"
        )


class Stream:
    """Writes a text to stdout as it grows."""

    def __init__(self, prompt: str, chat: bool) -> None:
        self._before = f"{prompt}\n" if chat else prompt
        self._shown = 0

    def show(self, text: Text) -> None:
        sys.stdout.write(self._before + text.text[self._shown :])
        self._before = ""
        sys.stdout.flush()
        self._shown = len(text.text)


def _note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
