"""What Megatron-LM can train of a spec, on how many ranks: all problems before anything is launched. Imports no torch.

The rules are those of core 0.12: `megatron/training/arguments.py` (validate_args), `TransformerConfig.__post_init__`,
`parallel_state.initialize_model_parallel`, and what our spec can say but Megatron's GPT lacks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from trainer.errors import SpecError
from trainer.kinds.mlp import MlpSpec
from trainer.megatronspec import MegatronSpec
from trainer.modelspec import ModelSpec
from trainer.runtimespec import OF_ALL_LAYERS
from trainer.spec import TrainSpec

OWN = "or train it with train.engine yaongi"
SEQUENCE = "train.megatron.sequence_parallel"


@dataclass(frozen=True)
class Mesh:
    """The numbers of ranks that share something.

    Attributes:
        data: copies of all but the experts, whose gradients are summed (with `context`).
        expert_data: copies of each expert.
        micro_batches: of a data parallel rank in a step.
    """

    tensor: int
    pipeline: int
    virtual: int
    context: int
    expert: int
    expert_tensor: int
    data: int
    expert_data: int
    micro_batches: int

    def __str__(self) -> str:
        sizes = {"TP": self.tensor, "PP": self.pipeline, "CP": self.context, "EP": self.expert, "DP": self.data}
        return " × ".join(f"{name} {size}" for name, size in sizes.items() if size > 1 or name in ("TP", "PP", "DP"))


def check(spec: TrainSpec, world: int) -> Mesh:
    """The mesh of a run of `world` ranks.

    Raises:
        SpecError: Megatron cannot train this; one line for each problem, with the fix.
    """
    layout = spec.megatron or MegatronSpec()
    problems = [*_of_model(spec.model), *_of_recipe(spec), *_of_mesh(spec, layout, world)]
    if problems:
        raise SpecError("\n".join(problems))
    of_experts = layout.expert_tensor_parallel * layout.expert_parallel * layout.pipeline_parallel
    return Mesh(
        layout.tensor_parallel,
        layout.pipeline_parallel,
        layout.virtual_pipeline,
        layout.context_parallel,
        layout.expert_parallel,
        layout.expert_tensor_parallel,
        world // layout.sharing,
        world // of_experts,
        spec.micro_batches(world),
    )


def _of_model(model: ModelSpec) -> Iterator[str]:
    """What Megatron's GPT lacks."""
    for index, layer in enumerate(model.layers):
        if layer not in ("*-", "*E"):
            yield (
                f"train.model.layers: layer {index} is '{layer}'; Megatron's GPT has attention followed by an MLP (*-) "
                f"or by experts (*E) only; write those, {OWN}"
            )
            break
    for name, what in (("mtp", "multi-token prediction"), ("mup", "μP"), ("lora", "adapters")):
        if getattr(model, name) is not None:
            yield f"train.model.{name}: {what} is not passed on to Megatron; remove it, {OWN}"
    attention, experts, mlp = model.attention, model.moe, model.mlp
    if attention is not None and attention.rope_scaling is not None:
        yield f"train.model.attention.rope_scaling is not passed on to Megatron; remove it, {OWN}"
    if attention is not None and not (attention.rope_theta or 1.0).is_integer():
        yield f"train.model.attention.rope_theta {attention.rope_theta:g}: Megatron core 0.12 wants a whole number"
    used = [section for symbol, section in (("E", experts), ("-", mlp)) if section and symbol in "".join(model.layers)]
    if len({section.activation for section in used}) > 1:
        yield "train.model: Megatron has one activation for moe and mlp; make moe.activation and mlp.activation equal"
    biased = {bool(section.bias) for section in (attention, mlp if mlp in used else None) if section is not None}
    if experts in used and True in biased:
        yield "train.model: Megatron's experts allow no bias anywhere; write attention.bias and mlp.bias false"
    elif len(biased) > 1:
        yield "train.model: Megatron gives all matrices a bias or none; make attention.bias and mlp.bias equal"
    if experts in used:
        yield from _of_experts(model)


def _of_experts(model: ModelSpec) -> Iterator[str]:
    moe = model.moe
    assert moe is not None
    if moe.scores == "sigmoid" and not moe.renormalise and moe.top_k > 1:
        yield f"train.model.moe.renormalise: Megatron renormalises sigmoid scores; write true, {OWN}"
    if moe.scores == "softmax" and moe.bias_update_rate:
        yield "train.model.moe.bias_update_rate: Megatron has that bias for sigmoid scores only; write 0"
    if moe.balance_loss_weight and moe.sequence_loss_weight:
        yield (
            "train.model.moe: Megatron has one loss that balances experts; write 0 for balance_loss_weight or "
            "sequence_loss_weight"
        )


def _of_recipe(spec: TrainSpec) -> Iterator[str]:
    optimizer, schedule, tokens, fp8 = spec.optimizer, spec.schedule, spec.tokens, spec.precision.fp8
    if optimizer.name != "adamw":
        yield f"train.optimizer.name {optimizer.name}: Megatron core 0.12 has AdamW; write adamw, {OWN}"
    if optimizer.state_dtype != "fp32":
        yield "train.optimizer.state_dtype bf16: Megatron keeps FP32 (split over ranks); write fp32"
    if optimizer.spike_guard is not None:
        yield f"train.optimizer.spike_guard: Megatron skips no spikes; write null, {OWN}"
    warmup, decay = schedule.phases(spec.steps, spec.begun_with_steps)
    if warmup and schedule.warmup_shape != "linear":
        yield f"train.schedule.warmup_shape {schedule.warmup_shape}: Megatron warms up linearly; write linear"
    if schedule.name == "wsd" and decay and schedule.decay_shape == "sqrt":
        yield "train.schedule.decay_shape sqrt is not in Megatron core 0.12; write linear or cosine"
    if warmup >= spec.steps:
        yield f"train.schedule: a warm-up of {warmup} steps leaves none of {spec.steps}; lower warmup_fraction"
    if tokens.packing != "concat":
        yield f"train.packing {tokens.packing}: Megatron cuts its own rows; write concat, {OWN}"
    for name in ("curriculum", "skip"):
        if getattr(tokens, name):
            yield f"train.{name}: Megatron has one mix and one row length for the whole run; remove it, {OWN}"
    if ordered := [name for name, mix in tokens.mix.items() if mix.order]:
        yield f"data.sources.{ordered[0]}.order: Megatron shuffles the rows itself; remove it, {OWN}"
    if spec.precision.dtype in ("fp16", "fp32"):
        yield f"train.precision.dtype {spec.precision.dtype}: Megatron is run in fp8 or bf16; write one of them"
    if spec.precision.dtype in ("auto", "fp8"):
        if fp8.recipe == "block128":
            yield "train.precision.fp8.recipe block128 is not in Megatron core 0.12; write current or delayed"
        if fp8.recipe == "delayed" and fp8.bf16_end_layers:
            yield "train.precision.fp8.bf16_end_layers: with recipe delayed Megatron converts all layers; write 0"
        if fp8.margin and fp8.recipe == "current":
            yield "train.precision.fp8.margin: Megatron has it for recipe delayed only; write 0"
        if fp8.implementation not in ("auto", "te"):
            yield f"train.precision.fp8.implementation {fp8.implementation}: Megatron has Transformer Engine; write te"
    if spec.seed < 0:
        yield f"train.seed {spec.seed}: Megatron wants none below 0; write another"
    if spec.runtime.compile is True:
        yield "train.runtime.compile: Megatron has its own fused kernels; write false"
    if spec.runtime.graphs is True:
        yield "train.runtime.graphs: Megatron launches its layers by itself; write false"
    if (policy := spec.runtime.activation_checkpointing) not in OF_ALL_LAYERS:
        yield f"train.runtime.activation_checkpointing {policy}: Megatron is given none, selective or full; write those"


def _of_mesh(spec: TrainSpec, layout: MegatronSpec, world: int) -> Iterator[str]:
    model, seq_len = spec.model, spec.tokens.seq_len
    tensor, pipeline, context = layout.tensor_parallel, layout.pipeline_parallel, layout.context_parallel
    if model.attention is not None:
        heads, groups = model.attention.num_heads, model.attention.num_kv_heads
        if heads % tensor or groups % tensor:
            yield (
                f"train.megatron.tensor_parallel {tensor} must divide the {heads} heads and {groups} key/value heads "
                "of the model, as Megatron core 0.12 splits whole heads; write "
                f"{_largest(math.gcd(heads, groups), tensor)}"
            )
    if model.vocab_size % tensor:
        yield f"train.model.vocab_size {model.vocab_size} must be a multiple of tensor_parallel {tensor}"
    for name, section in (("mlp", model.mlp), ("moe", model.moe)):
        width = 0 if section is None else section.width if isinstance(section, MlpSpec) else section.expert_width
        ranks = tensor if name == "mlp" else layout.expert_tensor_parallel
        if width % ranks:
            yield f"train.model.{name}: a width of {width} cannot be split over {ranks} tensor parallel ranks"
    layers, parts = len(model.layers), pipeline * layout.virtual_pipeline
    if layers % parts:
        yield (
            f"train.megatron: {layers} layers cannot be split into pipeline_parallel {pipeline} × virtual_pipeline "
            f"{layout.virtual_pipeline} equal parts; write {_largest(layers, pipeline)} and 1"
        )
    ends, each = spec.precision.fp8.bf16_end_layers, max(1, layers // pipeline)
    if spec.precision.dtype in ("auto", "fp8") and ends > each:
        yield (
            f"train.precision.fp8.bf16_end_layers {ends}: Megatron allows as many as a pipeline rank has; write {each}"
        )
    if layout.virtual_pipeline > 1 and pipeline == 1:
        yield "train.megatron.virtual_pipeline is for pipeline_parallel above 1; write 1"
    yield from _of_experts_mesh(model, layout)
    if layout.sequence_parallel and tensor == 1:
        yield f"{SEQUENCE} splits rows over tensor parallel ranks, of which there is 1; write false, or remove it"
    if tensor > 1 and model.moe is not None and not layout.splits_sequence:
        yield f"{SEQUENCE} false: Megatron trains experts with tensor_parallel above 1 only with it; write true"
    pieces = (2 * context if context > 1 else 1) * (tensor if layout.splits_sequence else 1)
    if seq_len % pieces:
        yield f"train.seq_len {seq_len} must be a multiple of {pieces} (tensor_parallel, 2 × context_parallel)"
    yield from _of_world(spec, layout, world)


def _of_experts_mesh(model: ModelSpec, layout: MegatronSpec) -> Iterator[str]:
    if model.moe is None:
        if layout.expert_parallel > 1 or layout.expert_tensor_parallel > 1:
            yield "train.megatron.expert_parallel splits experts, and the model has none; write 1"
    elif model.moe.num_experts % layout.expert_parallel:
        number = model.moe.num_experts
        yield (
            f"train.megatron.expert_parallel {layout.expert_parallel} must divide the {number} experts; write "
            f"{_largest(number, layout.expert_parallel)}"
        )


def _of_world(spec: TrainSpec, layout: MegatronSpec, world: int) -> Iterator[str]:
    of_experts = layout.expert_tensor_parallel * layout.expert_parallel * layout.pipeline_parallel
    if spec.model.moe is not None and world % of_experts:
        yield (
            f"train.megatron: expert_tensor × expert × pipeline parallel = {of_experts} must divide the {world} ranks; "
            "lower expert_parallel"
        )
    try:
        micro_batches = spec.micro_batches(world)
    except SpecError as error:
        yield str(error)
        return
    if layout.virtual_pipeline > 1 and micro_batches % layout.pipeline_parallel:
        yield (
            f"train.megatron.virtual_pipeline: the {micro_batches} micro-batches of a step must be a multiple of "
            f"pipeline_parallel {layout.pipeline_parallel}; change train.batch, or write 1"
        )


def _largest(number: int, most: int) -> int:
    """The largest divisor of `number` up to `most`."""
    return next(each for each in range(min(number, most), 0, -1) if number % each == 0)
