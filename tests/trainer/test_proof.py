"""Kernels are compared where a run starts, in a process of their own; what is broken there is named and passed over.

The CPU has committed records. Triton's interpreter is a device class of its own, mostly without any: a GPU's stand-in.
"""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import micro
import proof_child
import pytest
import torch

from pipelines.doctor import kernels
from trainer import parity
from trainer.distributed import World
from trainer.ops import OPS, resolve
from trainer.proof import cache, prove, start
from trainer.proof.comparisons import Comparison, missing, wanted
from trainer.proof.prove import Limits
from trainer.proof.start import Proof
from trainer.spec import BackendsSpec, TrainSpec

CPU = torch.device("cpu")
CHILD = (sys.executable, proof_child.__file__)
PORTABLE = [("ssd", "chunked"), ("conv", "torch"), ("attention", "sdpa"), ("experts", "grouped")]


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A device class without records, and a cache directory of its own."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(parity, "committed", lambda: ())
    monkeypatch.setattr(prove, "CHILD", CHILD)
    yield tmp_path / "cache" / "yaongi"
    parity.forget()


@pytest.fixture
def broken(elsewhere: Path, monkeypatch: pytest.MonkeyPatch):
    """Name kernels of proof_child that are offered here, before the good ones."""

    def offer(*names: str) -> None:
        offered = {name: proof_child.BROKEN[name] for name in names}
        attention = OPS["attention"]
        monkeypatch.setitem(OPS, "attention", replace(attention, backends=offered | attention.backends))

    return offer


def spec(micro_data: Path, run_dir: Path, only: str = "", **runtime: object) -> TrainSpec:
    """A run in which the backends of all operations, or of `only` one, are chosen by themselves."""
    named = {op: "reference" for op in OPS if only and op != only}
    return micro.micro_spec(micro_data, run_dir, runtime={"preflight": {"enabled": False}, **runtime}, backends=named)


def alone() -> World:
    return World(0, 1, 0, 1, CPU, None, None)  # type: ignore[arg-type]


def attention(*names: str) -> list[Comparison]:
    return [Comparison("attention", name, "fp32") for name in names]


def test_what_nobody_has_proven_is_proven_once_and_then_taken(
    elsewhere: Path, micro_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO)
    run = spec(micro_data, tmp_path / "run")
    assert not any(choice.proven for choice in resolve(BackendsSpec(), CPU).values())
    found = start.at_start(run, alone())
    assert found.made == 4 and not found.wrong and not found.problems
    assert sorted((record.op, record.backend) for record in found.records) == sorted(PORTABLE)
    assert all(record.passed and record.device_class == "interpreter" for record in found.records)
    assert all(choice.proven for choice in resolve(BackendsSpec(), CPU).values())
    assert "attention by sdpa in fp32: within" in caplog.text

    parity.forget()
    assert start.at_start(run, alone()).made == 0, "the cache has it"
    assert all(choice.proven for choice in resolve(BackendsSpec(), CPU).values())
    (kept,) = elsewhere.iterdir()
    (beside,) = (tmp_path / "run").glob("proof-*.json")
    for file in (beside, kept):
        file.unlink()
        parity.forget()
        assert start.at_start(run, alone()).made == 0, "each holds it, and makes the other anew"


def test_on_a_cpu_and_where_it_is_off_nothing_is_compared(
    elsewhere: Path, micro_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert start.at_start(spec(micro_data, tmp_path / "run", prove=False), alone()) == Proof()
    monkeypatch.delenv("TRITON_INTERPRET")
    assert start.at_start(spec(micro_data, tmp_path / "run"), alone()) == Proof()
    assert not elsewhere.exists() and not (tmp_path / "run").exists()


def test_broken_kernels_are_named_with_what_they_do_and_the_others_are_proven(broken, micro_data: Path, tmp_path: Path):
    broken("crashes", "exits", "raises", "errs")
    run = spec(micro_data, tmp_path / "run", "attention")
    found = start.at_start(run, alone())
    outcomes = {record.backend: record.outcome for record in found.records if record.op == "attention"}
    assert outcomes["crashes"] == "crashes (SIGABRT): CUDA error: an illegal memory access was encountered"
    assert outcomes["raises"] == "fails: RuntimeError: no kernel image is available for execution on the device"
    assert outcomes["errs"].startswith("outputs differ by 1.0e-02 of the reference's, 1e-04 is allowed")
    assert outcomes["exits"] == "ends with exit code 3"
    assert outcomes["sdpa"].startswith("within")
    passed_over = "crashes (attention, fp32, torch 2.13.0) is passed over: crashes (SIGABRT): CUDA error"
    assert len(found.wrong) == 4 and found.wrong[0].startswith(passed_over) and not found.problems
    assert not any("\n" in remark for remark in found.wrong)
    choice = resolve(BackendsSpec(), CPU)["attention"]
    assert choice.name == "sdpa" and choice.proven
    assert "not raises: wrong in fp32 on interpreter with torch 2.13.0: fails: RuntimeError: no kernel" in choice.reason
    parity.forget()
    again = start.at_start(run, alone())
    assert again.made == 0 and sorted(again.wrong) == sorted(found.wrong), "it is not tried again at every start"


# A child that hangs in comparisons with "hangs" and passes all others, without the time that torch takes to start.
SWIFT = """
import json, sys, time
for number, (op, backend, variant) in enumerate(json.load(sys.stdin)["comparisons"]):
    print(json.dumps({"begun": number}), flush=True)
    time.sleep(600 if backend == "hangs" else 0)
    print(json.dumps({"done": number, "record": RECORD | {"backend": backend}}), flush=True)
"""


@pytest.fixture
def swift(monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    backends = dict.fromkeys(("hangs", "sdpa", "reference"), OPS["attention"].backends["sdpa"])
    monkeypatch.setitem(OPS, "attention", replace(OPS["attention"], backends=backends))
    record = replace(attention("sdpa")[0].failed("", CPU), passed=True, problem=None)
    return sys.executable, "-c", SWIFT.replace("RECORD", str(vars(record)))


def test_a_hanging_kernel_ends_at_its_limit_and_the_next_is_compared(swift: tuple[str, ...]):
    comparisons = attention("hangs", "sdpa")
    records, unfinished = prove.prove(comparisons, CPU, Limits(comparison_seconds=3), command=swift)
    hung, after = records
    assert hung.outcome == "takes longer than 3 s" and after.passed and not unfinished


def test_all_together_have_a_limit_and_what_is_missing_is_named(swift: tuple[str, ...]):
    comparisons = attention("sdpa", "hangs", "reference")
    records, unfinished = prove.prove(comparisons, CPU, Limits(all_seconds=6), command=swift)
    assert [record.backend for record in records] == ["sdpa"]
    left = "attention by hangs in fp32, attention by reference in fp32"
    assert unfinished == [f"the comparisons took longer than 6 s; not compared: {left}"]


def test_memory_that_others_hold_says_nothing_about_a_kernel(broken):
    broken("fills")
    records, unfinished = prove.prove(attention("fills", "sdpa"), CPU)
    assert [record.backend for record in records] == ["sdpa"]
    assert unfinished == ["attention by fills in fp32 is not compared: CUDA out of memory. Tried to allocate 2.00 GiB"]


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("raise SystemExit('no driver')", "the process of the comparisons ends with exit code 1: no driver"),
        ("import time; time.sleep(99)", "the process of the comparisons takes longer than 2 s"),
    ],
)
def test_a_process_that_cannot_begin_is_told_in_one_line(program: str, expected: str):
    command = (sys.executable, "-c", program)
    records, unfinished = prove.prove(attention("sdpa"), CPU, Limits(start_seconds=2), command=command)
    assert not records and unfinished == [f"{expected}; not compared: attention by sdpa in fp32"]


def test_a_full_gpu_is_not_used(monkeypatch: pytest.MonkeyPatch):
    free = SimpleNamespace(bytes=2**30)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free.bytes, 80 * 2**30))
    gpu = torch.device("cuda", 0)
    assert start._occupied(gpu) == (
        "nothing is compared, as cuda:0 has 1.0 GiB of 80.0 GiB free; see nvidia-smi on the node and end the process "
        "that holds the rest"
    )
    free.bytes = 70 * 2**30
    assert start._occupied(gpu) is None


def test_a_cache_that_cannot_be_written_or_read_is_told_and_the_run_goes_on(
    elsewhere: Path, micro_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    elsewhere.parent.mkdir()
    elsewhere.write_text("a file where the directory should be")
    found = start.at_start(spec(micro_data, tmp_path / "run", "attention"), alone())
    assert found.made == 1
    assert found.problems == (f"{elsewhere} cannot be written (File exists), so the proof is made at every start",)
    elsewhere.unlink()
    (file,) = (tmp_path / "run").glob("proof-interpreter-*.json")
    parity.forget()
    file.write_text(file.read_text()[:200])
    assert start.at_start(spec(micro_data, tmp_path / "run", "attention"), alone()).made == 1
    assert f"{file} cannot be read (JSONDecodeError) and is made again" in caplog.text
    content = json.loads(file.read_text())
    assert content["environment"]["device_class"] == "interpreter" and len(content["records"]) == 1


def test_another_version_or_other_code_is_another_file(elsewhere: Path, monkeypatch: pytest.MonkeyPatch):
    here = cache.files(CPU, None)
    real = parity.package_version
    monkeypatch.setattr(parity, "package_version", lambda name: "9.9" if name == "triton" else real(name))
    other = cache.files(CPU, None)
    monkeypatch.setattr(cache, "_code", lambda: "changed")
    assert len({*here, *other, *cache.files(CPU, None)}) == 3


def test_a_committed_record_is_a_short_cut(elsewhere: Path, micro_data: Path, tmp_path: Path, monkeypatch):
    run = spec(micro_data, tmp_path / "run", "attention")
    everything = wanted(run, CPU)
    record = attention("sdpa")[0].failed("", CPU)
    monkeypatch.setattr(parity, "committed", lambda: (replace(record, passed=True, problem=None),))
    assert [c for c in everything if c not in missing(everything, CPU)] == attention("sdpa")


def test_doctor_shows_what_was_found(broken):
    broken("raises")
    found = {finding.what: finding for finding in kernels.of_device(CPU)}
    assert found["ssd by chunked"].state == found["attention by sdpa"].state == "ok"
    assert found["attention by sdpa"].detail.startswith("fp32, torch 2.13.0: within ")
    assert found["attention by raises"].state == "missing"
    assert found["attention by raises"].remedy == "runs pass over it; try another version of torch"
    assert not list(kernels.findings()), "there is no GPU"


def test_only_what_the_spec_may_take_is_compared(elsewhere: Path, micro_data: Path, tmp_path: Path):
    run = spec(micro_data, tmp_path / "run")
    named = run.updated({"backends": {"ssd": "reference", "experts": "grouped", "attention": "reference"}})
    assert [str(c) for c in wanted(named, CPU)] == ["conv by torch in fp32", "experts by grouped in fp32"]
