"""From a TrainSpec to the arguments of Megatron-LM's pretrain_gpt.py. Imports no torch.

The options and their meaning: `megatron/training/arguments.py` of the release in OPTIONS, a file that
makers/megatron_options.py made from it. Every argument is checked against that file, because Megatron's own parser is
only in its image.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from trainer.checkpoints.checkpoint import MEGATRON_FOLDER
from trainer.errors import SpecError
from trainer.megatron.check import Mesh
from trainer.megatronspec import MegatronSpec
from trainer.modelspec import ModelSpec
from trainer.spec import ScheduleSpec, TrainSpec

RELEASE = "core_v0.12.3"
OPTIONS = f"options-{RELEASE}.json"
CACHE, BLEND, BEGIN = "megatron/cache", "megatron/blend.json", "megatron/begin"
FP8_RECIPES = {"current": "tensorwise", "delayed": "delayed"}
Dtype = Literal["fp8", "bf16"]
Argument = tuple[str, tuple[Any, ...]]


@cache
def options() -> dict[str, dict[str, Any]]:
    """Option → what it takes (nothing, int, float or str), its choices, and its number of values if that is not 1."""
    found: dict[str, dict[str, Any]] = json.loads((files("trainer.megatron") / OPTIONS).read_text("utf-8"))["options"]
    return found


def arguments(spec: TrainSpec, mesh: Mesh, dtype: Dtype, *, fused_gradients: bool = True) -> list[str]:
    """The command line of pretrain_gpt.py.

    Args:
        dtype: of matrix products, when `precision.dtype` is resolved.
        fused_gradients: whether APEX's kernel that adds up weight gradients is there.
    """
    layout = spec.megatron or MegatronSpec()
    made = [*_model(spec.model), *_batch(spec), *_optimizer(spec), *_schedule(spec), *_precision(spec, dtype)]
    made += [*_layout(layout, mesh, spec.model), *_recompute(spec), *_files(spec), *_rest(spec)]
    if spec.model.moe is not None and any("E" in layer for layer in spec.model.layers):
        made += _experts(spec.model)
    if not fused_gradients:
        made.append(flag("--no-gradient-accumulation-fusion"))
    return [text for name, values in made for text in (name, *map(_text, values))]


def flag(name: str) -> Argument:
    return name, ()


def option(name: str, *values: Any) -> Argument:
    return name, values


def _text(value: Any) -> str:
    return repr(value) if isinstance(value, float) else str(value)


def _model(model: ModelSpec) -> Iterator[Argument]:
    attention, mlp = model.attention, model.mlp
    assert attention is not None, "check has seen attention in every layer"
    yield option("--num-layers", len(model.layers))
    yield option("--hidden-size", model.hidden)
    yield option("--num-attention-heads", attention.num_heads)
    yield flag("--group-query-attention")
    yield option("--num-query-groups", attention.num_kv_heads)
    yield option("--kv-channels", attention.head_dim)
    if mlp is not None and any("-" in layer for layer in model.layers):
        yield option("--ffn-hidden-size", mlp.width)
    elif model.moe is not None:
        yield option("--ffn-hidden-size", model.moe.expert_width)
    used = model.moe if model.moe is not None and any("E" in layer for layer in model.layers) else mlp
    assert used is not None
    yield flag("--swiglu" if used.activation == "swiglu" else "--squared-relu")
    if not attention.bias:
        yield flag("--disable-bias-linear")
    if attention.qk_norm:
        yield flag("--qk-layernorm")
    yield option("--normalization", "RMSNorm")
    yield option("--norm-epsilon", model.norm_eps)
    if attention.rope_theta is None:
        yield option("--position-embedding-type", "none")
    else:
        yield option("--position-embedding-type", "rope")
        yield option("--rotary-base", round(attention.rope_theta))
    if not model.tied_embedding:
        yield flag("--untie-embeddings-and-output-weights")
    yield option("--init-method-std", model.init_std)
    yield option("--attention-dropout", 0.0)
    yield option("--hidden-dropout", 0.0)
    # The shards hold ids. That tokenizer counts one id more than it is told, and padding would change the embedding.
    yield option("--tokenizer-type", "NullTokenizer")
    yield option("--vocab-size", model.vocab_size - 1)
    yield option("--make-vocab-size-divisible-by", 1)


def _experts(model: ModelSpec) -> Iterator[Argument]:
    moe = model.moe
    assert moe is not None
    yield option("--num-experts", moe.num_experts)
    yield option("--moe-router-topk", moe.top_k)
    yield option("--moe-ffn-hidden-size", moe.expert_width)
    yield option("--moe-layer-freq", str([int("E" in layer) for layer in model.layers]).replace(" ", ""))
    if moe.shared_width:
        yield option("--moe-shared-expert-intermediate-size", moe.shared_width)
    yield option("--moe-router-score-function", moe.scores)
    if moe.scores == "softmax" and (not moe.renormalise or moe.top_k == 1):
        yield flag("--moe-router-pre-softmax")  # the softmax of all, of which the chosen ones are not renormalised
    if moe.score_scale != 1:
        yield option("--moe-router-topk-scaling-factor", moe.score_scale)
    if moe.bias_update_rate:
        yield flag("--moe-router-enable-expert-bias")
        yield option("--moe-router-bias-update-rate", moe.bias_update_rate)
    if weight := moe.balance_loss_weight or moe.sequence_loss_weight:
        yield option("--moe-router-load-balancing-type", "aux_loss" if moe.balance_loss_weight else "seq_aux_loss")
        yield option("--moe-aux-loss-coeff", weight)
    else:
        yield option("--moe-router-load-balancing-type", "none")
    yield option("--moe-router-dtype", "fp32")  # routing is FP32 in our own engine too
    yield option("--moe-token-dispatcher-type", "alltoall")
    yield flag("--moe-grouped-gemm")


def _batch(spec: TrainSpec) -> Iterator[Argument]:
    yield option("--seq-length", spec.tokens.seq_len)
    yield option("--max-position-embeddings", spec.tokens.seq_len)
    yield option("--micro-batch-size", spec.batch.rows)
    yield option("--global-batch-size", spec.batch.tokens_per_step // spec.tokens.seq_len)
    yield option("--train-iters", spec.steps)
    yield option("--seed", 1 + spec.seed)  # Megatron wants one above 0


def _optimizer(spec: TrainSpec) -> Iterator[Argument]:
    adamw = spec.optimizer.adamw
    yield option("--optimizer", "adam")
    yield option("--lr", adamw.learning_rate)
    yield option("--adam-beta1", adamw.beta1)
    yield option("--adam-beta2", adamw.beta2)
    yield option("--adam-eps", adamw.eps)
    yield option("--weight-decay", adamw.weight_decay)
    yield option("--clip-grad", spec.optimizer.clip_norm or 0.0)


def _schedule(spec: TrainSpec) -> Iterator[Argument]:
    schedule: ScheduleSpec = spec.schedule
    warmup, decay = schedule.phases(spec.steps, spec.begun_with_steps)
    yield option("--lr-warmup-iters", warmup)
    yield option("--lr-decay-iters", spec.steps)
    if not decay:
        yield option("--lr-decay-style", "constant")
    else:
        yield option("--lr-decay-style", "WSD" if schedule.name == "wsd" else schedule.name)
        yield option("--min-lr", schedule.final_learning_rate)
    if decay and schedule.name == "wsd":
        yield option("--lr-wsd-decay-style", schedule.decay_shape)
        yield option("--lr-wsd-decay-iters", decay)
    yield flag("--override-opt_param-scheduler")  # a run that was made longer has another schedule than its checkpoint


def _precision(spec: TrainSpec, dtype: Dtype) -> Iterator[Argument]:
    yield flag("--bf16")
    if dtype == "bf16":
        return
    fp8 = spec.precision.fp8
    yield option("--fp8-format", "hybrid" if fp8.hybrid else "e4m3")
    yield option("--fp8-recipe", FP8_RECIPES[fp8.recipe])
    if fp8.recipe == "delayed":
        yield option("--fp8-margin", fp8.margin)
        yield option("--fp8-amax-history-len", fp8.amax_history_steps)
        yield option("--fp8-amax-compute-algo", "max")
    elif fp8.bf16_end_layers:
        yield flag("--first-last-layers-bf16")
        yield option("--num-layers-at-start-in-bf16", fp8.bf16_end_layers)
        yield option("--num-layers-at-end-in-bf16", fp8.bf16_end_layers)


def _layout(layout: MegatronSpec, mesh: Mesh, model: ModelSpec) -> Iterator[Argument]:
    yield option("--tensor-model-parallel-size", mesh.tensor)
    yield option("--pipeline-model-parallel-size", mesh.pipeline)
    if mesh.virtual > 1:
        yield option("--num-virtual-stages-per-pipeline-rank", mesh.virtual)
    yield option("--context-parallel-size", mesh.context)
    if model.moe is not None:
        yield option("--expert-model-parallel-size", mesh.expert)
        yield option("--expert-tensor-parallel-size", mesh.expert_tensor)
    if layout.splits_sequence:
        yield flag("--sequence-parallel")
    if layout.distributed_optimizer:
        yield flag("--use-distributed-optimizer")
    if layout.overlap:
        yield flag("--overlap-grad-reduce")
        if layout.distributed_optimizer:
            yield flag("--overlap-param-gather")
    yield option("--num-workers", layout.workers)


def _recompute(spec: TrainSpec) -> Iterator[Argument]:
    policy = spec.runtime.activation_checkpointing
    if policy == "none":
        return
    yield option("--recompute-granularity", policy)
    if policy == "selective":
        experts = spec.model.moe is not None and any("E" in layer for layer in spec.model.layers)
        yield option("--recompute-modules", "layernorm", *(["moe_act"] if experts else []))
    else:
        yield option("--recompute-method", "uniform")
        yield option("--recompute-num-layers", 1)


def _files(spec: TrainSpec) -> Iterator[Argument]:
    run = Path(spec.run_dir)
    yield option("--per-split-data-args-path", run / BLEND)
    yield option("--data-cache-path", run / CACHE)
    yield option("--save", run / MEGATRON_FOLDER)
    yield option("--load", run / MEGATRON_FOLDER)  # empty at first, which is a start from random weights
    if spec.init_from is not None:
        yield option("--pretrained-checkpoint", run / BEGIN)  # read while there is nothing to load
    yield option("--save-interval", spec.checkpoint.every_steps)
    yield option("--ckpt-format", "torch_dist")
    if spec.checkpoint.asynchronous:
        yield flag("--async-save")
    yield option("--tensorboard-dir", run / "tb" / "megatron")


def validation_iterations(spec: TrainSpec) -> int:
    """Steps of one validation, from its number of tokens; 0 without validation."""
    if not spec.evaluate.every_steps:
        return 0
    return math.ceil(spec.evaluate.every_max_tokens / spec.batch.tokens_per_step)


def _rest(spec: TrainSpec) -> Iterator[Argument]:
    yield option("--eval-interval", spec.evaluate.every_steps or spec.steps)
    yield option("--eval-iters", validation_iterations(spec))
    yield option("--log-interval", 1)  # each step is a line of metrics.jsonl
    yield flag("--log-throughput")
    yield flag("--exit-signal-handler")
    yield option("--distributed-timeout-minutes", math.ceil(spec.runtime.communication_timeout_seconds / 60))
    yield flag("--no-create-attention-mask-in-dataloader")  # it is causal, and 2 bytes × seq_len² a row
    yield flag("--no-one-logger")


def refuse_unknown(command: Sequence[str], known: dict[str, dict[str, Any]] | None = None) -> None:
    """Compare a command line with the options of a release (default: the pinned one).

    Raises:
        SpecError: an option that the release does not have, a missing or surplus value, or one of another type or
            outside the choices.
    """
    known = options() if known is None else known
    for name, values in parsed(command).items():
        if name not in known:
            raise SpecError(f"{name}: Megatron {RELEASE} has no such option; use a release that has it")
        what = known[name]
        wanted = what.get("values", 0 if what["takes"] == "nothing" else 1)
        if isinstance(wanted, int) and len(values) != wanted:
            raise SpecError(f"{name} takes {wanted} values, got {' '.join(values) or 'none'}")
        for value in values:
            if not _is(value, what["takes"]) or ("choices" in what and value not in map(str, what["choices"])):
                choices = ", ".join(map(str, what.get("choices", []))) or what["takes"]
                raise SpecError(f"{name} {value}: Megatron {RELEASE} takes {choices}")


def parsed(command: Sequence[str]) -> dict[str, list[str]]:
    """Option → its values."""
    found: dict[str, list[str]] = {}
    for text in command:
        if text.startswith("--"):
            found[text] = []
        else:
            found[next(reversed(found))].append(text)
    return found


def _is(value: str, kind: str) -> bool:
    try:
        if kind in ("int", "float"):
            int(value) if kind == "int" else float(value)
    except ValueError:
        return False
    return True
