"""`train.batch.micro_batch_rows: auto`: by arithmetic, by a trial, for all ranks, and for the next start."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import micro
import pytest
import torch
from made_run import make_model

from manifests.spec import job_from, load_job
from trainer import evaluate, rows
from trainer.arithmetic.memory import step_memory
from trainer.arithmetic.rows import fitting
from trainer.errors import SpecError
from trainer.loop import train
from trainer.optim import build_optimizers
from trainer.parallel.layout import Layout
from trainer.precision import resolve
from trainer.report import write_report
from trainer.spec import PrecisionSpec

AUTO = {"batch": {"micro_batch_rows": "auto"}}
GIB = 2**30


@pytest.mark.parametrize("gib", [56, 70, 80, 141])
def test_the_most_rows_that_fit_by_arithmetic(gib: int):
    spec, layout = load_job("h100-4b", {"train": AUTO}).train_spec(), Layout()
    found = fitting(spec, layout, gib * GIB)
    sizes = {n: step_memory(spec.with_rows(n), layout).total for n in spec.row_choices(1)}
    assert found.number == max(n for n, size in sizes.items() if size <= gib * GIB)
    assert f"of {gib}.0 GiB by arithmetic; {2 * found.number} rows would take" in found.why


def test_on_a_cpu_a_micro_batch_has_a_few_thousand_tokens():
    spec = load_job("tiny", {"train": AUTO}).train_spec()
    assert fitting(spec, Layout(), None) == (16, "at most 4,096 tokens on a CPU")
    long = spec.updated({"tokens": {"seq_len": 8192}, "batch": {"tokens_per_step": 65536}})
    assert fitting(long, Layout(), None).number == 1


def test_choices_share_a_step_equally_and_fit_the_curriculum():
    spec = load_job("tiny", {"train": AUTO | {"seq_len": 64}}).train_spec()
    assert spec.row_choices(1) == [1, 2, 4, 8, 16, 32, 64] and spec.row_choices(2) == [1, 2, 4, 8, 16, 32]
    longer = spec.updated({"tokens": {"curriculum": [{"from_tokens": 10, "seq_len": 256}]}})
    assert longer.row_choices(1) == [4, 8, 16, 32, 64]
    with pytest.raises(SpecError, match="no number of a rank's 64 rows of 64 tokens is a multiple of seq_len 192"):
        spec.updated({"tokens": {"curriculum": [{"from_tokens": 10, "seq_len": 192}]}})
    with pytest.raises(SpecError, match="must be a multiple of seq_len × ranks = 64 × 3 = 192"):
        spec.row_choices(3)


def test_what_cannot_be_auto():
    with pytest.raises(SpecError, match=r"auto is for train\.engine yaongi"):
        load_job("qwen3-30b-a3b-megatron", {"train": AUTO})
    with pytest.raises(SpecError, match=r"cluster\.gpu_memory_gib 40 is too little"):
        load_job("h100-4b", {"train": AUTO, "cluster": {"gpu_memory_gib": 40}})
    with pytest.raises(SpecError, match="micro_batch_rows"):
        load_job("tiny", {"train": {"batch": {"micro_batch_rows": "most"}}})


def test_a_job_is_planned_with_what_fits_and_its_name_says_auto():
    job = load_job("h100-4b", {"train": AUTO})
    assert job.fitted_spec().batch.rows == fitting(job.train_spec(), Layout(), 80 * GIB).number
    assert job.train_spec().batch.micro_batch_rows == "auto"
    bigger = job.updated({"cluster": {"gpu_memory_gib": 141}})
    assert bigger.run_name == job.run_name and bigger.fitted_spec().batch.rows > job.fitted_spec().batch.rows
    assert job_from(json.loads(job.model_dump_json())).run_name == job.run_name


def losses(run_dir: str | Path) -> list[float]:
    lines = (Path(run_dir) / "logs" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def test_a_run_with_auto_is_that_with_the_number(
    micro_data: Path, tmp_path: Path, leave_no_traces, quiet_checkpoint_library, caplog
):
    caplog.set_level("INFO", "trainer")
    changes = {"steps": 3, "checkpoint": {"every_steps": 2}, "runtime": {"metrics_port": 0}}
    auto = micro.micro_spec(micro_data, tmp_path / "auto", **changes, **AUTO)
    found = fitting(auto, Layout(), None).number
    named = micro.micro_spec(micro_data, tmp_path / "named", **changes, batch={"micro_batch_rows": found})
    assert train(auto) == 0 and train(named) == 0
    assert losses(auto.run_dir) == losses(named.run_dir)
    assert f"train.batch.micro_batch_rows auto: {found} (at most 4,096 tokens on a CPU)" in caplog.messages
    assert "micro_batch_rows: auto" in (tmp_path / "auto" / "train.yaml").read_text()
    assert json.loads((tmp_path / "auto" / "rows.json").read_text())["rows"] == found
    assert f"micro-batches of auto: {found} rows" in write_report(auto.run_dir).read_text()
    assert evaluate.run(auto)["all"]["tokens"] == evaluate.run(named)["all"]["tokens"]
    longer = auto.updated({"steps": 5, "begun_with_steps": 3, "schedule": {"name": "constant"}})
    assert train(longer) == 0 and len(losses(auto.run_dir)) == 5


class TwoGpus:
    """Two ranks, of which this is the first; the other one's GPU is smaller."""

    size, is_main, device = 2, True, torch.device("cuda", 0)

    def __init__(self, other: int = 60 * GIB, name: str = "H100") -> None:
        self.other, self.name = other, name

    def gather(self, own: Any) -> list[Any]:
        return [own, (self.other, self.name)]

    def broadcast(self, value: Any) -> Any:
        return value


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "device_bytes", lambda device: 80 * GIB)
    monkeypatch.setattr(rows, "_name", lambda device: "H100")
    monkeypatch.setattr(rows.agreement, "problem", lambda world, own: own)


def test_ranks_take_what_the_smallest_gpu_takes_and_a_trial_lowers_it(gpus: None, tmp_path, monkeypatch):
    spec = load_job("h100-4b", {"train": AUTO}).train_spec().updated({"run_dir": str(tmp_path)})
    layout, world = Layout(replicas=2) if "replicas" in Layout.__dataclass_fields__ else Layout(world=2), TwoGpus()
    decided, found = rows.decide(spec, world, layout)
    assert found.number == fitting(spec, layout, 60 * GIB).number == decided.batch.rows
    tried = []

    def passes(spec: Any, number: int, *_: Any) -> str | None:
        tried.append(number)
        return "CUDA out of memory" if number > 1 else None

    monkeypatch.setattr(rows, "_passes", passes)
    bf16 = resolve(PrecisionSpec(dtype="bf16"), (9, 0))
    lowered = rows.try_out(decided, found, world, layout, None, None, bf16)
    assert lowered.batch.rows == 1 and tried == sorted(tried, reverse=True) and tried[0] == found.number
    again, kept = rows.decide(spec, world, layout)
    assert again.batch.rows != 1 or kept.why.startswith("as an earlier start")  # the other GPU is another one
    same = TwoGpus(other=80 * GIB)
    assert rows.decide(spec, same, layout)[1] == (1, "as an earlier start of the run has found on these GPUs")
    other = TwoGpus(other=80 * GIB, name="H200")
    assert not rows.decide(spec, other, layout)[1].why.startswith("as an earlier")
    again = spec.updated({"runtime": {"activation_checkpointing": "full"}})
    assert not rows.decide(again, same, layout)[1].why.startswith("as an earlier"), "it recomputes otherwise"
    (tmp_path / "rows.json").write_text("{")
    assert not rows.decide(spec, same, layout)[1].why.startswith("as an earlier")


def test_where_ranks_wait_for_each_other_the_arithmetic_decides(gpus: None, tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "_passes", lambda *_: pytest.fail("no trial here"))
    spec = load_job("h100-4b", {"train": AUTO}).train_spec().updated({"run_dir": str(tmp_path)})
    auto, bf16 = rows.Rows(2, "…"), resolve(PrecisionSpec(dtype="bf16"), (9, 0))
    for layout in (SimpleNamespace(data="fsdp", expert=1), SimpleNamespace(data="ddp", expert=2)):
        assert rows.try_out(spec, auto, TwoGpus(), layout, None, None, bf16).batch.rows == 2


def test_a_trial_leaves_the_model_as_it_was_and_tells_of_too_little_memory(
    micro_data: Path, tmp_path: Path, monkeypatch
):
    spec = micro.micro_spec(micro_data, tmp_path, **AUTO)
    model = make_model(spec).train()
    optimizers = build_optimizers(model, spec.optimizer, spec.model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state, random = {k: v.clone() for k, v in optimizers.state_dict().items()}, torch.get_rng_state()
    fp32 = resolve(PrecisionSpec(dtype="fp32"), None)
    assert rows._passes(spec, 2, model, optimizers, fp32) is None
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(torch.equal(state[name], tensor) for name, tensor in optimizers.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    assert all(parameter.grad is None for parameter in model.parameters())

    forward = type(model).forward

    def limited(self: Any, ids_BT: torch.Tensor, *others: Any) -> Any:
        if len(ids_BT) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")
        return forward(self, ids_BT, *others)

    monkeypatch.setattr(type(model), "forward", limited)
    assert rows._passes(spec, 4, model, optimizers, fp32) == "CUDA out of memory. Tried to allocate 2 GiB"
    monkeypatch.setattr(type(model), "forward", lambda *_: refuse("CUBLAS_STATUS_ALLOC_FAILED when calling x"))
    assert rows._passes(spec, 1, model, optimizers, fp32) == "CUBLAS_STATUS_ALLOC_FAILED when calling x"
    monkeypatch.setattr(type(model), "forward", lambda *_: refuse("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        rows._passes(spec, 1, model, optimizers, fp32)
    monkeypatch.setattr(type(model), "forward", limited)
    choices = spec.row_choices(1)
    assert rows.largest(choices, lambda n: rows._passes(spec, n, model, optimizers, fp32)) == 2


def refuse(message: str) -> None:
    raise RuntimeError(message)
