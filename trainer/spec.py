"""TrainSpec: all inputs of a training run except the bytes of its shards. Imports no torch."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from trainer.errors import SpecError
from trainer.evaluatespec import EvaluateSpec
from trainer.kinds.base import Count
from trainer.lora import is_adapter
from trainer.megatronspec import Engine, MegatronSpec
from trainer.modelspec import ModelSpec
from trainer.parameters import parameters
from trainer.runtimespec import Positive, RecomputeSpec, RuntimeSpec
from trainer.specbase import Spec, begins_with
from trainer.trackerspec import TrackersSpec

Fraction = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]  # of a running mean
NonNegative = Annotated[float, Field(ge=0)]
Packing = Literal["concat", "best_fit"]


class OrderSpec(Spec):
    """The documents of a source by a score in every epoch, low scores first or last.

    `by`: `length` in tokens; `compression`, the size of the text's UTF-8 under zlib as a share of its own, which is low
    for repetitive and plain text; or `column`, a number in the column `column` of the source's rows. `bands`: so many
    groups of equally many documents, each in random order; null sorts fully, and 1 not at all.
    """

    by: Literal["length", "compression", "column"]
    column: Annotated[str, Field(min_length=1)] | None = None
    ascending: bool = True
    bands: Annotated[int, Field(ge=1)] | None = 10

    @model_validator(mode="after")
    def _has_its_column(self) -> Self:
        if self.by == "column" and self.column is None:
            raise ValueError("order.by: column needs the column's name, as in order: {by: column, column: quality}")
        if self.by != "column" and self.column is not None:
            raise ValueError(f"order.column {self.column} has no effect by {self.by}; write by: column, or drop it")
        return self


class MixSpec(Spec):
    """Share of one source in the training tokens, and the order of its documents; null: random."""

    weight: Positive
    max_epochs: Positive = 4.0
    order: OrderSpec | None = None


def listed(weights: dict[str, float]) -> str:
    """Weights by source, for messages."""
    return ", ".join(f"{name} {weight:g}" for name, weight in weights.items())


class StageSpec(Spec):
    """A stage of a curriculum: from token `from_tokens` of the stream on, other weights, another row length, or both.

    `weights` name every source that is to be drawn; one that is left out gets nothing more. What is not given stays.
    """

    from_tokens: Count
    weights: dict[str, NonNegative] | None = None
    seq_len: Annotated[int, Field(ge=8)] | None = None


class CutSpec(Spec):
    """How the token stream is ordered and cut: the common part of TokensSpec and a job's section `train`."""

    seq_len: Annotated[int, Field(ge=8)]
    seed: int = 0
    packing: Packing = "concat"
    document_mask: bool = True
    curriculum: tuple[StageSpec, ...] = ()
    skip: tuple[tuple[int, int], ...] = ()


@begins_with("shards", "tokenizer", "mix")
class TokensSpec(CutSpec):
    """The training tokens, their proportions and their packing. `shards` is a directory with a manifest.json.

    `packing`: `concat` cuts the stream every `seq_len` tokens; `best_fit` arranges the documents of a step so that few
    are cut; neither loses a token. `document_mask`: no document of a row sees those before it; false lets attention,
    convolution, state and n-grams run through the row, as many other trainers do. `skip`: ranges [first, last) of the
    token stream to skip, to get past a loss spike.
    """

    shards: str
    tokenizer: str
    mix: dict[str, MixSpec]

    def seq_len_at(self, position: int) -> int:
        """Tokens of a row in a step that begins at `position` of the stream."""
        lengths = [stage.seq_len for stage in self.curriculum if stage.seq_len and stage.from_tokens <= position]
        return lengths[-1] if lengths else self.seq_len

    @property
    def seq_lens(self) -> list[int]:
        """The lengths that rows have in the course of training, each once."""
        return list(dict.fromkeys([self.seq_len, *(stage.seq_len for stage in self.curriculum if stage.seq_len)]))

    def seq_len_after(self, trained: int) -> int:
        """Tokens of a row in the step that begins after `trained` trained tokens (skipped ones not counted)."""
        position = trained
        for first, last in self.skip:
            position += last - first if first < position else 0
        return self.seq_len_at(position)

    @model_validator(mode="after")
    def _stages_are_sound(self) -> Self:
        starts = [stage.from_tokens for stage in self.curriculum]
        if any(a >= b for a, b in pairwise(starts)):
            raise ValueError(f"train.curriculum: from_tokens {starts} must rise")
        for stage in self.curriculum:
            where = f"train.curriculum: the stage from token {stage.from_tokens}"
            if stage.weights is None and stage.seq_len is None:
                raise ValueError(f"{where} changes nothing; give it weights or seq_len")
            if stage.weights is None:
                continue
            if unknown := sorted(set(stage.weights) - set(self.mix)):
                raise ValueError(f"{where} names '{unknown[0]}', not a source; sources are {', '.join(self.mix)}")
            if abs((total := sum(stage.weights.values())) - 1) > 1e-6:
                raise ValueError(
                    f"{where} has weights that sum to {total:g}; they must sum to 1: {listed(stage.weights)}"
                )
        return self

    @model_validator(mode="after")
    def _skip_is_ordered(self) -> Self:
        bounds = [-1, *(bound for first_and_last in self.skip for bound in first_and_last)]
        if any(a >= b for a, b in pairwise(bounds)):
            raise ValueError(f"train.skip {self.skip} must be ranges [first, last) that rise and do not touch")
        return self

    @model_validator(mode="after")
    def _mix_is_whole(self) -> Self:
        total = sum(source.weight for source in self.mix.values())
        if abs(total - 1) > 1e-6:
            weights = {name: source.weight for name, source in self.mix.items()}
            raise ValueError(f"the weights of mix sum to {total:g}; they must sum to 1: {listed(weights)}")
        return self


CPU_TOKENS = 4096  # of a micro-batch on a CPU with auto, and of one in evaluation


def _number_or_auto(value: object) -> object:
    """One line for both forms; pydantic has one for each."""
    if value != "auto" and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ValueError(f"a whole number from 1 on is wanted, or auto (got {value!r})")
    return value


class BatchSpec(Spec):
    """One optimizer step = `tokens_per_step` tokens, cut into micro-batches of `micro_batch_rows` rows on each rank.

    If a curriculum changes the row length, micro-batches keep their number of tokens. `micro_batch_rows: auto` takes
    the most rows that fit: by arithmetic for cluster.gpu_memory_gib, at the start for the smallest GPU of the run, then
    by a trial (trainer/rows.py). What is found changes results by rounding only, and is no part of the run's name.
    """

    tokens_per_step: Count
    micro_batch_rows: Annotated[Count | Literal["auto"], BeforeValidator(_number_or_auto)]

    @property
    def rows(self) -> int:
        """`micro_batch_rows` once it is a number."""
        assert self.micro_batch_rows != "auto", "decided where a step is planned"
        return self.micro_batch_rows


class MuonSpec(Spec):
    """Muon for every matrix: orthogonalised momentum, scaled to AdamW's update RMS (0.2·√max(rows, columns)).

    With `teon_layers` K above 1, query, key and value matrices of K successive attention layers are orthogonalised side
    by side (TEON, arXiv 2601.23261, which recommends 2); a leftover layer is treated alone, as all are with 1.

    Each step moves a weight by about 0.2 · `learning_rate`. In a sweep of `tiny` on steps of 512 tokens 5e-3 was best;
    large models on long runs usually want less than the default (docs/decisions.md).
    """

    learning_rate: Positive = 2e-3
    momentum: Decay = 0.95
    nesterov: bool = True
    weight_decay: NonNegative = 0.1
    coefficients: Literal["polar_express", "newton_schulz"] = "polar_express"
    steps: Annotated[int, Field(ge=1, le=12)] = 5
    teon_layers: Annotated[int, Field(ge=1, le=8)] = 1


class AdamWSpec(Spec):
    """AdamW for embedding, head, norms, convolutions, 1-D parameters and, at a higher rate, Engram tables."""

    learning_rate: Positive = 2e-3
    beta1: Decay = 0.9
    beta2: Decay = 0.95
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.1
    engram_rate_factor: Positive = 5.0


BF16_MAX_DECAY = 0.99  # x·β of a bf16 x rounds back to x, forever, from β = 1 − 2⁻⁸ = 0.996 on


MAX_SKIPPED_STEPS = 10  # consecutive; then the run has diverged


class SpikeGuardSpec(Spec):
    """Skip the update of a step whose loss or gradient norm exceeds mean + `sigmas`·σ over the last `window` steps.

    It starts once half a window is filled. null switches it off.
    """

    sigmas: Positive = 6.0
    window: Annotated[int, Field(ge=8, le=1024)] = 128

    @model_validator(mode="after")
    def _lasting_rise_is_survived(self) -> Self:
        # k equal values among n of an equal lower one are mean + √((n − k)/k)·σ, so n/(1 + sigmas²) of them are spikes.
        skipped = math.ceil(self.window / (1 + self.sigmas**2))
        if skipped >= MAX_SKIPPED_STEPS:
            raise ValueError(
                f"sigmas {self.sigmas:g} over window {self.window} skips {skipped} steps of a lasting rise, and "
                f"{MAX_SKIPPED_STEPS} in a row end a run as diverged; raise sigmas or lower window"
            )
        return self


class OptimizerSpec(Spec):
    """`state_dtype`: dtype of momentum and moments; weights are always FP32. bf16 halves the state."""

    name: Literal["muon", "adamw"] = "muon"
    muon: MuonSpec = MuonSpec()
    adamw: AdamWSpec = AdamWSpec()
    state_dtype: Literal["fp32", "bf16"] = "fp32"
    clip_norm: Positive | None = 1.0
    spike_guard: SpikeGuardSpec | None = SpikeGuardSpec()

    @property
    def peak_learning_rate(self) -> float:
        """The peak rate of the optimizer that trains the matrices; schedule and logs refer to it."""
        return self.muon.learning_rate if self.name == "muon" else self.adamw.learning_rate

    @model_validator(mode="after")
    def _state_can_decay(self) -> Self:
        decays = {
            "muon.momentum": self.muon.momentum,
            "adamw.beta1": self.adamw.beta1,
            "adamw.beta2": self.adamw.beta2,
        }
        for name, value in decays.items():
            if self.state_dtype == "bf16" and value > BF16_MAX_DECAY:
                raise ValueError(
                    f"{name} {value:g} needs state_dtype fp32: in bf16 a step changes a moment by less than its "
                    f"rounding, so it would stand still; lower it to {BF16_MAX_DECAY:g} or less, or write fp32"
                )
        return self


class ScheduleSpec(Spec):
    """Learning-rate factor over the steps. WSD: warm-up, stable, then down to `final_learning_rate`."""

    name: Literal["wsd", "cosine", "linear", "constant"] = "wsd"
    warmup_fraction: Fraction = 0.01
    warmup_shape: Literal["linear", "cosine"] = "linear"
    decay_fraction: Fraction = 0.2
    decay_shape: Literal["linear", "cosine", "sqrt"] = "linear"
    final_learning_rate: NonNegative = 1e-5

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if self.name == "wsd" and self.warmup_fraction + self.decay_fraction > 1:
            raise ValueError("warmup_fraction + decay_fraction exceed 1; lower one of them")
        return self

    def phases(self, steps: int, begun_with_steps: int | None = None) -> tuple[int, int]:
        """Steps of warm-up and decay of a run of `steps` steps; the decay is 0 if the rate never falls.

        A run whose length was changed keeps the warm-up of its first length.
        """
        warmup = round(self.warmup_fraction * (begun_with_steps or steps))
        if self.name == "constant" or (self.name == "wsd" and not self.decay_fraction):
            return warmup, 0
        return warmup, max(1, round(self.decay_fraction * steps) if self.name == "wsd" else steps - warmup)


class Fp8Spec(Spec):
    """How FP8 products are computed, if `precision.dtype` selects FP8.

    `recipe` is how operands are scaled: tensor-wise by the amax history (delayed) or by their own amax (current), or in
    blocks of 128 (weights 128×128, the rest 1×128). `margin`: number of times that tensor-wise scales are halved.
    `format` hybrid is E4M3 forward and E5M2 for gradients; auto means hybrid for tensor-wise recipes and e4m3 for
    blocks. `emulated` runs on any device, slowly. The first and last `bf16_end_layers` layers are not converted; the LM
    head only with `head`, experts only from the width `experts_from` on. By default `dtype: auto` converts the head and
    experts from 512 on; `dtype: fp8`, as before there were these fields, all experts and no head.
    """

    recipe: Literal["delayed", "current", "block128"] = "current"
    format: Literal["auto", "hybrid", "e4m3"] = "auto"
    implementation: Literal["auto", "te", "torch", "emulated"] = "auto"
    amax_history_steps: Annotated[int, Field(ge=1, le=4096)] = 1024
    margin: Annotated[int, Field(ge=0, le=8)] = 0
    bf16_end_layers: Annotated[int, Field(ge=0)] = 1
    head: bool | None = None
    experts_from: Annotated[int, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _margin_is_used(self) -> Self:
        if self.margin and self.recipe == "block128":
            raise ValueError(f"margin {self.margin} is for the recipes delayed and current, not block128; remove it")
        return self

    @property
    def hybrid(self) -> bool:
        """Whether gradients are E5M2."""
        return self.format == "hybrid" or (self.format == "auto" and self.recipe != "block128")

    @property
    def side_multiple(self) -> int:
        """Both sides of a weight must be multiples of this."""
        return 128 if self.recipe == "block128" else 16


class PrecisionSpec(Spec):
    """`auto` walks the ladder FP8 → BF16 → FP16 → FP32 and logs why it stopped where it did."""

    dtype: Literal["auto", "fp8", "bf16", "fp16", "fp32"] = "auto"
    fp8: Fp8Spec = Fp8Spec()


class CheckpointSpec(Spec):
    every_steps: Count
    keep_last: Annotated[int, Field(ge=1)] = 2
    asynchronous: bool = True


class BackendsSpec(Spec):
    """Implementation of each operation; `auto` takes the fastest proven one, a named one must be able to run."""

    ssd: Literal["auto", "reference", "chunked", "mamba_ssm"] = "auto"
    conv: Literal["auto", "reference", "torch", "causal_conv1d"] = "auto"
    attention: Literal["auto", "reference", "sdpa", "varlen", "flash_attn", "flash_attn_3", "flash_attn_4"] = "auto"
    experts: Literal["auto", "reference", "grouped", "te", "triton", "quack"] = "auto"
    add_norm: Literal["auto", "reference", "torch", "triton"] = "auto"
    orthogonalise: Literal["auto", "reference", "quack"] = "auto"
    router: Literal["auto", "reference", "torch", "triton"] = "auto"
    engram: Literal["auto", "reference", "torch", "triton"] = "auto"


class ParallelSpec(Spec):
    """How ranks share one model; a run may be resumed with another layout. Defaults suit one GPU and one node.

    `data`: every rank holds all weights (ddp) or a share of them (fsdp); auto takes fsdp where ddp's state would fill
    more than half of a GPU. `shard`: ranks that hold one copy of the weights together under fsdp; by default those of
    a node. `expert`: ranks that hold one set of the experts together and send each other tokens. `shard_optimizer`:
    under ddp, each rank keeps and updates only a share of the optimizer state.
    """

    data: Literal["auto", "ddp", "fsdp"] = "auto"
    shard: Annotated[int, Field(ge=2)] | None = None
    expert: Count = 1
    shard_optimizer: bool = False


class ExportSpec(Spec):
    """`dtype`: of the weights in an export's folder for transformers, except the few that are always FP32.

    `initial` and `checkpoints`: during training also export the model before the first step, and each checkpoint, into
    exports/step-<n> of the run directory (trainer/exports.py). `folder`, an absolute path, gets a link to each export
    by the name that tools of transformers expect: initial_model, checkpoint-<n>, final_model (trainer/exportlinks.py).
    """

    dtype: Literal["bf16", "fp32"] = "bf16"
    initial: bool = False
    checkpoints: bool = False
    folder: str | None = None

    @model_validator(mode="after")
    def _folder_is_one_place(self) -> Self:
        if self.folder is not None and not Path(self.folder).is_absolute():
            raise ValueError(f"folder '{self.folder}' must be an absolute path; write {Path.cwd() / self.folder}")
        return self


class RecipeSpec(Spec):
    """The recipe of a run besides its tokens: the common part of TrainSpec and a job's section `train`.

    `init_from`: the model whose weights the run starts from: a folder (a run, a checkpoint, an export, or one of
    transformers); in a job also the name of a run, or owner/name or owner/name@revision on the Hugging Face Hub.
    """

    steps: Count
    begun_with_steps: Count | None = None
    seed: int = 0
    init_from: Annotated[str, Field(min_length=1)] | None = None
    model: ModelSpec
    batch: BatchSpec
    optimizer: OptimizerSpec = OptimizerSpec()
    schedule: ScheduleSpec = ScheduleSpec()
    precision: PrecisionSpec = PrecisionSpec()
    checkpoint: CheckpointSpec
    backends: BackendsSpec = BackendsSpec()
    parallel: ParallelSpec = ParallelSpec()
    runtime: RuntimeSpec = RuntimeSpec()
    evaluate: EvaluateSpec = EvaluateSpec()
    export: ExportSpec | None = None
    engine: Engine = "yaongi"
    megatron: MegatronSpec | None = None
    trackers: TrackersSpec | None = None

    @property
    def peak_learning_rate(self) -> float:
        """The peak learning rate of the schedule. Adapters (LoRA) are always trained by AdamW."""
        return self.optimizer.adamw.learning_rate if self.model.lora else self.optimizer.peak_learning_rate

    @property
    def exporting(self) -> ExportSpec:
        """The section `export`, or its defaults."""
        return self.export or ExportSpec()


@begins_with("run", "run_dir", "steps", "begun_with_steps", "seed", "init_from", "model", "tokens")
class TrainSpec(RecipeSpec):
    """One training run; `run_dir` holds its checkpoints, logs, metrics and results.

    `begun_with_steps`: the length with which the run began, if it has changed.
    """

    sections_without_numbers: ClassVar = frozenset(
        {"parallel", "runtime", "evaluate", "export", "megatron", "trackers"}
    )

    run: str
    run_dir: str
    tokens: TokensSpec

    @model_validator(mode="after")
    def _rows_are_whole(self) -> Self:
        if self.batch.micro_batch_rows == "auto":
            if self.engine == "megatron":
                raise ValueError(
                    "train.batch.micro_batch_rows auto is for train.engine yaongi; write a number, such as 1"
                )
            self.row_choices(1)
            return self
        row_tokens = self.batch.micro_batch_rows * self.tokens.seq_len
        if self.batch.tokens_per_step % row_tokens:
            raise ValueError(
                f"train.batch.tokens_per_step {self.batch.tokens_per_step} must be a multiple of "
                f"micro_batch_rows × seq_len = {row_tokens}"
            )
        for stage in self.tokens.curriculum:
            if stage.seq_len and row_tokens % stage.seq_len:
                raise ValueError(
                    f"train.curriculum: seq_len {stage.seq_len} must divide the tokens of a micro-batch, "
                    f"micro_batch_rows × seq_len = {row_tokens}; raise train.batch.micro_batch_rows"
                )
        return self

    @model_validator(mode="after")
    def _rate_falls(self) -> Self:
        final, peak = self.schedule.final_learning_rate, self.peak_learning_rate
        if final > peak and self.schedule.name != "constant":
            name = "adamw" if self.model.lora else self.optimizer.name
            raise ValueError(
                f"train.schedule.final_learning_rate {final:g} exceeds the peak, train.optimizer.{name}."
                f"learning_rate {peak:g}; lower the one or raise the other"
            )
        return self

    @model_validator(mode="after")
    def _adapters_have_a_model(self) -> Self:
        if self.model.lora is None:
            return self
        if self.init_from is None:
            raise ValueError(
                "train.model.lora trains adapters of an existing model; name that model in train.init_from, or remove "
                "lora"
            )
        if self.precision.dtype == "fp8":
            raise ValueError("train.precision.dtype fp8 does not support adapters (train.model.lora); use bf16")
        if not any(is_adapter(p.name) for p in parameters(self.model)):
            raise ValueError(
                f"train.model.lora: train.model.layers has none of its targets ({self.model.lora.named}); name "
                "matrices of kinds that are in layers"
            )
        return self

    @property
    def begun_with(self) -> str:
        """The model of `init_from` as its folder names it, of a checkpoint its run and step; "" if there is none."""
        run, above, name = ("", "", "", *Path(self.init_from or "").parts)[-3:]
        return f"{run}, {name}" if above == "checkpoints" else name

    @property
    def decay_begins(self) -> int:
        """The step after which the learning rate falls; `steps` if it never does."""
        return self.steps - self.schedule.phases(self.steps, self.begun_with_steps)[1]

    @model_validator(mode="after")
    def _engine_has_its_section(self) -> Self:
        if self.megatron is not None and self.engine != "megatron":
            raise ValueError("train.megatron is for train.engine megatron; write that, or remove the section")
        if self.engine == "megatron" and (self.exporting.initial or self.exporting.checkpoints):
            raise ValueError(
                "train.export.initial and checkpoints are for train.engine yaongi; of Megatron only the last weights "
                "become a checkpoint of ours; remove them"
            )
        if self.engine == "megatron" and self.parallel != ParallelSpec():
            raise ValueError(
                "train.parallel is for train.engine yaongi; of Megatron write train.megatron (tensor_parallel, "
                "expert_parallel and so on) and train.parallel: {data: auto, shard: null, expert: 1, "
                "shard_optimizer: false}"
            )
        return self

    @model_validator(mode="after")
    def _rows_and_budget_are_not_both_open(self) -> Self:
        policy = self.runtime.activation_checkpointing
        has_budget = isinstance(policy, RecomputeSpec) and policy.budget_gib is not None
        if has_budget and self.batch.micro_batch_rows == "auto":
            raise ValueError(
                "train.batch.micro_batch_rows auto and train.runtime.activation_checkpointing.budget_gib would each "
                "decide by the other; write a number of rows, or none, selective, full, sqrt, every or layers"
            )
        return self

    def with_rows(self, rows: int) -> Self:
        """With this number for `batch.micro_batch_rows`."""
        return self.updated({"batch": {"micro_batch_rows": rows}})

    @property
    def evaluation_rows(self) -> int:
        """Rows of `tokens.seq_len` that are evaluated at once."""
        rows = self.batch.micro_batch_rows
        return max(1, CPU_TOKENS // self.tokens.seq_len) if rows == "auto" else rows

    def row_choices(self, world_size: int) -> list[int]:
        """The numbers of rows, rising, of which each rank can do a whole number of micro-batches in a step.

        Raises:
            SpecError: there is none.
        """
        tokens, seq_len = self.batch.tokens_per_step, self.tokens.seq_len
        if tokens % (seq_len * world_size):
            raise SpecError(
                f"train.batch.tokens_per_step {tokens} must be a multiple of seq_len × ranks = {seq_len} × "
                f"{world_size} = {seq_len * world_size}, so that each rank has whole rows"
            )
        own = tokens // (seq_len * world_size)
        choices = [rows for rows in range(1, own + 1) if own % rows == 0]
        for stage in self.tokens.curriculum:
            choices = [rows for rows in choices if rows * seq_len % (stage.seq_len or 1) == 0]
            if not choices:
                raise SpecError(
                    f"train.curriculum: no number of a rank's {own} rows of {seq_len} tokens is a multiple of seq_len "
                    f"{stage.seq_len}; raise train.batch.tokens_per_step"
                )
        return choices

    def check_shares(self, world_size: int) -> None:
        """Raises SpecError if the ranks cannot share a step equally."""
        (self.row_choices if self.batch.micro_batch_rows == "auto" else self.micro_batches)(world_size)

    def micro_batches(self, world_size: int) -> int:
        """Micro-batches per rank and step.

        Raises:
            SpecError: the ranks cannot share a step equally.
        """
        step_rows = self.batch.tokens_per_step // self.tokens.seq_len
        sharing = self.megatron.sharing if self.megatron else 1
        if world_size % sharing:
            raise SpecError(
                f"train.megatron: tensor × pipeline × context parallel = {sharing} must divide the {world_size} ranks; "
                "lower one of them, or change cluster.nodes or gpus_per_node"
            )
        sharers = world_size // sharing
        per_round = self.batch.rows * sharers
        if step_rows % per_round:
            raise SpecError(
                f"a step of {step_rows} rows cannot be shared by {sharers} {'data parallel ' * (sharing > 1)}ranks in "
                "micro-batches of "
                f"{self.batch.rows} rows; make train.batch.tokens_per_step a multiple of "
                f"{per_round * self.tokens.seq_len}"
            )
        return step_rows // per_round
