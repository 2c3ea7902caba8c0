"""Memory of texts that are generated: what each kind of layer keeps of them (`Kind.cached`). Imports no torch."""

from __future__ import annotations

from trainer.kinds.base import INDEX_BYTES, Kind
from trainer.modelspec import ModelSpec


def cached_sections(spec: ModelSpec, *, drafts: bool = False) -> list[Kind]:
    """The section of each sublayer that runs in generation, in order.

    Args:
        drafts: including the first module of multi-token prediction, which proposes tokens.
    """
    ahead = [spec.section(symbol) for symbol in spec.mtp.layer] if drafts and spec.mtp else []
    return [*(section for _, section in spec.trunk()), *ahead]


def cache_bytes(spec: ModelSpec, length: int, activation_bytes: int, *, drafts: bool = False) -> int:
    """Bytes of one text of at most `length` tokens. `activation_bytes`: of a number of the activations."""
    size = {"activation": activation_bytes, "fp32": 4, "int64": INDEX_BYTES}
    sections = cached_sections(spec, drafts=drafts)
    return sum(cached.count(length) * size[cached.dtype] for s in sections for cached in s.cached(spec))
