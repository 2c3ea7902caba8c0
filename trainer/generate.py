"""Sampling text from a model by running the whole sequence again for every token.

Cost is quadratic in the length, so it is only for samples of some hundred tokens; without a cache, no cache can be
wrong. Prompts run as one batch: rows are padded on the right, which causal layers do not see.

Legend: B prompts, T positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from trainer.data.chattemplate import Asking
from trainer.data.tokenizer import Tokenizer
from trainer.errors import SpecError
from trainer.model.hybrid import HybridModel


@torch.inference_mode()
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
        SpecError: a prompt is empty; the model needs at least one token.
    """
    if empty := [i for i, prompt in enumerate(prompts) if not prompt]:
        raise SpecError(f"prompt {empty[0] + 1} is empty; give it at least one character")
    device = next(model.parameters()).device
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
    rows = [list(prompt) for prompt in prompts]
    running = list(range(len(rows)))
    for _ in range(max_tokens):
        if not running:
            break
        logits_BV = _next_logits([rows[i] for i in running], model, device)
        tokens = [_draw(logits_V, temperature, generators[i]) for i, logits_V in zip(running, logits_BV, strict=True)]
        for i, token in zip(running, tokens, strict=True):
            rows[i].append(token)
        running = [i for i in running if rows[i][-1] not in stops]
    made = [row[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]
    return [row[:-1] if row and row[-1] in stops else row for row in made]


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
    put = asking or (lambda prompt: tokenizer.begun(tokenizer.encode(prompt)))
    made = generate(
        model,
        [put(prompt) if prompt else [] for prompt in prompts],
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        stops=asking.stops if asking else {tokenizer.eod_id},
    )
    return [tokenizer.decode_part(ids) for ids in made]  # the last token may be a partial character


def _next_logits(rows: list[list[int]], model: HybridModel, device: torch.device) -> Tensor:
    """fp32 logits on the CPU of the token after each row, [B, V]."""
    lengths = torch.tensor([len(row) for row in rows])
    ids_BT = torch.zeros(len(rows), int(lengths.max()), dtype=torch.int64)
    for i, row in enumerate(rows):
        ids_BT[i, : len(row)] = torch.tensor(row)
    ids_BT = ids_BT.to(device)
    logits_BTV = model(ids_BT, torch.zeros_like(ids_BT, dtype=torch.int32), None).logits_BTV
    return logits_BTV[torch.arange(len(rows), device=device), lengths.to(device) - 1].float().cpu()


def _draw(logits_V: Tensor, temperature: float, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits_V.argmax())
    return int(torch.multinomial((logits_V / temperature).softmax(-1), 1, generator=generator))
