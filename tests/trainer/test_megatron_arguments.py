"""The arguments for Megatron-LM, its refusals and its memory: against the pinned release's options, and by hand."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import pytest

from manifests.spec import load_job
from trainer.errors import SpecError
from trainer.megatron.arguments import arguments, options, parsed, refuse_unknown
from trainer.megatron.check import Mesh, check
from trainer.megatron.memory import layers_of, step_memory
from trainer.optim.schedule import learning_rate_factor
from trainer.parameters import parameters
from trainer.preflight.storage import checkpoints_to_come
from trainer.spec import TrainSpec
from trainer.specbase import deep_merge

CHAT = {"template": "{messages:chat}"}


def spec_of(changes: dict[str, Any] | None = None) -> TrainSpec:
    return load_job("qwen3-30b-a3b-megatron").train_spec().updated(changes or {})


def given(changes: dict[str, Any] | None = None, dtype: Any = "fp8") -> dict[str, list[str]]:
    spec = spec_of(changes)
    command = arguments(spec, check(spec, 16), dtype)
    refuse_unknown(command)
    return parsed(command)


def test_the_arguments_of_qwen3_are_those_of_its_config_and_of_the_job():
    found = given()
    model = {  # config.json of Qwen/Qwen3-30B-A3B
        "--num-layers": "48", "--hidden-size": "2048", "--num-attention-heads": "32", "--num-query-groups": "4",
        "--kv-channels": "128", "--moe-ffn-hidden-size": "768", "--num-experts": "128", "--moe-router-topk": "8",
        "--rotary-base": "1000000", "--norm-epsilon": "1e-06", "--moe-aux-loss-coeff": "0.001",
    }  # fmt: skip
    parallel = {
        "--tensor-model-parallel-size": "4", "--pipeline-model-parallel-size": "2", "--global-batch-size": "256",
        "--expert-model-parallel-size": "8", "--expert-tensor-parallel-size": "1", "--micro-batch-size": "1",
    }  # fmt: skip
    assert {name: found[name][0] for name in model | parallel} == model | parallel
    flags = {"--swiglu", "--qk-layernorm", "--group-query-attention", "--untie-embeddings-and-output-weights"}
    assert flags | {"--sequence-parallel", "--use-distributed-optimizer", "--disable-bias-linear"} <= found.keys()
    assert found["--fp8-recipe"] == ["tensorwise"] and found["--fp8-format"] == ["hybrid"]
    assert "--fp8-format" not in given(dtype="bf16") and "--bf16" in given(dtype="bf16")
    # NullTokenizer has one id more than it is told; a padded vocabulary would change the embedding's shape.
    multiple = int(found["--make-vocab-size-divisible-by"][0]) * 4
    assert -(-(int(found["--vocab-size"][0]) + 1) // multiple) * multiple == 151936


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"runtime": {"activation_checkpointing": "selective"}, "checkpoint": {"asynchronous": False}},
        {"runtime": {"activation_checkpointing": "full"}, "evaluate": {"every_steps": 100}},
        {"schedule": {"name": "cosine"}, "optimizer": {"clip_norm": None}},
        {"schedule": {"name": "constant"}, "init_from": "/models/qwen3", "megatron": {"overlap": False}},
        {"schedule": {"name": "linear"}, "precision": {"fp8": {"recipe": "delayed", "bf16_end_layers": 0}}},
        {"megatron": {"virtual_pipeline": 4, "context_parallel": 2, "tensor_parallel": 2}},
        {
            "model": {
                "moe": {
                    "scores": "sigmoid",
                    "score_scale": 2.5,
                    "bias_update_rate": 1e-3,
                    "sequence_loss_weight": 1e-4,
                    "balance_loss_weight": 0,
                    "shared_width": 768,
                }
            }
        },
        {"model": {"moe": {"renormalise": False, "balance_loss_weight": 0}, "attention": {"rope_theta": None}}},
    ],
)
def test_every_argument_is_one_of_the_pinned_release(changes: dict[str, Any]):
    assert len(given(changes)) > 60


def test_the_options_are_read_as_argparse_would(tmp_path):
    """An independent reader of the same file: argparse, given every option that we use."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    kinds = {"int": int, "float": float, "str": str}
    for name, what in options().items():
        if name == "--help":
            continue
        if what["takes"] == "nothing":
            parser.add_argument(name, action="store_true")
        else:
            choices = [kinds[what["takes"]](each) for each in what["choices"]] if "choices" in what else None
            parser.add_argument(name, type=kinds[what["takes"]], choices=choices, nargs=what.get("values"))
    spec = spec_of()
    read = parser.parse_args(arguments(spec, check(spec, 16), "fp8"))
    assert read.lr == 3e-4 and read.recompute_modules is None and read.moe_layer_freq == str([1] * 48).replace(" ", "")


def test_an_option_that_the_release_lacks_is_refused():
    for command, said in (
        (["--context-paralel-size", "2"], "no such option"),
        (["--lr-decay-style", "sqrt"], "takes constant, linear, cosine"),
        (["--num-layers", "many"], "takes int"),
        (["--num-layers"], "takes 1 values, got none"),
    ):
        with pytest.raises(SpecError, match=said):
            refuse_unknown(command)


@pytest.mark.parametrize("schedule", [{}, {"decay_shape": "cosine"}, {"name": "cosine"}, {"name": "linear"}])
def test_the_rate_of_a_step_is_that_of_our_own_schedule(schedule: dict[str, Any]):
    """By the formula of core/optimizer_param_scheduler.py (get_lr), of iterations done: a step has the rate that our
    own engine gives the step before, and the first has none."""
    spec = spec_of({"schedule": schedule, "steps": 1000})
    found = {name: values for name, values in parsed(arguments(spec, check(spec, 16), "bf16")).items() if values}
    peak, low = float(found["--lr"][0]), float(found["--min-lr"][0])
    warmup, total = int(found["--lr-warmup-iters"][0]), int(found["--lr-decay-iters"][0])

    def rate(done: int) -> float:
        if done <= warmup:
            return peak * done / warmup
        ratio = (done - warmup) / (total - warmup)
        style = found["--lr-decay-style"][0]
        if style == "WSD":
            decay = int(found["--lr-wsd-decay-iters"][0])
            ratio = max(0.0, (done - total + decay) / decay)
            style = found["--lr-wsd-decay-style"][0]
        share = 1 - ratio if style == "linear" else 0.5 * (1 + math.cos(math.pi * ratio))
        return low + share * (peak - low)

    for step in (5, 50, 500, 850, 999):
        own = peak * learning_rate_factor(step - 1, spec.steps, spec.schedule, peak)
        assert rate(step) == pytest.approx(own, rel=1e-9), step


REFUSALS = {
    "megatron.tensor_parallel 8 must divide the 32 heads and 4 key/value heads": {"megatron": {"tensor_parallel": 8}},
    "pipeline_parallel 5": {"megatron": {"pipeline_parallel": 5}},
    "expert_parallel 6 must divide the 128 experts; write 4": {"megatron": {"expert_parallel": 6}},
    "must divide the 16 ranks": {"megatron": {"context_parallel": 4}},
    "of which there is 1": {"megatron": {"tensor_parallel": 1, "sequence_parallel": True}},
    "only with it; write true": {"megatron": {"sequence_parallel": False}},
    "tokens_per_step a multiple of 8192": {"batch": {"tokens_per_step": 4096 * 3}},
    "seq_len 4100 must be a multiple of 8": {
        "tokens": {"seq_len": 4100}, "batch": {"tokens_per_step": 4100 * 256}, "megatron": {"tensor_parallel": 8},
    },
    "vocab_size 151937 must be a multiple of tensor_parallel 4": {"model": {"vocab_size": 151937}},
    "virtual_pipeline: the 3 micro-batches": {
        "batch": {"tokens_per_step": 4096 * 6}, "megatron": {"virtual_pipeline": 2},
    },
    "name muon: Megatron core 0.12 has AdamW": {"optimizer": {"name": "muon"}},
    "spike_guard: Megatron skips no spikes": {"optimizer": {"spike_guard": {}}},
    "decay_shape sqrt": {"schedule": {"decay_shape": "sqrt"}},
    "recipe block128": {"precision": {"fp8": {"recipe": "block128"}}},
    "mtp: multi-token prediction": {"model": {"mtp": {}}},
    "packing best_fit": {"tokens": {"packing": "best_fit"}},
    "one loss that balances": {"model": {"moe": {"sequence_loss_weight": 0.1}}},
    "no bias anywhere": {"model": {"attention": {"bias": True}}},
    "state_dtype bf16": {"optimizer": {"state_dtype": "bf16"}},
    "dtype fp16": {"precision": {"dtype": "fp16"}},
    "bf16_end_layers 25: Megatron allows as many as a pipeline rank has; write 24": {
        "precision": {"fp8": {"bf16_end_layers": 25}},
    },
    "rope_theta 10000.5: Megatron core 0.12 wants a whole number": {"model": {"attention": {"rope_theta": 10000.5}}},
}  # fmt: skip


@pytest.mark.parametrize("said", REFUSALS)
def test_what_megatron_cannot_train_is_refused_in_one_line(said: str):
    with pytest.raises(SpecError) as caught:
        check(spec_of(REFUSALS[said]), 16)
    assert [line for line in str(caught.value).splitlines() if said in line], caught.value


def test_one_expert_for_a_token_has_no_renormalised_score_to_refuse():
    """topk_softmax_with_capacity of core/transformer/moe/moe_utils.py renormalises sigmoid scores if topk > 1."""
    moe = {"scores": "sigmoid", "top_k": 1, "renormalise": False}
    check(spec_of({"model": {"moe": moe}}), 16)
    with pytest.raises(SpecError, match="renormalises sigmoid scores"):
        check(spec_of({"model": {"moe": {**moe, "top_k": 2}}}), 16)


def test_layers_that_its_gpt_lacks_are_named():
    tiny = load_job("tiny").train_spec().updated({"engine": "megatron"})
    with pytest.raises(SpecError, match=r"layer 0 is 'ME'.*\*-.*\n(.|\n)*write adamw"):
        check(tiny, 1)


def test_the_section_needs_the_engine_and_the_engine_its_own_parallelism():
    own = load_job("qwen3-30b-a3b").train_spec()
    with pytest.raises(SpecError, match="write that, or remove the section"):
        own.updated({"megatron": {}})
    with pytest.raises(SpecError, match="parallel is for train"):
        own.updated({"engine": "megatron"})


def test_state_is_6_bytes_of_a_weight_and_12_over_the_ranks_that_hold_it():
    """A dense model by hand: every matrix over TP 4, embedding on the first and head on the last of two stages."""
    dense = {
        "model": {
            "layers": ["*-"] * 48,
            "moe": None,
            "mlp": {"width": 6144, "activation": "swiglu"},
        },
        "megatron": {"expert_parallel": 1},
    }
    spec = spec_of(dense)
    found = step_memory(spec, check(spec, 16))
    q, kv, mlp = 2048 * 4096, 2048 * 512, 3 * 2048 * 6144
    matrices = 24 * (2 * q + 2 * kv + mlp) + 151936 * 2048
    norms = 24 * (2 * 2048 + 2 * 128)
    weights = matrices // 4 + norms + 2048  # the last stage also has the final norm
    assert found.weights == 2 * weights and found.gradients == 4 * weights
    assert found.optimizer == 12 * weights / 2  # DP 2
    alone = step_memory(spec.updated({"megatron": {"distributed_optimizer": False}}), check(spec, 16))
    assert alone.state == 18 * weights


def test_experts_are_split_over_their_own_ranks():
    spec = spec_of()
    mesh = check(spec, 16)
    assert (mesh.data, mesh.expert_data, mesh.micro_batches) == (2, 1, 128)
    everything = sum(p.count for p in parameters(spec.model))
    assert everything == pytest.approx(30.5e9, rel=0.01)  # the model card's number
    experts = 24 * 128 * 3 * 2048 * 768 // 8
    others = 24 * (2 * 2048 * 4096 + 2 * 2048 * 512) // 4 + 151936 * 2048 // 4
    assert step_memory(spec, mesh).state == pytest.approx(18 * experts + 12 * others, rel=0.01)


def test_activations_fall_with_each_policy_and_with_fewer_micro_batches_in_flight():
    spec = spec_of()
    mesh = check(spec, 16)
    kept = [
        step_memory(spec.updated({"runtime": {"activation_checkpointing": policy}}), mesh).activations
        for policy in ("none", "selective", "full")
    ]
    assert kept[0] > kept[1] > 3 * kept[2]


def test_interleaved_stages_hold_every_other_part():
    mesh = Mesh(1, 2, 2, 1, 1, 1, 1, 1, 4)
    assert [layers_of(mesh, stage, 8) for stage in (0, 1)] == [[0, 1, 4, 5], [2, 3, 6, 7]]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"cluster": {"gpu_memory_gib": 24}}, "raise train.megatron.expert_parallel"),
        ({"cluster": {"gpu_memory_gib": 40}}, "lower train.batch.micro_batch_rows 1"),
        ({"train": {"batch": {"micro_batch_rows": 8}}}, "activation_checkpointing full"),
        ({"train": {"megatron": {"tensor_parallel": 8}}}, "write 4"),
        ({"cluster": {"nodes": 1, "gpus_per_node": 3}}, "must divide the 3 ranks"),
        ({"data": {"sources": {"ko-web": {"loss": "answers", **CHAT}}}}, "trains on all tokens"),
    ],
)
def test_a_job_that_cannot_run_is_refused_before_it_is_launched(changes: dict[str, Any], said: str):
    with pytest.raises(SpecError, match=said):
        load_job("qwen3-30b-a3b-megatron", changes)


def test_the_layout_is_no_part_of_the_runs_name_and_the_engine_is():
    job, other = (
        load_job("qwen3-30b-a3b-megatron", {"train": {"megatron": {"tensor_parallel": size}}}) for size in (4, 2)
    )
    own = {"engine": "yaongi", "megatron": None}
    assert job.run_name == other.run_name
    assert job.run_name != load_job("qwen3-30b-a3b-megatron", {"train": own}).run_name
    assert deep_merge({}, own)["engine"] == "yaongi"


def test_room_for_checkpoints_is_that_of_megatrons(tmp_path: Path):
    spec = spec_of({"steps": 1000, "checkpoint": {"every_steps": 100, "keep_last": 2}})
    assert checkpoints_to_come(spec, tmp_path) == (4, 14 * sum(p.count for p in parameters(spec.model)))
    (tmp_path / "megatron" / "iter_0000100").mkdir(parents=True)
    assert checkpoints_to_come(spec, tmp_path)[0] == 3
