"""Continue prompts with a model, all at once (trainer/inference)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

from trainer.data.chattemplate import Asking
from trainer.data.tokenizer import Tokenizer
from trainer.errors import SpecError
from trainer.inference import memory
from trainer.inference.engine import Engine
from trainer.inference.sampling import Sampling
from trainer.inference.text import Text
from trainer.model.hybrid import HybridModel

ROWS = 64  # texts at the same time, if they fit into memory; more of them wait


def generate(
    model: HybridModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    temperature: float,
    seed: int,
    stops: Collection[int],
) -> list[list[int]]:
    """At most `max_tokens` new ids per prompt, without the id of `stops` that ended it.

    Args:
        temperature: divides the logits; 0 selects the most likely token.
        seed: each prompt has its own generator, so its text does not depend on the other prompts.

    Raises:
        SpecError: a prompt is empty, as the model needs at least one token; or not even one text fits into memory.
    """
    sampling = Sampling(max_tokens, temperature, stop_ids=frozenset(stops))
    return [text.made for text in continued(model, None, prompts, sampling, seed)]


def complete(
    model: HybridModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_tokens: int,
    temperature: float,
    seed: int,
    asking: Asking | None = None,
) -> list[str]:
    """The text that follows each prompt, until the end of the document or `max_tokens`. Raises as `generate`.

    Args:
        asking: writes the prompts as questions of a chat; then the texts are the answers.
    """
    ids, stops = asked(tokenizer, prompts, asking)
    sampling = Sampling(max_tokens, temperature, stop_ids=stops)
    return [text.text for text in continued(model, tokenizer, ids, sampling, seed)]


def asked(
    tokenizer: Tokenizer, prompts: Sequence[str], asking: Asking | None
) -> tuple[list[list[int]], frozenset[int]]:
    """The ids of prompts, and those at which their texts end. `asking`: as in `complete`."""
    put = asking or (lambda prompt: tokenizer.begun(tokenizer.encode(prompt)))
    ids = [put(prompt) if prompt else [] for prompt in prompts]
    return ids, frozenset(asking.stops if asking else {tokenizer.eod_id})


def continued(
    model: HybridModel,
    tokenizer: Tokenizer | None,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling | Sequence[Sampling],
    seed: int | None = None,
    *,
    drafts: bool = False,
    each: Callable[[list[Text], Engine], None] | None = None,
) -> list[Text]:
    """The finished text of each prompt. Raises as `generate`.

    Args:
        sampling: of all prompts, or one for each.
        seed: that of the first prompt, increased by one for each further one; None: those of `sampling`.
        drafts: as in Engine.
        each: called before the first pass and after each one, with all texts.
    """
    if empty := [i for i, prompt in enumerate(prompts) if not prompt]:
        raise SpecError(f"prompt {empty[0] + 1} is empty; give it at least one character")
    if not prompts:
        return []
    samplings = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
    if seed is not None:
        samplings = [replace(one, seed=seed + i) for i, one in enumerate(samplings)]
    length = max(len(prompt) + s.max_tokens for prompt, s in zip(prompts, samplings, strict=True))
    rows = memory.fitting_rows(model, min(len(prompts), ROWS), length, drafts=drafts)
    engine = Engine(model, tokenizer, rows=rows, length=length, drafts=drafts)
    texts = [engine.submit(prompt, s) for prompt, s in zip(prompts, samplings, strict=True)]
    tell = each or (lambda texts, engine: None)
    tell(texts, engine)
    while engine.busy:
        engine.step()
        tell(texts, engine)
    return texts
