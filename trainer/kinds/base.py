"""What every kind of sublayer tells about itself. Imports no torch.

A kind is the section of the model's spec that describes it, a subclass of `Kind`. Parameters, operations, bytes kept
for the backward pass, initialisation, optimizer, FP8 and the cut over ranks follow from it; the rest of the program
loops over what it says.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, NamedTuple, Protocol, Self, TypeVar

from pydantic import Field, model_validator

from trainer.specbase import Spec

Count = Annotated[int, Field(gt=0)]
Rows = tuple[int, ...]

FP32_BYTES, INDEX_BYTES = 4, 8  # of an fp32 and an int64 number
NO_PRODUCT = "no matrix product"
LOOKED_UP = "looked up, not multiplied"


class Init(NamedTuple):
    """How a parameter begins. σ is `init_std`, or what μP makes of it for the shape; S is the number of sublayers.

    normal: N(0, σ) · table: N(0, init_std) whatever the shape · residual: N(0, σ/√S), for what is added to the residual
    stream · constant: `low` · uniform: U(low, high) · log_uniform: log U(low, high) · softplus_inverse: softplus⁻¹(v),
    log v uniform between log low and log high, v ≥ `floor`.
    """

    law: Literal["normal", "table", "residual", "constant", "uniform", "log_uniform", "softplus_inverse"]
    low: float = 0.0
    high: float = 0.0
    floor: float = 0.0


NORMAL, TABLE, RESIDUAL = Init("normal"), Init("table"), Init("residual")
ONES, ZEROS = Init("constant", 1.0), Init("constant", 0.0)


@dataclass(frozen=True)
class Parameter:
    """One trainable tensor, and how the rest of the program treats it.

    Attributes:
        name: of a kind's own parameters within its mixer, else in the model.
        active: how many of its elements take part in one token (convention A1 of trainer/arithmetic/flops.py).
        multiplies: whether those act as a matrix product (two operations for each element and token).
        optimizer: Muon treats a matrix as one linear map; what is looked up or acts on each channel gets AdamW.
        blocks: row counts of the maps that a matrix stacks; empty: it is one. A 3-D weight has a matrix for each index
            of its first dimension, with blocks of equal height.
        decay: whether weight decay applies.
        teon: successive layers may be orthogonalised jointly.
        engram_rate: its learning rate is multiplied by `adamw.engram_rate_factor`.
        high_precision: why it is never multiplied in FP8; empty: it may be.
        whole: small and used in FP32, so that every rank holds all of it.
        per_expert: stacks all experts along its first dimension.
        frozen: not trained, because only adapters are (trainer/lora.py).
    """

    name: str
    shape: tuple[int, ...]
    active: int
    init: Init
    multiplies: bool = True
    optimizer: Literal["muon", "adamw"] = "muon"
    blocks: Rows = ()
    decay: bool = True
    teon: bool = False
    engram_rate: bool = False
    high_precision: str = ""
    whole: bool = False
    per_expert: bool = False
    frozen: bool = False

    @property
    def count(self) -> int:
        return math.prod(self.shape)


def matrix(
    name: str,
    rows: int,
    columns: int,
    init: Init = NORMAL,
    *,
    blocks: Rows = (),
    teon: bool = False,
    high_precision: str = "",
    whole: bool = False,
) -> Parameter:
    """A linear map from `columns` to `rows` numbers, or several of the same input."""
    assert not blocks or sum(blocks) == rows, name
    blocks = blocks if len(blocks) > 1 else ()
    return Parameter(
        name,
        (rows, columns),
        rows * columns,
        init,
        blocks=blocks,
        teon=teon,
        high_precision=high_precision,
        whole=whole,
    )


def bias(name: str, width: int) -> Parameter:
    """What is added to the result of a matrix product."""
    return vector(name, width, init=ZEROS)


def vector(name: str, *shape: int, init: Init = ONES, decay: bool = False) -> Parameter:
    """What acts on each channel by itself: a norm's weight, a bias, a filter of a depthwise convolution."""
    return Parameter(
        name,
        shape,
        math.prod(shape),
        init,
        multiplies=False,
        optimizer="adamw",
        decay=decay,
        high_precision=NO_PRODUCT,
        whole=True,
    )


def table(name: str, rows: int, width: int, *, decay: bool = True, engram_rate: bool = False) -> Parameter:
    """Rows that are looked up, few of them for a token."""
    return Parameter(
        name,
        (rows, width),
        0,
        TABLE,
        multiplies=False,
        optimizer="adamw",
        decay=decay,
        engram_rate=engram_rate,
        high_precision=LOOKED_UP,
    )


@dataclass(frozen=True)
class Widths:
    """Bytes of one number: in the residual stream, and between matrix products. FP8 experts keep routed copies."""

    stream: int
    product: int
    keeps_copies: bool = False


Activation = Literal["relu2", "swiglu"]  # trainer/ops/activation.py


def first_rows(activation: Activation, width: int) -> Rows:
    """Rows of the maps in the first matrix of an MLP or an expert: with a gate it has a second one."""
    return (width, width) if activation == "swiglu" else (width,)


class RopeScalingSpec(Spec):
    """Slower rotations, for rows longer than a model was trained on.

    linear: every rate divided by `factor` (arXiv 2306.15595). llama3: only the slow ones, with a passage between
    `low_freq_factor` and `high_freq_factor` turns in `original_length` (Llama 3.1). yarn: the same between `beta_slow`
    and `beta_fast` turns, and larger scores (arXiv 2309.00071).
    """

    kind: Literal["linear", "llama3", "yarn"]
    factor: Annotated[float, Field(ge=1)]
    original_length: Count | None = None
    low_freq_factor: Annotated[float, Field(gt=0)] = 1.0
    high_freq_factor: Annotated[float, Field(gt=0)] = 4.0
    beta_fast: Annotated[float, Field(gt=0)] = 32.0
    beta_slow: Annotated[float, Field(gt=0)] = 1.0

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        if self.kind != "linear" and self.original_length is None:
            raise ValueError(f"{self.kind} needs original_length, the rows' length before; give it")
        if self.low_freq_factor >= self.high_freq_factor or self.beta_slow >= self.beta_fast:
            raise ValueError("low_freq_factor must be below high_freq_factor, and beta_slow below beta_fast")
        return self

    @property
    def amplitude(self) -> float:
        """On queries and keys."""
        return 0.1 * math.log(self.factor) + 1 if self.kind == "yarn" else 1.0


class Rotation(NamedTuple):
    """Rotary position embedding of vectors of `width` channels (trainer/ops/rotary.py)."""

    theta: float
    width: int
    scaling: RopeScalingSpec | None


class Convolution(NamedTuple):
    """A depthwise causal convolution; `aligned` are widths at which its channels begin or end in memory."""

    taps: int
    dilation: int
    aligned: Rows


class Cached(NamedTuple):
    """What a sublayer keeps of a text that grows, for each row (trainer/inference).

    Attributes:
        shape: of one row, or with `per_position` of one position; otherwise its size does not depend on the length.
        dtype: that of the activations, FP32, or INT64 for token ids.
    """

    name: str
    shape: Rows
    per_position: bool = False
    dtype: Literal["activation", "fp32", "int64"] = "activation"

    def count(self, length: int) -> int:
        """Numbers for a row of at most `length` positions."""
        return math.prod(self.shape) * (length if self.per_position else 1)


class Part(NamedTuple):
    """A tensor of a Hugging Face checkpoint, or some rows of it, and where they lie in ours.

    Attributes:
        theirs, ours: names; in `Kind.parts` within the mixer. Dimensions of size 1 that only theirs has do not count.
        expert: index of the matrix in a stack of ours.
        first, rows: rows of ours; rows None: all from `first` on.
        their_first: row of theirs that is the first of them.
    """

    theirs: str
    ours: str
    expert: int | None = None
    first: int = 0
    rows: int | None = None
    their_first: int = 0


def halves(gate: str, up: str, ours: str, width: int, expert: int | None = None) -> Iterator[Part]:
    """Gate and up, which are two tensors there and one matrix here."""
    yield Part(gate, ours, expert, 0, width)
    yield Part(up, ours, expert, width, width)


class Stage(NamedTuple):
    """A part of a sublayer's work, for its bound by arithmetic (trainer/arithmetic/roofline.py).

    All counts are for one token, forward and backward together, of kernels that are fused as far as anyone has done it:
    each reads its inputs from memory once and writes its results once.

    Attributes:
        name: of a row in tables, in which parts of the same name are added.
        weights: names of the matrices that it multiplies, within the mixer.
        operands: numbers that matrix products read; one byte each in FP8.
        moved: other numbers in the dtype of activations.
        wide: numbers in FP32.
        flops: operations of a forward pass besides the weights'.
    """

    name: str
    weights: tuple[str, ...] = ()
    operands: int = 0
    moved: int = 0
    wide: int = 0
    flops: int = 0


def product(name: str, weights: tuple[str, ...], inputs: int, outputs: int) -> Stage:
    """y = Wx of matrices with the same input. Forward reads x; the gradient of x reads that of y, the gradient of W
    that of y and x. Written are y and the gradient of x."""
    return Stage(name, weights, operands=2 * (inputs + outputs), moved=inputs + outputs)


def two_products(name: str, weights: tuple[str, ...], hidden: int, first: int, width: int) -> Stage:
    """W₂ · act(W₁ x), act and its derivative in the products' epilogues; `first` numbers before act, `width` after it.

    Beside the operands, forward writes both of them and y; backward reads what was before act, and writes its gradient
    and that of x. Experts gather x and add up y within their products, so for them too x and y move once.
    """
    operands = 2 * (hidden + first) + 2 * (width + hidden)
    return Stage(name, weights, operands, moved=3 * first + width + 2 * hidden)


K = TypeVar("K", bound="Kind")


class ModelShape(Protocol):
    """What a kind may ask of the model that it is part of; `trainer.modelspec.ModelSpec` has it."""

    @property
    def hidden(self) -> int: ...
    def sections(self, kind: type[K]) -> Sequence[K]:
        """All sections of a kind."""
        ...


class Kind(Spec):
    """A section of the model's spec, and what it means.

    Attributes:
        symbol: of a sublayer of this kind in `layers`.
        label: for tables.
        mixer: module and class that compute it, a `trainer.model.mixer.Mixer`.
        pre_norm: whether an RMSNorm of the residual stream comes before the mixer.
        recomputed: what selective activation checkpointing computes again.
        attends: whether positions of a document see each other, by a mask or by the starts of documents.
        since: the version of specs that introduced it (trainer/fields.py).
        training_only: its fields that change training, but nothing in a trained model.
    """

    symbol: ClassVar[str]
    label: ClassVar[str]
    mixer: ClassVar[str]
    pre_norm: ClassVar[bool] = True
    recomputed: ClassVar[str]
    attends: ClassVar[bool] = False
    since: ClassVar[int] = 1
    training_only: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def parameters(self, model: ModelShape) -> Iterator[Parameter]:
        """Those of the mixer, in its order."""

    def adaptable(self, model: ModelShape) -> Iterator[Parameter]:
        """The parameters that may have adapters (trainer/lora.py): matrices, except those of routers."""
        return (parameter for parameter in self.parameters(model) if parameter.multiplies and not parameter.whole)

    @abstractmethod
    def widths(self) -> str:
        """Its sizes in a few words."""

    def core_flops(self, seq_len: int) -> int:
        """Operations of a forward pass outside its weights, for one token of a row that is one document."""
        return 0

    def stages(self, model: ModelShape, seq_len: int) -> Iterator[Stage]:
        """Its work in parts; the norm in front is not among them. By default each matrix by itself.

        Args:
            seq_len: of rows that are one document.
        """
        for p in self.parameters(model):
            if p.multiplies:
                rows, columns = p.shape[-2:]
                copies = p.active // (rows * columns)
                yield product(self.label, (p.name,), copies * columns, copies * rows)
        if core := self.core_flops(seq_len):
            yield Stage(self.label, flops=core)

    @abstractmethod
    def kept(self, hidden: int, widths: Widths) -> int:
        """Bytes that a forward pass keeps for each token, besides those of the norm in front."""

    @abstractmethod
    def kept_selective(self, hidden: int, widths: Widths) -> int:
        """The same under selective checkpointing, besides the residual stream: the results of the first products."""

    def cached(self, model: ModelShape) -> tuple[Cached, ...]:
        """What its mixer's `extend` keeps from one call to the next; all of it begins as zeros."""
        return ()

    def parts(self) -> Iterator[Part]:
        """Its parameters and buffers under the names of Hugging Face's models; nothing where none has such a kind."""
        yield from ()

    def convolutions(self, hidden: int) -> tuple[Convolution, ...]:
        """What runs as a depthwise convolution."""
        return ()

    def shifts(self, hidden: int) -> set[int]:
        """How far back it looks within a document, by masks of `Documents.same_BT`."""
        return {k * c.dilation for c in self.convolutions(hidden) for k in range(1, c.taps)}

    @property
    def rotation(self) -> Rotation | None:
        """By which it turns vectors, by their positions in their document."""
        return None


class PlacedKind(Kind):
    """A kind of which each layer has a section of its own; the model's spec has a list of them."""

    layer: Annotated[int, Field(ge=0)]

    @abstractmethod
    def stand_in(self, table_rows: int) -> PlacedKind:
        """One for layer 0 of a small model that runs through the same code, with no table larger than that."""
