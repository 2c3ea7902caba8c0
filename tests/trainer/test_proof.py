"""Kernels are compared where a run starts, in a process of their own; what is broken there is named and passed over.

The CPU has committed records. Triton's interpreter is a device class of its own, mostly without any: a GPU's stand-in.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import micro
import proof_child
import pytest
import torch
from prometheus_client import generate_latest
from waiting import wait_until

from pipelines.doctor import kernels
from trainer import evaluate, parity, precision
from trainer.distributed import World
from trainer.loop import train
from trainer.lora import LoraSpec
from trainer.ops import OPS, Setting, packages, resolve
from trainer.ops.check import cases
from trainer.parity import Record
from trainer.proof import cache, prove, start
from trainer.proof.comparisons import Comparison, missing, wanted
from trainer.proof.prove import Found, Limits
from trainer.proof.start import Proof
from trainer.recording.exporter import Metrics
from trainer.report import render
from trainer.report.run import read_run
from trainer.spec import BackendsSpec, TrainSpec

CPU = torch.device("cpu")
CHILD = (sys.executable, proof_child.__file__)
PORTABLE = sorted(
    (op.name, name)
    for op in OPS.values()
    for name, backend in op.backends.items()
    if backend.portable and name != "reference"
)


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A device class without records, and a cache directory of its own."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(parity, "committed", lambda: ())
    monkeypatch.setattr(prove, "CHILD", CHILD)
    for op in list(OPS.values()):  # real kernels are proven in tests/kernels; this process may have Triton as it is
        portable = {name: backend for name, backend in op.backends.items() if backend.portable}
        monkeypatch.setitem(OPS, op.name, replace(op, backends=portable))
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


def at_start(run: TrainSpec) -> Proof:
    (proof,) = start.at_start(run, alone()).values()
    return proof


def beside(run: TrainSpec) -> Path:
    (file,) = Path(run.run_dir).glob("proof-interpreter-*.json")
    return file


def attention(*names: str) -> list[Comparison]:
    return [Comparison("attention", name, "fp32") for name in names]


def test_what_nobody_has_proven_is_proven_once_and_then_taken(
    elsewhere: Path, micro_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO)
    run = spec(micro_data, tmp_path / "run")
    assert not any(c.proven for c in resolve(BackendsSpec(), CPU).values() if c.name != "reference")
    found = at_start(run)
    assert found.made == len(PORTABLE) >= 4 and not found.wrong and not found.problems
    assert sorted((record.op, record.backend) for record in found.records) == PORTABLE
    assert all(record.passed and record.device_class == "interpreter" for record in found.records)
    assert all(choice.proven for choice in resolve(BackendsSpec(), CPU).values())
    assert "proof: attention  sdpa     fp32  within" in caplog.text

    parity.forget()
    assert at_start(run).made == 0, "the cache has it"
    assert all(choice.proven for choice in resolve(BackendsSpec(), CPU).values())
    (kept,) = elsewhere.iterdir()
    for file in (beside(run), kept):
        file.unlink()
        parity.forget()
        assert at_start(run).made == 0, "each holds it, and makes the other anew"


def test_on_a_cpu_and_where_it_is_off_nothing_is_done_at_all(
    elsewhere: Path, micro_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name in ("gather", "broadcast"):
        monkeypatch.setattr(World, name, lambda *_: pytest.fail("no rank need wait for another"))
    monkeypatch.setattr(prove, "Child", lambda *_: pytest.fail("no process need be started"))
    monkeypatch.setattr(packages, "load", lambda module: pytest.fail(f"{module} need not be imported"))
    assert start.at_start(spec(micro_data, tmp_path / "run", prove=False), alone()) == {}
    monkeypatch.delenv("TRITON_INTERPRET")
    assert start.at_start(spec(micro_data, tmp_path / "run"), alone()) == {}
    assert not elsewhere.exists() and not (tmp_path / "run").exists()


def test_broken_kernels_are_named_with_what_they_do_and_the_others_are_proven(
    broken, elsewhere: Path, micro_data: Path, tmp_path: Path
):
    broken("crashes", "exits", "raises", "errs")
    run = spec(micro_data, tmp_path / "run", "attention")
    found = at_start(run)
    outcomes = {record.backend: record.outcome for record in found.records if record.op == "attention"}
    assert outcomes["crashes"] == "crashes (SIGABRT): CUDA error: an illegal memory access was encountered"
    assert outcomes["raises"] == "fails: RuntimeError: no kernel image is available for execution on the device"
    assert outcomes["errs"].startswith("outputs differ by 1.0e-02 of the reference's, 1e-04 is allowed")
    assert outcomes["exits"] == "ends with exit code 3"
    assert outcomes["sdpa"].startswith("within")
    passed_over = "crashes (attention, fp32, torch 2.13.0) is passed over: crashes (SIGABRT): CUDA error"
    assert len(found.wrong) == 4 and found.wrong[0].startswith(passed_over) and not found.problems
    assert found.wrong[0].endswith(f"to compare it again, remove {beside(run)} and {elsewhere / beside(run).name}")
    assert not any("\n" in remark for remark in found.wrong)
    choice = resolve(BackendsSpec(), CPU)["attention"]
    assert choice.name == "sdpa" and choice.proven
    assert "not raises: wrong in fp32 on interpreter with torch 2.13.0: fails: RuntimeError: no kernel" in choice.reason
    parity.forget()
    again = at_start(run)
    assert again.made == 0 and sorted(again.wrong) == sorted(found.wrong), "it is not tried again at every start"


IMPORTS = {
    "yaongi_segfaults": "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)",
    "yaongi_exits": "import os\nprint('unsupported driver', flush=True)\nos._exit(7)",
    "yaongi_refuses": "raise SystemExit('unsupported driver')",
}


def test_an_import_that_ends_a_process_does_not_end_the_run(
    broken, micro_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    place = tmp_path / "packages"
    place.mkdir()
    for module, program in IMPORTS.items():
        (place / f"{module}.py").write_text(program)
    monkeypatch.syspath_prepend(place)
    monkeypatch.setenv("PYTHONPATH", f"{place}:{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setattr(packages, "_refused", {})
    broken(*IMPORTS)
    run = spec(micro_data, tmp_path / "run", "attention")
    found = at_start(run)
    assert found.known.refused == {
        "yaongi_segfaults": "yaongi_segfaults is installed but broken (its import crashes (SIGSEGV))",
        "yaongi_exits": "yaongi_exits is installed but broken (its import ends with exit code 7: unsupported driver)",
    }
    assert [record.backend for record in found.records] == ["sdpa"] and not found.problems
    assert all(said.split(", so it")[0] in found.known.refused.values() for said in found.wrong)
    reason = resolve(BackendsSpec(), CPU)["attention"].reason
    assert all(f"not {module}: {said}" in reason for module, said in found.known.refused.items())
    assert "not yaongi_refuses: yaongi_refuses is installed but broken (SystemExit: unsupported driver)" in reason
    parity.forget()
    monkeypatch.setattr(packages, "_refused", {})
    assert at_start(run).known.refused == found.known.refused, "a restarted run imports them no more than this one"


def test_a_package_that_others_have_proven_is_imported_by_another_process_first(
    broken, micro_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A committed record says nothing about this machine's libraries."""
    broken("errs")
    record = replace(attention("errs")[0].failed("", CPU), passed=True, problem=None)
    monkeypatch.setattr(parity, "committed", lambda: (record,))
    run = spec(micro_data, tmp_path / "run", "attention")
    found = at_start(run)
    assert found.made == 1 and not found.wrong, "it would fail if it were compared again"
    assert json.loads(beside(run).read_text())["unsupported"]["attention by errs in fp32"] is None
    assert at_start(run).made == 0


# A child that hangs in comparisons with "hangs" and passes all others, without the time that torch takes to start.
SWIFT = """
import json, sys, time
for number, (op, backend, variant, _) in enumerate(json.load(sys.stdin)["comparisons"]):
    print(json.dumps({"begun": number}), flush=True)
    time.sleep(600 if backend == "hangs" else 0)
    print(json.dumps({"done": number, "unusable": None, "record": RECORD | {"backend": backend}}), flush=True)
"""


@pytest.fixture
def swift(monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    backends = dict.fromkeys(("hangs", "sdpa", "reference"), OPS["attention"].backends["sdpa"])
    monkeypatch.setitem(OPS, "attention", replace(OPS["attention"], backends=backends))
    record = replace(attention("sdpa")[0].failed("", CPU), passed=True, problem=None)
    return sys.executable, "-c", SWIFT.replace("RECORD", str(vars(record)))


def test_a_kernel_that_hangs_ends_at_its_limit_and_the_second_time_is_passed_over(swift: tuple[str, ...]):
    comparisons = attention("hangs", "sdpa")
    limits = Limits(comparison_seconds=3)
    first = prove.prove(comparisons, CPU, limits, command=swift)
    assert [record.backend for record in first.records] == ["sdpa"] and first.slow == ["attention by hangs in fp32"]
    said = "attention by hangs in fp32 takes longer than 3 s, and is compared once more at the next start"
    assert first.problems == [said], "it may have been compiling"
    second = prove.prove(comparisons, CPU, limits, command=swift, slow=first.slow)
    hung, after = second.records
    assert hung.outcome == "takes longer than 3 s" and after.passed and not second.problems


def test_what_was_slow_is_kept_for_the_next_start(elsewhere, micro_data: Path, tmp_path: Path, monkeypatch):
    asked = []

    def slow_once(comparisons: list[Comparison], *_: object, slow: list[str], **__: object) -> Found:
        asked.append([*slow])
        return Found(slow=["attention by sdpa in fp32"])

    monkeypatch.setattr(start, "prove", slow_once)
    for _ in range(2):
        at_start(spec(micro_data, tmp_path / "run", "attention"))
    assert asked == [[], ["attention by sdpa in fp32"]]


def test_an_import_that_hangs_is_refused_at_its_limit():
    told = [{"begun": 0}, {"importing": "slow_package.ops"}]
    program = f"""
import json, sys, time
if json.load(sys.stdin)["refused"]:
    print('{{"done": 0, "unusable": null, "unsupported": "refused"}}', flush=True)
else:
    for line in {told}:
        print(json.dumps(line), flush=True)
    time.sleep(600)
"""
    command = sys.executable, "-c", program
    found = prove.prove(attention("sdpa"), CPU, Limits(start_seconds=3, comparison_seconds=99), command=command)
    said = "slow_package is installed but broken (its import takes longer than 3 s)"
    assert found == Found(unsupported={"attention by sdpa in fp32": "refused"}, refused={"slow_package.ops": said})


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's signal for it is Linux's")
def test_a_kernel_that_hangs_does_not_outlive_a_run_that_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It would keep the GPU from the next one."""
    held = tmp_path / "held"
    program = f"""
from trainer.proof.process import Child
comparisons = [["attention", "holds", "fp32", False]]
request = {{"device": "cpu", "memory_bytes": 0, "refused": {{}}, "comparisons": comparisons}}
with Child({CHILD!r}, request) as child:
    child.line(600), child.line(600)
"""
    run = subprocess.Popen([sys.executable, "-c", program], env=os.environ | {"HELD": str(held)})
    try:
        wait_until(lambda: held.exists() and held.read_text() != "")
        run.kill()
        pid = int(held.read_text())
        wait_until(lambda: not is_alive(pid))
    finally:
        run.kill()
        run.wait()


def is_alive(pid: int) -> bool:
    """Neither gone nor a zombie that nobody has asked for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_all_together_have_a_limit_and_what_is_missing_is_named(swift: tuple[str, ...]):
    comparisons = attention("sdpa", "hangs", "reference")
    found = prove.prove(comparisons, CPU, Limits(all_seconds=6), command=swift)
    assert [record.backend for record in found.records] == ["sdpa"]
    left = "attention by hangs in fp32, attention by reference in fp32"
    assert found.problems == [f"the comparisons took longer than 6 s; not compared: {left}"]


def test_what_is_not_about_a_kernel_leaves_no_record_and_a_gpu_that_has_become_unusable_a_new_process(broken):
    names = "fills", "cannot_write", "poisons", "uses_all_memory", "shouts"
    broken(*names)
    found = prove.prove(attention(*names), CPU)
    outcomes = {record.backend: record.outcome for record in found.records}
    assert outcomes.pop("shouts").startswith("within"), "it is right, and a new process has found that"
    assert outcomes == {"poisons": "fails: RuntimeError: CUDA error: an illegal memory access was encountered"}
    assert found.problems == [
        "attention by fills in fp32 is not compared: CUDA out of memory. Tried to allocate 2.00 GiB",
        "attention by cannot_write in fp32 is not compared: [Errno 13] Permission denied: '/home/nobody/.triton'",
        "attention by uses_all_memory in fp32 is not compared: its process is killed, as Linux does where memory runs "
        "out (see dmesg on the node; give the pod more)",
    ]


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("raise SystemExit('no driver')", "the process of the comparisons ends with exit code 1: no driver"),
        ("import time; time.sleep(99)", "the process of the comparisons takes longer than 2 s"),
    ],
)
def test_a_process_that_cannot_begin_is_told_in_one_line(program: str, expected: str):
    command = (sys.executable, "-c", program)
    found = prove.prove(attention("sdpa"), CPU, Limits(start_seconds=2), command=command)
    assert found == Found(problems=[f"{expected}; not compared: attention by sdpa in fp32"])


def test_a_process_that_cannot_be_started_is_told_in_one_line():
    found = prove.prove(attention("sdpa"), CPU, command=("/nonexistent/python",))
    (problem,) = found.problems
    assert problem.startswith("the process of the comparisons cannot be started (No such file or directory); not")


@pytest.mark.parametrize("kind", [RuntimeError, AttributeError])
def test_a_driver_that_fails_leaves_the_run_what_is_proven(elsewhere, micro_data: Path, tmp_path, monkeypatch, kind):
    """The other ranks wait for what this one has found."""

    def fails(device: torch.device) -> None:
        raise kind("CUDA error: unknown error\nsecond line")

    monkeypatch.setattr(start, "_occupied", fails)
    found = at_start(spec(micro_data, tmp_path / "run", "attention"))
    assert found == Proof(problems=("nothing is compared: CUDA error: unknown error",))


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


def test_a_cache_that_cannot_be_written_is_told_once_and_the_run_goes_on(
    elsewhere: Path, micro_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    elsewhere.parent.mkdir()
    elsewhere.write_text("a file where the directory should be")
    run = spec(micro_data, tmp_path / "run", "attention")
    found = at_start(run)
    assert found.made == 1
    assert [line.split(": ", 1)[1] for line in caplog.messages] == list(found.problems)
    caplog.clear()
    parity.forget()
    beside(run).write_text("damaged")
    at_start(run)
    assert sorted(line.split(": ", 1)[1] for line in caplog.messages) == sorted(
        [*found.problems, f"{beside(run)} is damaged and is made again"]
    )
    assert found.problems == (f"{elsewhere} cannot be written (File exists), so the proof is not kept there",)


RECORD = vars(attention("sdpa")[0].failed("made by hand", CPU))


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: json.dumps(content)[:200].encode(),
        lambda content: b"",
        lambda content: b"\xff\xfe",
        lambda content: b"[1, 2]",
        lambda content: b"[" * 100_000,
        lambda content: json.dumps(content | {"records": 3}).encode(),
        lambda content: json.dumps(content | {"records": [{"op": "attention"}]}).encode(),
        lambda content: json.dumps(content | {"records": [RECORD | {"op": ["attention"]}]}).encode(),
        lambda content: json.dumps(content | {"records": [RECORD | {"op": 3}, RECORD]}).encode(),
        lambda content: json.dumps(content | {"records": [RECORD | {"leak": "small"}]}).encode(),
        lambda content: json.dumps(content | {"slow": [3, "a"]}).encode(),
        lambda content: json.dumps(content | {"refused": {"torch": 3}}).encode(),
        lambda content: json.dumps(content | {"of_a_later_version": 3}).encode(),
        lambda content: json.dumps(content).encode() + b" " * cache.LARGEST_BYTES,
        lambda content: json.dumps({"records": content["records"], "trials": {}}).encode(),
        lambda content: json.dumps(content | {"environment": {"device": "another GPU"}}).encode(),
    ],
)
def test_a_damaged_file_or_one_of_another_machine_is_as_none(elsewhere: Path, damage, caplog: pytest.LogCaptureFixture):
    known = cache.Known([Record(**RECORD)])
    (file,) = places = cache.files(CPU, None)
    assert not cache.write(places, known, CPU) and cache.read(places, CPU) == known
    file.write_bytes(damage(json.loads(file.read_text())))
    assert cache.read(places, CPU) == cache.Known()
    assert caplog.messages == [f"proof: {file} is damaged and is made again"]
    assert not cache.write(places, known, CPU) and cache.read(places, CPU) == known


def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(elsewhere: Path, caplog: pytest.LogCaptureFixture):
    (file,) = places = cache.files(CPU, None)
    file.parent.mkdir(parents=True)
    os.mkfifo(file)
    assert cache.read(places, CPU) == cache.Known()
    assert caplog.messages == [f"proof: {file} is damaged and is made again"]
    known = cache.Known([Record(**RECORD)])
    assert not cache.write(places, known, CPU) and file.is_file() and cache.read(places, CPU) == known


def test_of_several_writers_none_loses_what_another_wrote_and_what_failed_for_one_failed(
    elsewhere: Path, tmp_path: Path
):
    failed = Record(**RECORD)
    passed, other = replace(failed, passed=True, problem=None), replace(failed, backend="flash_attn")
    places = cache.files(CPU, str(tmp_path / "run"))
    for number, record in enumerate((passed, failed, passed, other)):
        assert not cache.write(places, cache.Known([record], trials={str(number): {}}), CPU)
    for place in places:
        found = cache.read([place], CPU)
        assert found.records == [other, failed] and found.trials == {str(number): {} for number in range(4)}


def test_a_new_run_in_another_pod_takes_over_what_has_passed_beside_it(
    broken, micro_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    broken("errs")
    runs = tmp_path / "runs"
    first = at_start(spec(micro_data, runs / "first", "attention"))
    assert first.made == 2 and len(first.wrong) == 1
    parity.forget()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "lost"))
    asked = []
    monkeypatch.setattr(start, "prove", lambda comparisons, *_, **__: asked.extend(map(str, comparisons)) or Found())
    second = at_start(spec(micro_data, runs / "second", "attention"))
    assert asked == ["attention by errs in fp32"], "what failed is compared again"
    assert [record.backend for record in second.records] == ["sdpa"] and beside(spec(micro_data, runs / "second"))
    (runs / "third").write_text("no directory")
    assert cache.of_other_runs(str(tmp_path / "nowhere" / "run"), CPU) == cache.Known()


def test_a_full_disk_is_told_and_leaves_nothing_half_written(elsewhere: Path, monkeypatch: pytest.MonkeyPatch):
    known = cache.Known([Record(**RECORD)])
    (place,) = places = cache.files(CPU, None)
    cache.write(places, known, CPU)
    before = place.read_bytes()

    def full(self: Path, text: str, encoding: str) -> None:
        self.write_bytes(text[:100].encode())
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    (problem,) = cache.write(places, cache.Known(trials={"more": {}}), CPU)
    assert problem == f"{elsewhere} cannot be written (No space left on device), so the proof is not kept there"
    assert [file.read_bytes() for file in elsewhere.iterdir()] == [before]


def test_a_file_is_of_one_card_and_of_one_part_of_it(elsewhere: Path, monkeypatch: pytest.MonkeyPatch):
    names = ["NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"]
    found = set()
    for name in names:
        monkeypatch.setattr(cache, "device_name", lambda device, name=name: name)
        found |= set(cache.files(CPU, None))
    assert len(found) == 3


def test_a_file_is_of_one_driver_in_its_own_version(elsewhere: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Several drivers are of one version of CUDA."""
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(cache, "device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(cache, "Setting", lambda device: SimpleNamespace(device_class="sm_90"))
    monkeypatch.setattr(cache, "driver_cuda_version", lambda: (13, 0))
    monkeypatch.setattr(cache, "DRIVER", tmp_path / "version")
    found = cache.files(gpu, None)  # as in a container without the file
    for version in ("580.82.07", "580.95.05"):
        cache.DRIVER.write_text(f"NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {version}\nGCC version:\n")
        found += cache.files(gpu, None)
    assert len(set(found)) == 3 and found[-1] == cache.files(gpu, None)[0]


def test_what_is_wanted_on_a_gpu_is_known_without_an_import(micro_data: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(packages, "load", lambda module: pytest.fail(f"{module} may end the process"))
    run = spec(micro_data, tmp_path / "run")
    found = list(map(str, wanted(run, torch.device("cuda", 0))))
    for kernel in ("ssd by mamba_ssm", "conv by causal_conv1d", "attention by flash_attn", "experts by te"):
        assert f"{kernel} in bf16" in found
    assert "linear by te in current" in found


def test_writers_at_the_same_time_leave_a_whole_file(elsewhere: Path):
    known = cache.Known([Record(**RECORD)], unsupported={str(number): "absent" for number in range(500)})
    (place,) = places = cache.files(CPU, None)
    with ThreadPoolExecutor(8) as nodes:
        assert not any(nodes.map(lambda _: cache.write(places, known, CPU), range(64)))
    assert cache.read(places, CPU) == known
    assert [file.name for file in place.parent.iterdir()] == [place.name], "no draft is left"


def test_without_a_home_the_place_is_the_one_for_temporary_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.directory() == tmp_path / ".cache" / "yaongi"
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("Could not determine home")))
    monkeypatch.setattr(cache.tempfile, "gettempdir", lambda: str(tmp_path))
    assert cache.directory().parent == tmp_path


def test_another_version_or_other_code_is_another_file(elsewhere: Path, monkeypatch: pytest.MonkeyPatch):
    here = cache.files(CPU, None)
    real = parity.package_version
    monkeypatch.setattr(parity, "package_version", lambda name: "9.9" if name == "triton" else real(name))
    other = cache.files(CPU, None)
    monkeypatch.setattr(cache, "_code", lambda: "changed")
    assert len({*here, *other, *cache.files(CPU, None)}) == 3


def test_a_committed_record_is_a_short_cut(elsewhere: Path, micro_data: Path, tmp_path: Path, monkeypatch):
    run = spec(micro_data, tmp_path / "run", "attention")
    record = attention("sdpa")[0].failed("", CPU)
    monkeypatch.setattr(parity, "committed", lambda: (replace(record, passed=True, problem=None),))
    assert attention("sdpa")[0] in wanted(run, CPU)
    absent = dict.fromkeys(map(str, missing(wanted(run, CPU), CPU, {})))
    assert "attention by sdpa in fp32" not in absent
    assert missing(wanted(run, CPU), CPU, absent) == [], "of what is left, nothing can run here"


def test_doctor_shows_what_was_found_and_what_would_be_taken(broken, monkeypatch: pytest.MonkeyPatch):
    broken("raises", "fills")
    found = {finding.what: finding for finding in kernels.of_device(CPU)}
    assert found["ssd by chunked"].state == found["attention by sdpa"].state == "ok"
    assert found["attention by sdpa"].detail.startswith("fp32, torch 2.13.0: within ")
    assert found["attention by raises"].state == "missing"
    assert found["attention by raises"].remedy == "runs pass over it; try another version of torch"
    assert found["attention by fills"].state == "unknown" and found["attention by fills"].detail.endswith(
        "not compared"
    )
    assert found["kernels"].detail.startswith("attention by fills in fp32 is not compared: CUDA out of memory")
    assert found["attention taken"].state == "ok" and found["attention taken"].detail.startswith("sdpa: torch scaled")
    assert "not raises: wrong in fp32 on interpreter" in found["attention taken"].detail
    assert found["precision taken"].detail.startswith("fp32: ")


def test_doctor_says_one_line_where_there_is_no_gpu_or_its_driver_fails(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernels, "of_device", lambda device: pytest.fail("there is no GPU"))
    (line,) = kernels.findings()
    assert line.state == "ok" and line.detail.startswith("plain PyTorch, as there is no GPU")

    def fails(index: int) -> str:
        raise RuntimeError("CUDA error: unknown error\nCompile with TORCH_USE_CUDA_DSA")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", fails)
    (line,) = kernels.findings()
    assert line.state == "unknown" and line.detail.endswith("cannot be asked: CUDA error: unknown error")


def test_doctor_says_one_line_where_nothing_can_be_compared(elsewhere: Path, monkeypatch: pytest.MonkeyPatch):
    def fails(device: torch.device) -> None:
        raise RuntimeError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA")

    monkeypatch.setattr(start, "_occupied", fails)
    (line,) = kernels.of_device(CPU)
    assert line.state == "unknown" and line.detail == "not compared on cpu: CUDA error: out of memory"


def test_only_what_the_spec_may_take_is_compared(elsewhere: Path, micro_data: Path, tmp_path: Path):
    run = spec(micro_data, tmp_path / "run")
    named = run.updated({"backends": {"ssd": "reference", "experts": "grouped", "attention": "reference"}})
    offered = {(op, name) for op in OPS for name in OPS[op].backends if name != "reference"}
    left = {("experts", "grouped")} | {(op, name) for op, name in offered if op not in ("ssd", "experts", "attention")}
    assert {(c.op, c.backend) for c in wanted(named, CPU)} == left


def test_a_run_proves_tries_tells_and_learns_as_without(
    broken, micro_data: Path, tmp_path: Path, monkeypatch, leave_no_traces, quiet_checkpoint_library
):
    broken("is_right", "errs")
    pages: list[str] = []
    monkeypatch.setattr(Metrics, "close", lambda self: pages.append(generate_latest(self.registry).decode()))
    run = spec(micro_data, tmp_path / "run", "attention").updated({"steps": 2})
    assert train(run) == 0
    told = json.loads((tmp_path / "run" / "proof.json").read_text())
    outcomes = {row["backend"]: (row["passed"], row["outcome"].split()[0]) for row in told["kernels"]}
    assert outcomes == {"is_right": (True, "within"), "errs": (False, "outputs"), "sdpa": (True, "within")}
    assert [row["change"] for row in told["trial"]["rows"]] == ["as proven", "attention: sdpa"]
    (used,) = [row["backend"] for row in told["kernels"] if row["used"]]
    assert used == told["chosen"]["attention"] in ("is_right", "sdpa") and "errs" in told["remarks"][0]
    labels = 'format="fp32",operation="attention",rank="0"'
    for name, value in (("is_right", 1.0), ("errs", 0.0)):
        assert f'yaongi_proof_result{{backend="{name}",{labels}}} {value}' in pages[0]
    assert 'yaongi_trial_seconds{way="attention: sdpa"} ' in pages[0] and "yaongi_proof_seconds{" in pages[0]
    page = render(read_run(run.run_dir))
    assert 'id="kernels"' in page and 'id="trial"' in page and told["kernels"][1]["outcome"][:40] in page

    parity.forget()
    loaded = []
    monkeypatch.setattr(evaluate, "load_trained", lambda *_: loaded.append(resolve(run.backends, CPU)) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate.run(run)
    assert loaded[0]["attention"].name == "is_right" and loaded[0]["attention"].proven, "training has proven it"

    monkeypatch.delenv("TRITON_INTERPRET")
    plain = run.updated({"run_dir": str(tmp_path / "plain"), "backends": {"attention": "sdpa"}})
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "proof.json").write_text(json.dumps(told))  # of an earlier start, which a report would show
    assert train(plain) == 0 and not (tmp_path / "plain" / "proof.json").exists()
    assert losses(run) == losses(plain)


def losses(run: TrainSpec) -> list[float]:
    lines = (Path(run.run_dir) / "logs" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.parametrize(
    ("precision_of_spec", "expected"),
    [
        ({}, ["linear by te in current", "linear by torch in current", "fp8_experts by torch in current"]),
        ({"fp8": {"recipe": "block128", "implementation": "te"}}, ["linear by te in block128"]),
        ({"dtype": "fp8", "fp8": {"implementation": "emulated"}}, []),
        ({"dtype": "bf16"}, []),
    ],
)
def test_fp8_is_compared_in_the_recipe_of_the_spec(
    elsewhere: Path, micro_data: Path, tmp_path: Path, monkeypatch, precision_of_spec: dict, expected: list[str]
):
    monkeypatch.setattr(precision, "device_capability", lambda device: (9, 0))
    run = spec(micro_data, tmp_path / "run").updated({"precision": precision_of_spec})
    found = [each for each in wanted(run, CPU) if each.op not in OPS]
    assert list(map(str, found)) == expected
    assert all(each.package == ("transformer_engine" if each.backend == "te" else "torch") for each in found)
    adapted = run.model_copy(update={"model": run.model.model_copy(update={"lora": LoraSpec()})})
    assert all(each.op in OPS for each in wanted(adapted, CPU)), "FP8 does not go with adapters"


@pytest.mark.parametrize("op", OPS)
def test_the_cases_of_every_operation_are_few_and_small(op: str):
    """What is compared at a start must fit beside a model and take seconds."""
    found = list(cases(op, Setting(CPU)))
    assert 0 < len(found) <= 24
    assert all(sum(each.nbytes for each in case.inputs) < 2**23 for case in found)
