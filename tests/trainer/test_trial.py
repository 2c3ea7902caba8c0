"""Of the proven ways the fastest is taken, and told; what fails or is not tried changes nothing.

Triton's interpreter is a device class of its own, and backends that sleep stand for slow and fast kernels.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import micro
import pytest
import torch
from tape import Tape

from trainer import parity, precision
from trainer.distributed import World
from trainer.fp8.gemm import PRODUCTS
from trainer.model import graphs
from trainer.ops import OPS, Backend, resolve
from trainer.ops.attention import attention_sdpa
from trainer.parallel.layout import Layout
from trainer.proof import cache, trial
from trainer.proof.comparisons import Comparison
from trainer.proof.trial import Change, Way
from trainer.spec import Fp8Spec, TrainSpec

CPU, ALONE = torch.device("cpu"), Layout()


def sleeping(seconds: float) -> Callable[..., torch.Tensor]:
    def attention(*arguments: torch.Tensor) -> torch.Tensor:
        time.sleep(seconds)
        return attention_sdpa(*arguments)

    return attention


def fails(*arguments: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("out of resource: shared memory\nsecond line")


@pytest.fixture
def offered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Attention by kernels that sleep that long, all proven; the first is what runs take without a trial."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    plain = OPS["attention"].backends
    functions = {"slow": sleeping(0.05), "fast": sleeping(0.0), "slower": sleeping(0.1), "broken": fails}

    def offer(*names: str) -> None:
        kernels = {name: Backend(functions[name], "sleeps", portable=False) for name in names}
        backends = kernels | {"reference": plain["reference"]}
        monkeypatch.setitem(OPS, "attention", replace(OPS["attention"], backends=backends))
        records = [Comparison("attention", name, "fp32").failed("", CPU) for name in names]
        parity.learn(replace(record, passed=True, problem=None) for record in records)

    yield offer
    parity.forget()


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    """One rank, without a process group."""
    monkeypatch.setattr(World, "broadcast", lambda self, value: value)
    return World(0, 1, 0, 1, CPU, None, None)  # type: ignore[arg-type]


@pytest.fixture
def spec(micro_data: Path, tmp_path: Path) -> TrainSpec:
    named = {
        "ssd": "chunked",
        "conv": "torch",
        "experts": "grouped",
        "router": "torch",
        "add_norm": "torch",
        "engram": "torch",
    }
    return micro.micro_spec(micro_data, tmp_path / "run", backends=named)


def default(spec: TrainSpec) -> Way:
    choices = resolve(spec.backends, CPU, torch.float32, spec.model)
    return Way(precision.resolve(spec.precision, None), choices, compiles=False)


def test_the_fastest_is_taken_and_remembered(offered, world: World, spec: TrainSpec, monkeypatch: pytest.MonkeyPatch):
    offered("slow", "slower", "broken", "fast")
    way = default(spec)
    assert way.choices["attention"].name == "slow"
    taken, found = trial.fastest(spec, world, ALONE, way)
    assert taken.choices["attention"].name == "fast" and found.taken == [Change("attention", "fast")]
    assert taken.choices["attention"].reason == "sleeps; the fastest in a trial"
    assert [(row.change, row.verdict) for row in found.rows] == [
        ("as proven", "without a trial"),
        ("attention: slower", "not taken"),
        ("attention: broken", "fails"),
        ("attention: fast", "taken"),
    ]
    seconds = {row.change: row.seconds for row in found.rows}
    assert seconds["attention: broken"] is None
    layers = sum("*" in layer for layer in spec.model.layers)
    assert seconds["as proven"] > seconds["attention: fast"] + 0.04 * layers
    lines = trial.table(found)
    assert lines[-1].endswith("ms  taken") and len({line.index("  ", 20) > 0 for line in lines}) == 1

    monkeypatch.setattr(trial, "measured", lambda *_: pytest.fail("it is known"))
    again, kept = trial.fastest(spec, world, ALONE, way)
    assert again == taken and kept == found


def test_only_the_kinds_that_a_change_concerns_are_timed_again(offered, world: World, spec: TrainSpec, monkeypatch):
    offered("slow", "fast")
    timed = []

    def seconds(kind: trial.Kind, spec: TrainSpec, world: World, layout: Layout, way: Way) -> float:
        timed.append((kind.symbols, way.choices["attention"].name, way.compiles))
        return 1.0

    monkeypatch.setattr(trial, "_seconds", seconds)
    way = replace(default(spec), compiles=True)
    trial.tried(spec, world, ALONE, way, [Change("attention", "fast"), Change("compile", "no")], 60)
    kinds = [kind.symbols for kind in trial.compiled.kinds(spec.model, way.precision)]
    with_attention = [symbols for symbols in kinds if "*" in symbols]
    assert 0 < len(with_attention) < len(kinds)
    assert timed == [
        *((symbols, "slow", True) for symbols in kinds),
        *((symbols, "fast", True) for symbols in with_attention),
        *((symbols, "slow", False) for symbols in kinds),
    ], "whether layers are compiled concerns all"


def test_layers_as_graphs_are_timed_and_given_up_where_they_are_slower(
    offered, world: World, spec: TrainSpec, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """On a tape, which is slower than the layers; a recording that fails or is wrong is passed over, too."""
    offered("slow", "fast")
    tapes, way = [], default(spec)
    monkeypatch.setattr(graphs, "CudaRecorder", lambda device: tapes.append(Tape()) or tapes[-1])
    assert trial.fastest(spec, world, ALONE, way)[0].names["graphs"] == "no" and not tapes, "they need a GPU"
    monkeypatch.setattr(trial.graphed, "why_not", lambda world, chosen, policy: None)

    def last_row(**changes: object) -> trial.Row:
        taken, found = trial.fastest(spec.updated(changes), world, ALONE, way)
        assert [row.change for row in found.rows] == ["as proven", "attention: fast", "graphs: yes"]
        assert taken.graphs == (found.rows[-1].verdict == "taken") and taken.choices["attention"].name == "fast"
        return found.rows[-1]

    assert last_row().verdict == "not taken"
    assert len(tapes) == len(trial.compiled.kinds(spec.model, way.precision)) and all(tape.replays for tape in tapes)
    with monkeypatch.context() as quicker:
        plain = trial._seconds
        quicker.setattr(trial, "_seconds", lambda *given: plain(*given) * (0.01 if given[-1].graphs else 1))
        assert last_row(runtime={"activation_checkpointing": "full"}).verdict == "taken"
    with monkeypatch.context() as broken:
        broken.setattr(graphs._Set, "begun", lambda self, *_: (self._documents, self._layers))
        assert last_row(runtime={"activation_checkpointing": "selective"}).verdict == "fails"
    assert "recorded computes something else" in caplog.text
    monkeypatch.setattr(Tape, "record", fails)
    assert last_row(batch={"micro_batch_rows": 1}).verdict == "fails"
    assert "cannot be recorded (out of resource: shared memory)" in caplog.text


def test_what_has_not_begun_in_time_is_not_tried(
    offered, world: World, spec: TrainSpec, monkeypatch: pytest.MonkeyPatch
):
    offered("slow", "fast")
    way = default(spec)
    taken, found = trial.fastest(spec, world, ALONE, way, seconds=0.0)
    assert taken == way and found.rows[1].verdict == "not tried: the trial took longer than 0 s"


def test_fp8_that_has_not_shown_in_time_what_it_gains_is_not_used(world: World, spec: TrainSpec, monkeypatch):
    monkeypatch.setattr(trial, "measured", lambda *_: 1.0)
    fp8 = with_fp8(default(spec), "te")
    found = trial.tried(spec, world, ALONE, fp8, [Change("precision", "fp32")], seconds=0)
    assert found.rows[1].verdict == "not tried: the trial took longer than 0 s, and so FP8 is not used"
    assert fp8.changed(found.taken, spec, CPU).precision.fp8 is None


class Ended(BaseException):
    """Stands for the end of the process."""


def test_what_ends_the_process_is_passed_over_and_the_rest_not_measured_again(
    offered, world: World, spec: TrainSpec, monkeypatch: pytest.MonkeyPatch
):
    offered("slow", "slower", "broken", "fast")
    way, measured = default(spec), []

    def ends(spec: TrainSpec, world: World, layout: Layout, tried: Way, seen: dict) -> float:
        name = tried.choices["attention"].name
        measured.append(name)
        if name == "broken":
            raise Ended
        return {"slow": 3.0, "slower": 4.0, "fast": 2.0}[name]

    monkeypatch.setattr(trial, "measured", ends)
    for _ in range(2):
        with pytest.raises(Ended):
            trial.fastest(spec, world, ALONE, way)
    taken, found = trial.fastest(spec, world, ALONE, way)
    assert measured == ["slow", "slower", "broken", "broken", "fast"]
    assert [row.verdict for row in found.rows] == ["without a trial", "not taken", "ends the process", "taken"]
    assert taken.choices["attention"].name == "fast"


def test_what_other_runs_are_trying_now_ends_no_process(
    offered, world: World, spec: TrainSpec, micro_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Runs that start at once share the cache directory; only a trial that is done is for others."""
    offered("slow", "fast")
    runs = [spec.updated({"run_dir": str(tmp_path / f"run-{number}")}) for number in range(4)]
    way, seconds = default(spec), {"slow": 3.0, "fast": 2.0}
    others, found = iter(runs[1:]), []

    def while_others_begin(spec: TrainSpec, world: World, layout: Layout, tried: Way, seen: dict) -> float:
        if (other := next(others, None)) is not None:
            found.append(trial.fastest(other, world, ALONE, way)[1])
        return seconds[tried.choices["attention"].name]

    monkeypatch.setattr(trial, "measured", while_others_begin)
    found.append(trial.fastest(runs[0], world, ALONE, way)[1])
    assert [[row.seconds for row in each.rows] for each in found] == [[3.0, 2.0]] * 4
    monkeypatch.setattr(trial, "measured", lambda *_: pytest.fail("it is known"))
    known = trial.fastest(spec, world, ALONE, way)[1]
    assert [row.seconds for row in known.rows] == [3.0, 2.0]


def test_a_gpu_that_has_become_unusable_ends_the_process(world: World, spec: TrainSpec, monkeypatch):
    """All that comes after it would fail, too, and be passed over for ever."""
    monkeypatch.setattr(trial, "_seconds", fails)
    assert trial.measured(spec, world, ALONE, default(spec), {}) is None
    monkeypatch.setattr(trial, "unusable", lambda device: "CUDA error: an illegal memory access was encountered")
    with pytest.raises(RuntimeError, match="out of resource"):
        trial.measured(spec, world, ALONE, default(spec), {})


EMPTY = {"rows": [], "taken": [], "seconds": 1, "begun": {}}
BASE_ROW = {"change": "as proven", "seconds": 1.0, "verdict": "without a trial"}


@pytest.mark.parametrize(
    "damaged",
    [
        3,
        {},
        {"rows": []},
        EMPTY | {"taken": [["attention", "gone"]]},
        EMPTY | {"taken": [[["attention"], "fast"]]},
        EMPTY | {"seconds": 10**400},
        EMPTY | {"seconds": float("nan")},
        EMPTY | {"begun": {"as proven": "often"}},
        EMPTY | {"rows": [BASE_ROW | {"seconds": "long"}]},
        EMPTY | {"rows": [BASE_ROW | {"verdict": ["taken"]}]},
    ],
)
def test_a_kept_trial_that_is_damaged_is_made_again(
    offered, world: World, spec: TrainSpec, monkeypatch: pytest.MonkeyPatch, damaged: object
):
    offered("slow", "fast")
    monkeypatch.setattr(trial, "measured", lambda *_: 1.0)
    way = default(spec)
    key = trial.digest(spec, ALONE, way, [Change("attention", "fast")])
    cache.write(cache.files(CPU, spec.run_dir), cache.Known(trials={key: damaged}), CPU)
    taken, found = trial.fastest(spec, world, ALONE, way)
    assert taken == way and [row.seconds for row in found.rows] == [1.0, 1.0]


def test_nothing_is_tried_where_nothing_is_open_or_wanted(
    offered, world: World, spec: TrainSpec, monkeypatch: pytest.MonkeyPatch
):
    offered("slow", "fast")
    for closed in (spec.updated({"backends": {"attention": "reference"}}), spec.updated({"runtime": {"prove": False}})):
        assert trial.fastest(closed, world, ALONE, default(closed))[1] is None
    monkeypatch.delenv("TRITON_INTERPRET")
    assert trial.fastest(spec, world, ALONE, default(spec))[1] is None


def with_fp8(way: Way, implementation: str) -> Way:
    fp8 = Fp8Spec(implementation=implementation)
    return replace(way, precision=replace(way.precision, name="fp8", fp8=fp8))


@pytest.mark.parametrize(("seconds", "taken"), [(1.04, True), (1.06, False)])
def test_fp8_stays_only_where_it_is_5_percent_faster(
    world: World, spec: TrainSpec, monkeypatch: pytest.MonkeyPatch, seconds: float, taken: bool
):
    """`seconds`: without FP8, if a micro-batch takes 1 s with it."""
    fp8 = with_fp8(default(spec), "emulated")
    monkeypatch.setattr(trial, "measured", lambda *arguments: 1.0 if arguments[3].precision.fp8 else seconds)
    found = trial.tried(spec, world, ALONE, fp8, [Change("precision", "fp32")], 60)
    assert bool(found.taken) is taken
    assert fp8.changed(found.taken, spec, CPU).precision.name == ("fp32" if taken else "fp8")


def test_layers_in_fp8_are_timed_as_the_run_would_compute_them(
    offered, world: World, spec: TrainSpec, monkeypatch: pytest.MonkeyPatch
):
    """Products that sleep are not kept."""
    offered("fast")
    emulated = PRODUCTS["emulated"]
    monkeypatch.setitem(PRODUCTS, "emulated", lambda *given, **how: time.sleep(0.02) or emulated(*given, **how))
    fp8 = Fp8Spec(implementation="emulated", bf16_end_layers=0)
    way = replace(with_fp8(default(spec), "emulated"), compiles=False)
    way = replace(way, precision=replace(way.precision, autocast_dtype=torch.bfloat16, fp8=fp8))
    found = trial.tried(spec, world, ALONE, way, list(trial.changes(spec, CPU, way)), 60)
    assert [(row.change, row.verdict) for row in found.rows] == [
        ("as proven", "without a trial"),
        ("precision: fp32", "taken"),
    ]
    assert found.rows[0].seconds > found.rows[1].seconds > 0


def test_each_open_choice_is_a_change_and_what_matters_most_comes_first(
    spec: TrainSpec, offered, monkeypatch: pytest.MonkeyPatch
):
    offered("slow", "fast")
    way = default(spec)
    compiled = spec.updated({"runtime": {"compile": "auto"}, "backends": {"ssd": "auto"}})
    chosen = way.choices | {"ssd": way.choices["ssd"]._replace(name="mamba_ssm")}
    fp8 = with_fp8(replace(way, compiles=True, choices=chosen), "te")
    parity.learn([replace(Comparison("ssd", "chunked", "fp32").failed("", CPU), passed=True, problem=None)])
    problems = {"te": None, "torch": None}
    monkeypatch.setattr(precision, "fp8_problems", lambda *_: problems)
    everything = [
        Change("fp8", "torch"),
        Change("precision", "fp32"),
        Change("attention", "fast"),
        Change("compile", "no"),
        Change("ssd", "chunked"),
    ]
    assert list(trial.changes(compiled, CPU, fp8)) == everything
    problems["torch"] = "unproven"
    assert list(trial.changes(compiled, CPU, fp8)) == everything[1:]
    for named in ({"dtype": "fp8", "fp8": {"implementation": "te"}}, {"dtype": "fp8"}):
        named = compiled.updated({"runtime": {"compile": True}, "precision": named, "backends": {"ssd": "chunked"}})
        assert list(trial.changes(named, CPU, fp8)) == [Change("attention", "fast")]


def test_the_implementation_of_fp8_is_changed_and_named(spec: TrainSpec):
    way = with_fp8(default(spec), "te")
    changed = way.changed([Change("fp8", "torch")], spec, CPU)
    assert changed.precision.fp8.implementation == "torch" and changed.names["fp8"] == "torch"
    assert changed.precision.reason == "FP8 by torch is the fastest here"


def test_a_rank_times_only_the_experts_of_its_own(offered, spec: TrainSpec):
    offered("slow")
    experts = spec.model.moe.num_experts
    (kind,) = [kind for kind in trial.compiled.kinds(spec.model, default(spec).precision) if "E" in kind.symbols][:1]
    shared = Layout(world=2, expert=2)
    model = trial.compiled.build_own_share(kind, spec, CPU, shared, default(spec).precision, default(spec).choices)
    assert model.spec.moe.num_experts == experts // shared.expert


def test_a_rule_for_experts_in_fp8_is_tried_the_other_way_round(spec: TrainSpec):
    width = spec.model.moe.expert_width
    for limit, to, after in ((width, "no", width + 1), (width + 1, "yes", width)):
        way = with_fp8(default(spec), "te")
        way = replace(way, precision=replace(way.precision, fp8=way.precision.fp8.updated({"experts_from": limit})))
        assert way.names["fp8_experts"] == f"from {limit} wide on"
        (change,) = [each for each in trial.changes(spec, CPU, way) if each.what == "fp8_experts"]
        assert change.to == to
        assert way.changed([change], spec, CPU).precision.fp8.experts_from == after
    assert not any(each.what == "fp8_experts" for each in trial.changes(spec, CPU, with_fp8(default(spec), "te")))
