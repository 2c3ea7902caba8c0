"""The run is the same in every layout of ranks: losses, gradient norms, initial weights, checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import micro
import parallel_ranks
import pytest
import torch
from parallel_ranks import Case

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
NARROW = 1e-3  # the same with narrow types
Seen = dict[str, list[dict[str, Any]]]


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


class Comparison:
    """Runs under several layouts, and the same run on one rank."""

    def __init__(self, data: Path, directory: Path, ranks: int, layouts: list[str], **changes: Any) -> None:
        self.ranks = ranks
        self.cut = {layout: spec_of(data, directory, layout, **changes) for layout in layouts}
        self.alone = spec_of(data, directory, "alone", **changes)
        self.whole: dict[str, Any] = {}
        self.observed: dict[str, list[dict[str, Any]]] = {}

    def check(self, close: float | None = None) -> None:
        """Losses, and what each rank holds.

        Args:
            close: relative; only losses are compared, so closely.
        """
        reference = micro.metrics(self.alone)
        for layout, spec in self.cut.items():
            if close is None:
                assert_equal_runs(spec, reference)
                check_shares(layout, spec, self.ranks, self.observed[layout], self.whole)
                continue
            for line, expected in zip(micro.metrics(spec), reference, strict=True):
                assert line["loss"] == pytest.approx(expected["loss"], rel=close), (spec.parallel, line["step"])


def check_shares(
    layout: str, spec: TrainSpec, ranks: int, observed: list[dict[str, Any]], whole: dict[str, Any]
) -> None:
    for rank in observed:
        assert rank["same_weights"], f"{layout}: the initial weights depend on the ranks"
        assert rank["refuses_broken_weights"], f"{layout}: what one rank finds, all must know"
        assert rank["parameters"] <= share_of(whole, spec, ranks), layout
    divided = ranks if spec.parallel.shard_optimizer else 1
    state = sum(rank["state"] for rank in observed)
    if divided > 1 and spec.parallel.expert == 1:
        assert state == whole["state"], "each element of the state is on one rank"


def train(comparisons: list[Comparison], directory: Path, continued: list[tuple[int, Case]] | None = None) -> Seen:
    """Train all on their ranks, and then on so many others what goes on from them: as forks of one process.

    Returns:
        For each run directory what each rank has observed.
    """
    on: dict[int, list[Case]] = {}
    for each in comparisons:
        on.setdefault(each.ranks, []).extend(map(Case, each.cut.values()))
        on.setdefault(1, []).append(Case(each.alone))
    for ranks, case in continued or []:
        on.setdefault(ranks, []).append(case)
    seen: Seen = {}
    for ranks, cases in sorted(on.items(), reverse=True):  # what goes on does so on fewer ranks
        found = parallel_ranks.run_cases(cases, ranks, directory)
        seen.update(zip((case.spec.run_dir for case in cases), found, strict=True))
    for each in comparisons:
        (each.whole,) = seen[each.alone.run_dir]
        each.observed = {layout: seen[spec.run_dir] for layout, spec in each.cut.items()}
    return seen


def share_of(whole: dict[str, int], spec: TrainSpec, ranks: int) -> float:
    """Most elements that a rank may keep; rows that do not divide are rounded up, hence the tenth on top."""
    shard = spec.parallel.shard or (ranks if spec.parallel.data == "fsdp" else 1)
    by_expert = spec.parallel.expert if spec.parallel.expert > 1 else shard
    dense = whole["parameters"] - whole["experts"] - whole["small"]
    return (1.1 if shard > 1 else 1.0) * (dense / shard + whole["experts"] / by_expert) + whole["small"]


def going_on(spec: TrainSpec, layout: str, directory: Path) -> Case:
    """The run of `spec` from its first checkpoint on, under another layout."""
    parallel = {**ParallelSpec().model_dump(), **LAYOUTS.get(layout, {})}
    return Case(spec.updated({"run_dir": str(directory / layout), "parallel": parallel}), Path(spec.run_dir))


def check_continued(cases: list[tuple[int, Case]], alone: TrainSpec) -> None:
    """What went on from the middle of a run, under another layout and with fewer ranks, is as on one rank."""
    reference = micro.metrics(alone)
    rest = reference[len(reference) // 2 :]
    for _, case in cases:
        lines = micro.metrics(case.spec)
        assert [line["step"] for line in lines] == [line["step"] for line in rest]
        for line, expected in zip(lines, rest, strict=True):
            assert line["loss"] == pytest.approx(expected["loss"], rel=CLOSE), (case.spec.parallel, line["step"])


def narrow(data: Path, directory: Path, dtype: str, layouts: list[str], **more: Any) -> Comparison:
    """Two ranks with AdamW and a type other than FP32; `check(close=NARROW)`."""
    changes = {"steps": 6, "precision": {"dtype": dtype}, "optimizer": {"name": "adamw"}, **more}
    return Comparison(data, directory / dtype, 2, layouts, **changes)


def compiled(data: Path, directory: Path, model: dict[str, Any]) -> Comparison:
    """Layers are compiled and recompute where they are cut, and neither on one rank."""
    made = Comparison(data, directory / "compiled", 2, ["experts and fsdp"], steps=3, model=model)
    runtime = {"compile": True, "activation_checkpointing": "selective"}
    made.cut = {layout: spec.updated({"runtime": runtime}) for layout, spec in made.cut.items()}
    return made


@pytest.fixture(scope="module")
def hybrid_and_decoder(
    micro_data: Path, answers_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Comparison, Comparison]:
    """Two ranks; the second trains only on answers."""
    directory = tmp_path_factory.mktemp("two-ranks")
    keep = {"every_steps": 2, "keep_last": 9}
    layouts = ["experts and fsdp", "sharded optimizer"]
    hybrid = Comparison(micro_data, directory / "hybrid", 2, layouts, steps=4, checkpoint=keep)
    layouts = ["experts and fsdp", "sharded optimizer and experts"]
    decoder = Comparison(answers_data, directory / "decoder", 2, layouts, steps=3, model=DECODER)
    recomputed = {"runtime": {"activation_checkpointing": {"every": 2}}}
    decoder.cut = {layout: spec.updated(recomputed) for layout, spec in decoder.cut.items()}
    train([hybrid, decoder], directory)
    return hybrid, decoder


def test_two_ranks_repeat_one_and_their_checkpoint_is_anybodys(hybrid_and_decoder: tuple[Comparison, Comparison]):
    hybrid, _ = hybrid_and_decoder
    hybrid.check()
    alone = load_trained(hybrid.alone, torch.device("cpu"))
    for spec in hybrid.cut.values():
        trained = load_trained(spec, torch.device("cpu"))
        for name, tensor in alone.model.state_dict().items():
            torch.testing.assert_close(trained.model.state_dict()[name], tensor, rtol=1e-3, atol=1e-5)


def test_two_ranks_repeat_one_with_a_decoder_and_the_loss_on_answers(
    hybrid_and_decoder: tuple[Comparison, Comparison],
):
    hybrid_and_decoder[1].check()


@pytest.mark.slow
@pytest.mark.proof
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_four_ranks_repeat_one_with_a_decoder_under_every_layout(micro_data: Path, tmp_path: Path, dtype: str):
    if dtype == "fp32":
        comparison, close = Comparison(micro_data, tmp_path, 4, list(LAYOUTS), steps=4, model=DECODER), None
    else:
        comparison = narrow(micro_data, tmp_path, dtype, ["ddp", "fsdp", "experts and fsdp"], model=DECODER)
        close = NARROW
    train([comparison], tmp_path)
    comparison.check(close)


@pytest.mark.slow
@pytest.mark.proof
def test_four_ranks_repeat_one_under_every_layout(micro_data: Path, tmp_path: Path):
    keep = {"every_steps": 6, "keep_last": 9, "asynchronous": False}
    comparison = Comparison(micro_data, tmp_path / "4", 4, list(LAYOUTS), checkpoint=keep)
    pairs = [
        *[(2, "fsdp", "ddp"), (2, "experts and fsdp", "sharded optimizer")],
        *[(2, "sharded optimizer and experts", "fsdp"), (2, "ddp", "experts and fsdp"), (1, "hybrid", "alone")],
    ]
    continued = [(ranks, going_on(comparison.cut[before], after, tmp_path)) for ranks, before, after in pairs]
    train([comparison], tmp_path, continued)
    comparison.check()
    check_continued(continued, comparison.alone)


@pytest.mark.slow
@pytest.mark.proof
@pytest.mark.parametrize(("dtype", "layouts"), [("bf16", ["experts and fsdp"]), ("fp16", ["fsdp", "experts"])])
def test_narrow_types_and_adamw_keep_their_meaning_under_the_other_layouts(
    micro_data: Path, tmp_path: Path, dtype: str, layouts: list[str]
):
    comparison = narrow(micro_data, tmp_path, dtype, layouts)
    train([comparison], tmp_path)
    comparison.check(NARROW)


@pytest.mark.slow
@pytest.mark.proof
def test_compiled_and_recomputing_layers_of_all_kinds_train_cut_as_whole(micro_data: Path, tmp_path: Path):
    comparison = compiled(micro_data, tmp_path, {})
    train([comparison], tmp_path)
    for spec in comparison.cut.values():
        assert_equal_runs(spec, micro.metrics(comparison.alone))


@dataclass
class Trained:
    """What the slow tests compare; all trained in one go, since a rank's start takes longer than what it trains."""

    four: Comparison
    continued: list[tuple[int, Case]]
    narrow: dict[str, Comparison]
    compiled: Comparison
    kept: TrainSpec
    again: TrainSpec
    mesh: list[str]  # what rank 0 of `kept` logs of it


@pytest.fixture(scope="module")
def trained(micro_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    directory = tmp_path_factory.mktemp("cut")
    # The layouts that need four; the rest are trained on two ranks, and on four with the proofs.
    keep = {"every_steps": 4, "keep_last": 9, "asynchronous": False}
    layouts = ["hybrid", "all experts", "sharded optimizer and experts"]
    four = Comparison(micro_data, directory / "4", 4, layouts, steps=8, checkpoint=keep)
    continued = [
        (2, going_on(four.cut["hybrid"], "ddp", directory)),
        (2, going_on(four.cut["sharded optimizer and experts"], "fsdp", directory)),
        (1, going_on(four.cut["hybrid"], "alone", directory)),
    ]
    engram = {"layer": 0, "rows_per_head": 50, "width_per_order": 16, "num_heads": 2}
    two = {
        "bf16": narrow(micro_data, directory, "bf16", ["fsdp", "experts"]),
        "fp16": narrow(micro_data, directory, "fp16", ["experts and fsdp"]),
        "compiled": compiled(micro_data, directory, {"layers": ["NE"], "mtp": None, "engram": [engram]}),
    }
    kept = spec_of(micro_data, directory / "kept", "experts and fsdp", steps=8)
    again = going_on(kept, "experts and fsdp", directory / "again")
    seen = train([four, *two.values()], directory, [*continued, (2, Case(kept)), (2, again)])
    return Trained(four, continued, two, two.pop("compiled"), kept, again.spec, seen[kept.run_dir][0]["mesh"])


@pytest.mark.slow
def test_four_ranks_repeat_one_and_their_checkpoint_is_for_any_layout(trained: Trained):
    trained.four.check()
    check_continued(trained.continued, trained.four.alone)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_narrow_types_and_adamw_keep_their_meaning_when_cut(trained: Trained, dtype: str):
    """A weight is rounded alike before and after it is gathered; FP16's loss scale is the same on all ranks."""
    trained.narrow[dtype].check(NARROW)


@pytest.mark.slow
def test_compiled_and_recomputing_layers_train_cut_as_whole(trained: Trained):
    """FSDP's hooks of Engram's tables and the experts' exchange lie inside of layers, where the graph breaks."""
    (cut,) = trained.compiled.cut.values()
    assert_equal_runs(cut, micro.metrics(trained.compiled.alone))


@pytest.mark.slow
def test_a_run_under_fsdp_and_experts_logs_its_mesh_and_resumes_bit_for_bit(trained: Trained):
    assert trained.mesh == ["mesh (copies x ranks of one copy): fsdp=1x2,experts=1x2"]
    whole, again = micro.metrics(trained.kept), micro.metrics(trained.again)
    assert len(whole) == 8 and [line["loss"] for line in again] == [line["loss"] for line in whole[4:]]


def test_mesh_that_the_ranks_cannot_form_ends_with_2_in_one_line(micro_data: Path, tmp_path: Path):
    process = micro.start(micro.micro_spec(micro_data, tmp_path / "run", parallel={"expert": 3}))
    code, output = micro.finish(process)
    assert code == ExitCode.SPEC and "Traceback" not in output
    (line,) = (line for line in output.splitlines() if line.startswith("exit 2"))
    assert "train.parallel.expert 3 must divide the 1 ranks" in line and "write one of 1" in line
