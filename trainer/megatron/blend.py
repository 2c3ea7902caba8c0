"""The token files of a run as Megatron's blend: our shards are its format, so that nothing is converted.

Imports no torch.
"""

from __future__ import annotations

from pathlib import Path

from trainer.data.enough import Amount, no_tokens, refuse_too_little, stages_of
from trainer.data.manifest import Manifest, Split
from trainer.data.mixture import Mixture
from trainer.errors import SpecError
from trainer.spec import TokensSpec, TrainSpec


def blend(spec: TrainSpec, shards: Manifest) -> dict[str, list[str] | None]:
    """The content of a file for --per-split-data-args-path: weight, path without suffix, and so on, by split.

    The weight of a source is shared by its files in proportion to their tokens. There is no held-out text without
    `evaluate.every_steps`.

    Raises:
        DataError: a source has no tokens, or not enough for its `max_epochs`.
        SpecError: a source trains on answers only.
    """
    tokens = spec.tokens
    for name in tokens.mix:
        if any(entry.path.endswith(".answers") for entry in shards.select(name)):
            raise SpecError(
                f"source {name} trains on answers only, but Megatron's GPT on all tokens; use train.engine yaongi"
            )
    amounts = {name: Amount(shards.counts(name, "train").tokens, 0) for name in tokens.mix}
    if empty := [name for name, amount in amounts.items() if not amount.tokens]:
        raise no_tokens(empty[0])
    mixture = Mixture(list(tokens.mix), stages_of(tokens.mix, ()))
    refuse_too_little(mixture, tokens.mix, amounts, spec.steps * spec.batch.tokens_per_step)
    # Of no samples Megatron would still build an index.
    heldout = _files(tokens, shards, "heldout") if spec.evaluate.every_steps else []
    return {"train": _files(tokens, shards, "train"), "valid": heldout or None, "test": None}


def trained(spec: TrainSpec, step: int) -> dict[str, int]:
    """Tokens by source after `step` steps: Megatron draws rows by the weights, within a row of them at any time."""
    tokens = step * spec.batch.tokens_per_step
    return {name: round(source.weight * tokens) for name, source in spec.tokens.mix.items()}


def _files(tokens: TokensSpec, shards: Manifest, split: Split) -> list[str]:
    found = []
    for name, source in tokens.mix.items():
        files = [entry for entry in shards.select(name, split) if entry.tokens and entry.path.endswith(".bin")]
        total = sum(entry.tokens for entry in files)
        for entry in files:
            prefix = Path(tokens.shards) / entry.path.removesuffix(".bin")
            found += [f"{source.weight * entry.tokens / total:.9g}", str(prefix)]
    return found
