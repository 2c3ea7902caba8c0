"""Shape of the model: a table of layers and the widths of each kind of sublayer. Imports no torch.

A layer is a short string of sublayers that run in order, each with its own pre-norm and residual:
`M` Mamba-2 · `E` mixture of experts · `*` grouped-query attention · `-` squared-ReLU MLP · `N` Engram n-gram memory.
So `ME` is a Mamba-2 mixer followed by experts, `*-` attention followed by an MLP.
"""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from trainer.specbase import Spec

SUBLAYERS = {"M": "mamba", "E": "moe", "*": "attention", "-": "mlp", "N": "engram"}

Count = Annotated[int, Field(gt=0)]


class MambaSpec(Spec):
    """Mamba-2 mixer (Dao & Gu 2024): d_inner = num_heads · head_dim."""

    num_heads: Count
    head_dim: Count = 64
    d_state: Count = 128
    num_groups: Count = 1
    conv_kernel: Count = 4
    chunk_size: Count = 128

    @property
    def d_inner(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def conv_dim(self) -> int:
        """Channels of the causal convolution: x, B and C."""
        return self.d_inner + 2 * self.num_groups * self.d_state

    @model_validator(mode="after")
    def _groups_divide(self) -> Self:
        if self.num_heads % self.num_groups:
            raise ValueError(f"num_heads {self.num_heads} must be a multiple of num_groups {self.num_groups}")
        return self


class AttentionSpec(Spec):
    """Grouped-query attention; no position embedding unless `rope_theta` is given."""

    num_heads: Count
    num_kv_heads: Count
    head_dim: Count = 64
    rope_theta: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} must be a multiple of num_kv_heads {self.num_kv_heads}")
        if self.rope_theta is not None and self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} must be even, as rope_theta turns pairs of channels")
        return self


class MoeSpec(Spec):
    """Routed experts with sigmoid scores; balanced by a bias on the choice and a small sequence loss."""

    num_experts: Count
    top_k: Count
    expert_width: Count
    shared_width: Annotated[int, Field(ge=0)] = 0
    score_scale: Annotated[float, Field(gt=0)] = 2.5
    bias_update_rate: Annotated[float, Field(ge=0)] = 1e-3
    sequence_loss_weight: Annotated[float, Field(ge=0)] = 1e-4

    @model_validator(mode="after")
    def _top_k_fits(self) -> Self:
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k {self.top_k} exceeds num_experts {self.num_experts}; lower top_k")
        if self.top_k == 1 and self.num_experts > 1:
            raise ValueError("top_k 1 gives the router no gradient (one renormalised weight is always 1); raise it")
        return self


class MlpSpec(Spec):
    width: Count


class EngramSpec(Spec):
    """Hashed n-gram memory (arXiv 2601.07372) of one layer: orders 2..max_order, `num_heads` tables for each."""

    layer: Annotated[int, Field(ge=0)]
    max_order: Annotated[int, Field(ge=2, le=8)] = 3
    rows_per_head: Count
    width_per_order: Count
    num_heads: Count = 8
    conv_kernel: Count = 4
    compress_tokens: bool = True

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.width_per_order % self.num_heads:
            raise ValueError(f"width_per_order {self.width_per_order} must be a multiple of num_heads {self.num_heads}")
        return self

    @property
    def d_mem(self) -> int:
        return (self.max_order - 1) * self.width_per_order


class MtpSpec(Spec):
    """Multi-token prediction (DeepSeek-V3, arXiv 2412.19437 §2.2): module k predicts the token k + 1 places ahead.

    Each module is one layer of its own; embedding and head are the model's. `weight` λ is shared by the modules.
    """

    depth: Count = 1
    weight: Annotated[float, Field(ge=0)] = 0.3
    layer: str = "*E"


class MupSpec(Spec):
    """μP (trainer/mup.py): init_std and learning rates were found at `base_hidden` and are scaled to the true widths.

    Without `base_head_dim`, heads are as wide here as they were there.
    """

    base_hidden: Count
    base_head_dim: Count | None = None


class ModelSpec(Spec):
    vocab_size: Annotated[int, Field(gt=0, le=2**31)]  # ids are stored in at most 32 bits, with sign
    hidden: Count
    layers: list[str]
    mamba: MambaSpec | None = None
    attention: AttentionSpec | None = None
    moe: MoeSpec | None = None
    mlp: MlpSpec | None = None
    engram: list[EngramSpec] = []
    mtp: MtpSpec | None = None
    mup: MupSpec | None = None
    norm_eps: Annotated[float, Field(gt=0)] = 1e-5
    init_std: Annotated[float, Field(gt=0)] = 0.02

    @model_validator(mode="after")
    def _layers_are_defined(self) -> Self:
        if not self.layers:
            raise ValueError("layers is empty; give at least one, for example [ME]")
        named = {f"layer {index}": layer for index, layer in enumerate(self.layers)}
        if self.mtp:
            named["mtp.layer"] = self.mtp.layer
            if "N" in self.mtp.layer:
                raise ValueError(f"mtp.layer is '{self.mtp.layer}', but Engram belongs to a place in layers; drop N")
        for name, layer in named.items():
            if not layer or set(layer) - set(SUBLAYERS):
                known = ", ".join(f"{k} ({v})" for k, v in SUBLAYERS.items())
                raise ValueError(f"{name} is '{layer}'; sublayers are {known}")
        used = set("".join(named.values()))
        for symbol in sorted(used - {"N"}):
            name = SUBLAYERS[symbol]
            if getattr(self, name) is None:
                raise ValueError(f"layers use '{symbol}' but the section '{name}' is missing; add it")
        with_engram = {i for i, layer in enumerate(self.layers) if "N" in layer}
        described = [e.layer for e in self.engram]
        if sorted(described) != sorted(with_engram) or any(layer.count("N") > 1 for layer in self.layers):
            raise ValueError(
                f"layers with 'N' are {sorted(with_engram)} but engram describes {sorted(described)}; "
                "give exactly one engram entry for each such layer"
            )
        return self

    @property
    def mtp_factor(self) -> float:
        """What multiplies each module's part of the training loss: λ / depth."""
        return self.mtp.weight / self.mtp.depth if self.mtp else 0.0

    @property
    def num_sublayers(self) -> int:
        return sum(len(layer) for layer in self.layers)
