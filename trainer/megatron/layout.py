"""Where the rows of our tensors are in a checkpoint of Megatron core (format torch_dist). Imports no torch.

Keys and shapes are those that core 0.12 gives its sharded tensors. Layers are stacked along a first dimension, or,
where `moe_layer_freq` is a list, the layer's number is in the key; experts are stacked along the next dimension.
Tensor, pipeline and expert parallelism do not change keys or shapes: they only cut tensors into other boxes.
Everything is a copy of rows:

    self_attention.linear_qkv      for each group of queries with one key: its queries' rows, the key's, the value's
    mlp.linear_fc1                 the gate's rows, then the others', as in ours
    embedding, output_layer        more rows than the vocabulary, so that ranks get equal parts; ours end before them

The norm in front of a product belongs to the product there (`linear_qkv.layer_norm_weight`). For the norm in front of
experts, Transformer Engine's layers and core's own have different keys, so both are written and either is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from trainer.errors import SpecError
from trainer.kinds.attention import AttentionSpec
from trainer.kinds.base import first_rows
from trainer.kinds.mlp import MlpSpec
from trainer.kinds.moe import MoeSpec
from trainer.modelspec import ModelSpec

Shape = tuple[int, ...]
MOST_PADDING = 128 * 64  # rows, of make-vocab-size-divisible-by × tensor parallel


@dataclass(frozen=True)
class Rows:
    """Rows of one of our matrices or vectors.

    Attributes:
        name: our tensor.
        first, count: its rows, or elements of a vector.
        expert: index of the matrix in a stack.
    """

    name: str
    first: int
    count: int
    expert: int | None = None


@dataclass(frozen=True)
class Matrix:
    """A matrix or vector of Megatron, one of a stack.

    Attributes:
        key: of the stack.
        stack: shape of the stack; empty without one.
        at: its place in the stack.
        columns: length of its rows; empty: it is a vector.
        parts: its rows in order.
        aliases: other keys, under which it may be read, and is written too.
        padded: whether Megatron's may have more rows.
        optional: whether it may be missing; ours is zero then.
    """

    key: str
    stack: Shape
    at: Shape
    columns: Shape
    parts: tuple[Rows, ...]
    aliases: tuple[str, ...] = ()
    padded: bool = False
    optional: bool = False

    @property
    def count(self) -> int:
        return sum(part.count for part in self.parts)

    @property
    def shape(self) -> Shape:
        return (*self.stack, self.count, *self.columns)


@dataclass(frozen=True)
class _Layer:
    """A place for matrices: with the layer's number in the key, or as index in a stack."""

    prefix: str
    stack: Shape
    at: Shape
    ours: str = field(default="")

    def matrix(self, key: str, columns: Shape, *parts: Rows, aliases: tuple[str, ...] = ()) -> Matrix:
        named = tuple(replace(part, name=f"{self.ours}.{part.name}") for part in parts)
        others = tuple(f"{self.prefix}{alias}" for alias in aliases)
        return Matrix(f"{self.prefix}{key}", self.stack, self.at, columns, named, others)

    def linear(self, key: str, columns: int, parts: list[Rows], *, bias: bool) -> Iterator[Matrix]:
        """A matrix and perhaps its bias, of the same rows."""
        yield self.matrix(f"{key}.weight", (columns,), *(replace(part, name=f"{part.name}.weight") for part in parts))
        if bias:
            yield self.matrix(f"{key}.bias", (), *(replace(part, name=f"{part.name}.bias") for part in parts))


def is_stacked(model: ModelSpec) -> bool:
    """Whether the layers of our runs are stacked: those with experts are started with a list (arguments.py)."""
    return not any("E" in layer for layer in model.layers)


def matrices(model: ModelSpec, *, stacked: bool) -> Iterator[Matrix]:
    """All matrices and vectors of a model in order.

    Args:
        stacked: whether layers are, or have their number in the key.

    Raises:
        SpecError: Megatron's GPT has no such model.
    """
    if unknown := set(model.layers) - {"*-", "*E"}:
        raise SpecError(
            f"train.model.layers: Megatron's GPT has no layer {sorted(unknown)[0]!r}, only *- (attention and MLP) and "
            "*E (attention and experts)"
        )
    if reason := next((what for what in ("mtp", "lora", "mup") if getattr(model, what)), None):
        raise SpecError(f"train.model.{reason}: is not converted from or to checkpoints of Megatron; remove it")
    hidden = (model.hidden,)
    embedding = Rows("embedding.weight", 0, model.vocab_size)
    yield Matrix("embedding.word_embeddings.weight", (), (), hidden, (embedding,), padded=True)
    for index in range(len(model.layers)):
        yield from _layer(model, index, _place(model, index, stacked=stacked))
    yield Matrix("decoder.final_layernorm.weight", (), (), (), (Rows("final_norm.weight", 0, model.hidden),))
    if not model.tied_embedding:
        head = Rows("head.weight", 0, model.vocab_size)
        yield Matrix("output_layer.weight", (), (), hidden, (head,), padded=True)


def extra_states(model: ModelSpec, *, stacked: bool) -> Iterator[str]:
    """Keys of the state of FP8 products, which Transformer Engine's layers have, empty if there was no FP8.

    A layer that finds none does not load. Core's own layers, and other versions of Transformer Engine, use fewer.
    """
    attention = ("linear_qkv", "linear_proj", "core_attention", "q_layernorm", "k_layernorm")
    for index, layer in enumerate(model.layers):
        place = _place(model, index, stacked=stacked)
        names = ["input_layernorm", *(f"self_attention.{name}" for name in attention), "pre_mlp_layernorm"]
        if layer == "*-":
            names += ["mlp.linear_fc1", "mlp.linear_fc2"]
        for name in names:
            yield _object(f"{place.prefix}{name}", place.stack, place.at)
        if layer == "*E":
            assert model.moe is not None
            if model.moe.shared_width:
                for name in ("linear_fc1", "linear_fc2"):
                    yield _object(f"{place.prefix}mlp.shared_experts.{name}", place.stack, place.at)
            for expert in range(model.moe.num_experts):
                stack, at = (*place.stack, model.moe.num_experts), (*place.at, expert)
                for name in ("linear_fc1", "linear_fc2"):
                    yield _object(f"{place.prefix}mlp.experts.experts.{name}", stack, at)
    yield _object("decoder.final_layernorm", (), ())


def _object(module: str, stack: Shape, at: Shape) -> str:
    place, shape = (".".join(map(str, numbers)) for numbers in (at or (0,), stack or (1,)))
    return f"{module}._extra_state/shard_{place}_{shape}"


def _place(model: ModelSpec, index: int, *, stacked: bool) -> _Layer:
    if not stacked:
        return _Layer(f"decoder.layers.{index}.", (), ())
    return _Layer("decoder.layers.", (len(model.layers),), (index,))


def _layer(model: ModelSpec, index: int, place: _Layer) -> Iterator[Matrix]:
    norm = Rows("norm.weight", 0, model.hidden)
    first, second = (replace(place, ours=f"layers.{index}.{sublayer}") for sublayer in (0, 1))
    assert model.attention is not None
    yield first.matrix("self_attention.linear_qkv.layer_norm_weight", (), norm)
    yield from _attention(replace(first, ours=f"{first.ours}.mixer"), model.attention, model.hidden)
    dense = "mlp.linear_fc1.layer_norm_weight"
    if model.layers[index] == "*-":
        assert model.mlp is not None
        yield second.matrix(dense, (), norm)
        yield from _mlp(replace(second, ours=f"{second.ours}.mixer"), model.mlp, model.hidden)
    else:
        assert model.moe is not None
        yield second.matrix("pre_mlp_layernorm.weight", (), norm, aliases=(dense,))
        yield from _experts(replace(second, ours=f"{second.ours}.mixer"), model.moe, model.hidden)


def _attention(place: _Layer, attention: AttentionSpec, hidden: int) -> Iterator[Matrix]:
    width, queries = attention.head_dim, attention.num_heads // attention.num_kv_heads
    parts = []
    for group in range(attention.num_kv_heads):
        parts.append(Rows("q_proj", group * queries * width, queries * width))
        parts += [Rows(name, group * width, width) for name in ("k_proj", "v_proj")]
    yield from place.linear("self_attention.linear_qkv", hidden, parts, bias=attention.bias)
    if attention.qk_norm:
        for name in ("q", "k"):
            yield place.matrix(f"self_attention.{name}_layernorm.weight", (), Rows(f"{name}_norm.weight", 0, width))
    result = [Rows("o_proj", 0, hidden)]
    yield from place.linear("self_attention.linear_proj", attention.num_heads * width, result, bias=attention.bias)


def _mlp(place: _Layer, mlp: MlpSpec, hidden: int) -> Iterator[Matrix]:
    first = [Rows(mlp.first, 0, sum(first_rows(mlp.activation, mlp.width)))]
    yield from place.linear("mlp.linear_fc1", hidden, first, bias=mlp.bias)
    yield from place.linear("mlp.linear_fc2", mlp.width, [Rows("down", 0, hidden)], bias=mlp.bias)


def _experts(place: _Layer, moe: MoeSpec, hidden: int) -> Iterator[Matrix]:
    router = place.matrix("mlp.router.weight", (hidden,), Rows("router.weight", 0, moe.num_experts))
    yield router
    bias = place.matrix("mlp.router.expert_bias", (), Rows("bias_E", 0, moe.num_experts))
    yield replace(bias, optional=True)
    shared, rows = moe.shared_width, sum(first_rows(moe.activation, moe.shared_width))
    if shared:
        at = "mlp.shared_experts.linear"
        yield from place.linear(f"{at}_fc1", hidden, [Rows(moe.shared_first, 0, rows)], bias=False)
        yield from place.linear(f"{at}_fc2", shared, [Rows("shared_down", 0, hidden)], bias=False)
    rows = sum(first_rows(moe.activation, moe.expert_width))
    for key, name, count, columns in (("fc1", moe.first, rows, hidden), ("fc2", "down_EDF", hidden, moe.expert_width)):
        for expert in range(moe.num_experts):
            of_expert = replace(place, stack=(*place.stack, moe.num_experts), at=(*place.at, expert))
            part = Rows(name, 0, count, expert)
            yield of_expert.matrix(f"mlp.experts.experts.linear_{key}.weight", (columns,), part)
