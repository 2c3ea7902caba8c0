"""Architecture of the model: a list of layers and a section for each kind of sublayer. Imports no torch.

A layer is a short string of sublayers that run in order, each with its own pre-norm and residual:
`M` Mamba-2 · `E` mixture of experts · `*` grouped-query attention · `-` MLP · `N` Engram n-gram memory.
So `ME` is a Mamba-2 mixer followed by experts, `*-` attention followed by an MLP. A kind's properties are in its file
in trainer/kinds; the fields of `ModelSpec` that are kinds form their registry.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Self, get_args

from pydantic import Field, model_validator

from trainer.kinds.attention import AttentionSpec
from trainer.kinds.base import Count, K, Kind, Parameter, PlacedKind
from trainer.kinds.engram import EngramSpec
from trainer.kinds.mamba2 import MambaSpec
from trainer.kinds.mlp import MlpSpec
from trainer.kinds.moe import MoeSpec
from trainer.lora import LoraSpec, plain
from trainer.specbase import Spec


class MtpSpec(Spec):
    """Multi-token prediction (DeepSeek-V3, arXiv 2412.19437 §2.2): module k predicts the token k + 1 places ahead.

    Each module has one layer of its own; embedding and head are the model's. All modules share the weight λ (`weight`).
    """

    depth: Count = 1
    weight: Annotated[float, Field(ge=0)] = 0.3
    layer: str = "*E"


class MupSpec(Spec):
    """μP (trainer/mup.py): init_std and learning rates were found at `base_hidden` and are scaled to the true widths.

    Without `base_head_dim`, the head width is that of the base model.
    """

    base_hidden: Count
    base_head_dim: Count | None = None


class ModelSpec(Spec):
    # The registry of kinds: any field `…Spec | None` of a Kind, or list of a PlacedKind, registers its kind.
    kinds: ClassVar[dict[str, type[Kind]]]  # by symbol
    section_names: ClassVar[dict[str, str]]  # symbol → field

    vocab_size: Annotated[int, Field(gt=0, le=2**31)]  # ids are stored as at most int32
    hidden: Count
    layers: list[str]
    mamba: MambaSpec | None = None
    attention: AttentionSpec | None = None
    moe: MoeSpec | None = None
    mlp: MlpSpec | None = None
    engram: list[EngramSpec] = []
    mtp: MtpSpec | None = None
    mup: MupSpec | None = None
    lora: LoraSpec | None = None
    norm_eps: Annotated[float, Field(gt=0)] = 1e-5
    init_std: Annotated[float, Field(gt=0)] = 0.02
    tied_embedding: bool = False  # the LM head's rows are the embedding's

    @model_validator(mode="after")
    def _layers_are_defined(self) -> Self:
        if not self.layers:
            raise ValueError("layers is empty; give at least one, for example [ME]")
        named = {f"layer {index}": layer for index, layer in enumerate(self.layers)}
        if self.mtp:
            named["mtp.layer"] = self.mtp.layer
        for name, layer in named.items():
            if not layer or set(layer) - set(self.kinds):
                known = ", ".join(f"{symbol} ({name})" for symbol, name in self.section_names.items())
                raise ValueError(f"{name} is '{layer}'; sublayers are {known}")
        for symbol, kind in self.kinds.items():
            if issubclass(kind, PlacedKind):
                self._check_places(symbol, kind)
            elif any(symbol in layer for layer in named.values()) and not self.sections(kind):
                raise ValueError(
                    f"layers use '{symbol}' but the section '{self.section_names[symbol]}' is missing; add it"
                )
        return self

    @model_validator(mode="after")
    def _adapters_have_a_place(self) -> Self:
        if self.lora is None:
            return self
        if self.mtp:
            raise ValueError("lora trains only adapters, but mtp needs its own modules trained; remove one of them")
        known = self.adaptable()
        for section, names in (self.lora.targets or {}).items():
            if section not in known:
                raise ValueError(
                    f"lora.targets names '{section}'; sections with matrices for adapters are {', '.join(known)}"
                )
            if unknown := [name for name in names if name not in known[section]]:
                raise ValueError(
                    f"lora.targets.{section} names '{unknown[0]}'; matrices there are {', '.join(known[section])}"
                )
        largest = max((min(matrix.shape[-2:]) for matrix in self._adapted()), default=self.lora.rank)
        if self.lora.rank > largest:
            raise ValueError(
                f"lora.rank {self.lora.rank} is above the smaller side of every matrix with adapters, {largest} at "
                "most; lower it, or train the matrices themselves (without lora)"
            )
        return self

    def _adapted(self) -> Iterator[Parameter]:
        """The matrices that have adapters."""
        assert self.lora is not None
        for symbol, name in self.section_names.items():
            for section in self.sections(self.kinds[symbol]):
                yield from (p for p in section.adaptable(self) if self.lora.takes(name, plain(p.name)))

    def adaptable(self) -> dict[str, list[str]]:
        """Names of matrices that may have adapters, by section."""
        found = {
            name: list(
                dict.fromkeys(plain(p.name) for s in self.sections(self.kinds[symbol]) for p in s.adaptable(self))
            )
            for symbol, name in self.section_names.items()
        }
        return {name: matrices for name, matrices in found.items() if matrices}

    def _check_places(self, symbol: str, kind: type[PlacedKind]) -> None:
        name = self.section_names[symbol]
        if self.mtp and symbol in self.mtp.layer:
            raise ValueError(
                f"mtp.layer is '{self.mtp.layer}', but {kind.label} belongs to a place in layers; drop {symbol}"
            )
        using = {i for i, layer in enumerate(self.layers) if symbol in layer}
        described = [section.layer for section in self.sections(kind)]
        if sorted(described) != sorted(using) or any(layer.count(symbol) > 1 for layer in self.layers):
            raise ValueError(
                f"layers with '{symbol}' are {sorted(using)} but {name} describes {sorted(described)}; "
                f"give exactly one {name} entry for each such layer"
            )

    def sections(self, kind: type[K]) -> list[K]:
        """All sections of a kind; at most one unless the kind is per layer."""
        given = getattr(self, self.section_names[kind.symbol])
        return given if isinstance(given, list) else [] if given is None else [given]

    def section(self, symbol: str, layer: int | None = None) -> Kind:
        """The section of a sublayer; `layer` is the layer's number, None in multi-token prediction."""
        return next(s for s in self.sections(self.kinds[symbol]) if not isinstance(s, PlacedKind) or s.layer == layer)

    def trunk(self) -> Iterator[tuple[str, Kind]]:
        """Yield the place `layer.index` and the section of every sublayer, in order."""
        for index, layer in enumerate(self.layers):
            for place, symbol in enumerate(layer):
                yield f"{index}.{place}", self.section(symbol, index)

    def used(self) -> list[Kind]:
        """The sections of all sublayers, including multi-token prediction, each once."""
        ahead = [self.section(symbol) for symbol in self.mtp.layer] if self.mtp else []
        return list({id(section): section for section in [*(section for _, section in self.trunk()), *ahead]}.values())

    @property
    def mtp_factor(self) -> float:
        """The factor of each module's part of the training loss: λ / depth."""
        return self.mtp.weight / self.mtp.depth if self.mtp else 0.0

    @property
    def num_sublayers(self) -> int:
        return sum(len(layer) for layer in self.layers)

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        cls.register()

    @classmethod
    def register(cls) -> None:
        """Note the kinds among the fields."""
        found = [
            (name, inner)
            for name, field in cls.model_fields.items()
            for inner in get_args(field.annotation)
            if isinstance(inner, type) and issubclass(inner, Kind)
        ]
        cls.section_names = {kind.symbol: name for name, kind in found}
        cls.kinds = {kind.symbol: kind for _, kind in found}


ModelSpec.register()
