"""However ranks share the model, the run is the same: losses, gradient norms, initial weights, checkpoints."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import micro
import parallel_ranks
import pytest
import torch

from trainer.checkpoints import checkpoint
from trainer.exitcodes import ExitCode
from trainer.spec import ParallelSpec, TrainSpec
from trainer.specbase import deep_merge
from trainer.trained import load_trained

pytestmark = pytest.mark.timeout(1200)

LAYERS = {  # every kind of layer, experts twice and beside a shared one, and a module that predicts further ahead
    "layers": ["ME", "N", "*-", "E"],
    "moe": {"num_experts": 4, "top_k": 2, "expert_width": 32, "shared_width": 16},
    "mtp": {"depth": 1, "layer": "*E"},
}
DECODER = {  # what the hybrid has not, all at once
    "layers": ["*-", "*E"],
    "engram": [],
    "mtp": None,
    "attention": {"rope_theta": 1e4, "qk_norm": True, "bias": True},
    "mlp": {"activation": "swiglu", "bias": True},
    "moe": {"shared_width": 16, "activation": "swiglu", "scores": "softmax", "balance_loss_weight": 0.01},
    "tied_embedding": True,
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "ddp": {"data": "ddp"},
    "fsdp": {"data": "fsdp"},
    "hybrid": {"shard": 2},
    "experts": {"expert": 2},
    "all experts": {"expert": 4},
    "experts and fsdp": {"expert": 2, "data": "fsdp"},
    "sharded optimizer": {"shard_optimizer": True},
    "sharded optimizer and experts": {"shard_optimizer": True, "expert": 2},
}


# Muon turns rounding in directions that hardly have a gradient into updates: ranks that sum in another order drift
# apart in proportion to the rate, until one sends a token to another expert. At this one 12 steps stay within 2e-7 of
# each other, whatever instructions the processor has.
RATES = {"muon": {"learning_rate": 1e-4}, "adamw": {"learning_rate": 1e-4}}
CLOSE = 2e-6  # of the loss, which 12 steps change by 7e-4


def spec_of(data: Path, directory: Path, layout: str, **changes: Any) -> TrainSpec:
    fixed = {"model": LAYERS, "optimizer": RATES, "parallel": LAYOUTS.get(layout, {})}
    return micro.micro_spec(data, directory / layout.replace(" ", "-"), **deep_merge(fixed, changes))


def assert_equal_runs(spec: TrainSpec, reference: list[dict[str, Any]]) -> None:
    """Losses of all steps; gradients and loads of the first ones, before rounding can have grown."""
    lines = micro.metrics(spec)
    assert [line["step"] for line in lines] == [line["step"] for line in reference]
    for line, expected in zip(lines, reference, strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=CLOSE), (spec.parallel, line["step"])
        assert line["auxiliary"] == pytest.approx(expected["auxiliary"], rel=CLOSE), (spec.parallel, line["step"])
        if line["step"] <= 3:
            assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=2e-5), (spec.parallel, line["step"])
            assert line["expert_load_max_ratio"] == expected["expert_load_max_ratio"], "loads are those of all ranks"


def check_layouts(data: Path, directory: Path, ranks: int, layouts: list[str], **changes: Any) -> list[TrainSpec]:
    """Train under each layout and on one rank; returns the specs, the one of the single rank last."""
    specs = [spec_of(data, directory / str(ranks), layout, **changes) for layout in layouts]
    alone = spec_of(data, directory / str(ranks), "alone", **changes)
    (whole,) = parallel_ranks.run([alone], 1, directory)[0]
    reference = micro.metrics(alone)
    for layout, spec, observed in zip(layouts, specs, parallel_ranks.run(specs, ranks, directory), strict=True):
        assert_equal_runs(spec, reference)
        for rank in observed:
            assert rank["same_weights"], f"{layout}: the initial weights depend on the ranks"
            assert rank["refuses_broken_weights"], f"{layout}: what one rank finds, all must know"
            assert rank["parameters"] <= share_of(whole, spec, ranks), layout
        divided = ranks if spec.parallel.shard_optimizer else 1
        state = sum(rank["state"] for rank in observed)
        if divided > 1 and spec.parallel.expert == 1:
            assert state == whole["state"], "each element of the state is on one rank"
    return [*specs, alone]


def share_of(whole: dict[str, int], spec: TrainSpec, ranks: int) -> float:
    """Most elements that a rank may keep; rows that do not divide are rounded up, hence the tenth on top."""
    shard = spec.parallel.shard or (ranks if spec.parallel.data == "fsdp" else 1)
    by_expert = spec.parallel.expert if spec.parallel.expert > 1 else shard
    dense = whole["parameters"] - whole["experts"] - whole["small"]
    return (1.1 if shard > 1 else 1.0) * (dense / shard + whole["experts"] / by_expert) + whole["small"]


def continue_from(spec: TrainSpec, layout: str, directory: Path) -> TrainSpec:
    """The run of `spec` as it was after its first checkpoint, to be continued under another layout."""
    parallel = {**ParallelSpec().model_dump(), **LAYOUTS.get(layout, {})}
    other: TrainSpec = spec.updated({"run_dir": str(directory / layout), "parallel": parallel})
    first = checkpoint.published(spec.run_dir)[-1]
    shutil.copytree(first, checkpoint.step_dir(other.run_dir, int(first.name.removeprefix("step-"))))
    return other


def check_continued(specs: list[TrainSpec], ranks: int, alone: TrainSpec, directory: Path) -> None:
    """Go on from the middle of a run, under another layout and with fewer ranks; the rest is as on one rank."""
    parallel_ranks.run(specs, ranks, directory)
    reference = micro.metrics(alone)
    rest = reference[len(reference) // 2 :]
    for spec in specs:
        lines = micro.metrics(spec)
        assert [line["step"] for line in lines] == [line["step"] for line in rest]
        for line, expected in zip(lines, rest, strict=True):
            assert line["loss"] == pytest.approx(expected["loss"], rel=CLOSE), (spec.parallel, line["step"])


def test_two_ranks_repeat_one_and_their_checkpoint_is_anybodys(micro_data: Path, tmp_path: Path):
    keep = {"every_steps": 2, "keep_last": 9}
    specs = check_layouts(micro_data, tmp_path, 2, ["experts and fsdp", "sharded optimizer"], steps=4, checkpoint=keep)
    for spec in specs[:2]:
        trained = load_trained(spec, torch.device("cpu"))
        alone = load_trained(specs[-1], torch.device("cpu"))
        for name, tensor in alone.model.state_dict().items():
            torch.testing.assert_close(trained.model.state_dict()[name], tensor, rtol=1e-3, atol=1e-5)


def test_two_ranks_repeat_one_with_a_decoder_and_the_loss_on_answers(answers_data: Path, tmp_path: Path):
    check_layouts(
        answers_data, tmp_path, 2, ["experts and fsdp", "sharded optimizer and experts"], steps=3, model=DECODER
    )


@pytest.mark.slow
@pytest.mark.proof
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_four_ranks_repeat_one_with_a_decoder_under_every_layout(micro_data: Path, tmp_path: Path, dtype: str):
    if dtype == "fp32":
        check_layouts(micro_data, tmp_path, 4, list(LAYOUTS), steps=4, model=DECODER)
    else:
        check_narrow(micro_data, tmp_path, dtype, ["ddp", "fsdp", "experts and fsdp"], model=DECODER)


@pytest.mark.slow
def test_four_ranks_repeat_one_and_their_checkpoint_is_for_any_layout(micro_data: Path, tmp_path: Path):
    """The layouts that need four; the rest are trained on two ranks elsewhere, and on four with the proofs."""
    keep = {"every_steps": 4, "keep_last": 9, "asynchronous": False}
    layouts = ["hybrid", "all experts", "sharded optimizer and experts"]
    *cut, alone = check_layouts(micro_data, tmp_path, 4, layouts, steps=8, checkpoint=keep)
    hybrid, _, divided = cut
    onto_two = [continue_from(hybrid, "ddp", tmp_path), continue_from(divided, "fsdp", tmp_path)]
    check_continued(onto_two, 2, alone, tmp_path)
    check_continued([continue_from(hybrid, "alone", tmp_path)], 1, alone, tmp_path)


@pytest.mark.slow
@pytest.mark.proof
def test_four_ranks_repeat_one_under_every_layout(micro_data: Path, tmp_path: Path):
    keep = {"every_steps": 6, "keep_last": 9, "asynchronous": False}
    *cut, alone = check_layouts(micro_data, tmp_path, 4, list(LAYOUTS), checkpoint=keep)
    by_name = dict(zip(LAYOUTS, cut, strict=True))
    onto_two = [
        continue_from(by_name["fsdp"], "ddp", tmp_path),
        continue_from(by_name["experts and fsdp"], "sharded optimizer", tmp_path),
        continue_from(by_name["sharded optimizer and experts"], "fsdp", tmp_path),
        continue_from(by_name["ddp"], "experts and fsdp", tmp_path),
    ]
    check_continued(onto_two, 2, alone, tmp_path)
    check_continued([continue_from(by_name["hybrid"], "alone", tmp_path)], 1, alone, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "layouts"),
    [
        ("bf16", ["fsdp", "experts"]),
        ("fp16", ["experts and fsdp"]),
        pytest.param("bf16", ["experts and fsdp"], marks=pytest.mark.proof),
        pytest.param("fp16", ["fsdp", "experts"], marks=pytest.mark.proof),
    ],
)
def test_narrow_types_and_adamw_keep_their_meaning_when_cut(
    micro_data: Path, tmp_path: Path, dtype: str, layouts: list[str]
):
    """A weight is rounded alike before and after it is gathered; FP16's loss scale is the same on all ranks."""
    check_narrow(micro_data, tmp_path, dtype, layouts)


def check_narrow(micro_data: Path, tmp_path: Path, dtype: str, layouts: list[str], **more: Any) -> None:
    """Two ranks under each layout against one."""
    changes = {"steps": 6, "precision": {"dtype": dtype}, "optimizer": {"name": "adamw"}, **more}
    specs = [spec_of(micro_data, tmp_path, layout, **changes) for layout in layouts]
    alone = spec_of(micro_data, tmp_path, "alone", **changes)
    parallel_ranks.run([alone], 1, tmp_path)
    parallel_ranks.run(specs, 2, tmp_path)
    reference = micro.metrics(alone)
    for spec in specs:
        for line, expected in zip(micro.metrics(spec), reference, strict=True):
            assert line["loss"] == pytest.approx(expected["loss"], rel=1e-3), (spec.parallel, line["step"])


ENGRAM = {"layer": 0, "rows_per_head": 50, "width_per_order": 16, "num_heads": 2}


@pytest.mark.slow
@pytest.mark.parametrize(
    "model",
    [
        pytest.param({"layers": ["NE"], "mtp": None, "engram": [ENGRAM]}, id="one layer"),
        pytest.param({}, id="all kinds", marks=pytest.mark.proof),
    ],
)
def test_compiled_and_recomputing_layers_train_cut_as_whole(micro_data: Path, tmp_path: Path, model: dict[str, Any]):
    """FSDP's hooks of Engram's tables and the experts' exchange lie inside of layers, where the graph breaks."""
    alone = spec_of(micro_data, tmp_path, "alone", steps=3, model=model)
    compiled = {"compile": True, "activation_checkpointing": "selective"}
    cut = spec_of(micro_data, tmp_path, "experts and fsdp", steps=3, model=model, runtime=compiled)
    parallel_ranks.run([alone], 1, tmp_path)
    parallel_ranks.run([cut], 2, tmp_path)
    assert_equal_runs(cut, micro.metrics(alone))


@pytest.mark.slow
def test_entrypoint_logs_the_mesh_and_resumes_bit_for_bit_under_fsdp_and_experts(micro_data: Path, tmp_path: Path):
    spec = spec_of(micro_data, tmp_path, "experts and fsdp", steps=8)
    code, output = micro.finish(micro.start(spec, ranks=2))
    assert code == 0, output
    assert "mesh (copies x ranks of one copy): fsdp=1x2,experts=1x2" in output
    whole = micro.metrics(spec)
    again = continue_from(spec, "experts and fsdp", tmp_path / "again")
    code, output = micro.finish(micro.start(again, ranks=2))
    assert code == 0, output
    assert [line["loss"] for line in micro.metrics(again)] == [line["loss"] for line in whole[4:]]


def test_mesh_that_the_ranks_cannot_form_ends_with_2_in_one_line(micro_data: Path, tmp_path: Path):
    process = micro.start(micro.micro_spec(micro_data, tmp_path / "run", parallel={"expert": 3}))
    code, output = micro.finish(process)
    assert code == ExitCode.SPEC and "Traceback" not in output
    (line,) = (line for line in output.splitlines() if line.startswith("exit 2"))
    assert "train.parallel.expert 3 must divide the 1 ranks" in line and "write one of 1" in line
