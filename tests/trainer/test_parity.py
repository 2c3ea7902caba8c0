"""Which backends count as proven, which may run without proof, and how missing or broken packages are reported."""

import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from trainer import parity
from trainer.ops import OPS, Setting, check, packages, resolve
from trainer.ops.check import compare, variants
from trainer.parity import Record
from trainer.spec import BackendsSpec

CPU = torch.device("cpu")
RECORD = Record("ssd", "mamba_ssm", "fp32", "mamba_ssm", "9.9", "2.13.0", "cpu", "x", 0.0, 0.0, 0.0, 1e-4, True)


@pytest.fixture
def with_records(monkeypatch):
    """Set the committed records."""

    def put(*records: Record) -> None:
        monkeypatch.setattr(parity, "committed", lambda: records)

    return put


@pytest.fixture
def mamba_installed(monkeypatch):
    """As if mamba_ssm 9.9 could run on this CPU."""
    monkeypatch.setitem(
        OPS["ssd"].backends, "mamba_ssm", replace(OPS["ssd"].backends["mamba_ssm"], unsupported=lambda s: None)
    )
    real = parity.package_version
    monkeypatch.setattr(parity, "package_version", lambda name: "9.9" if name == "mamba_ssm" else real(name))


def test_every_portable_backend_is_proven_on_a_cpu_with_the_locked_torch():
    for op in OPS.values():
        for name, backend in op.backends.items():
            if name == "reference" or not backend.portable:
                continue
            for variant in ("fp32", "bf16", "fp16"):
                version = parity.package_version("torch")
                assert parity.proven(op.name, name, variant, "cpu", version), (
                    f"{op.name} {name} {variant} has no passing record with torch {version}: "
                    "python benchmarks/parity.py --device cpu --write"
                )


def test_a_kernel_is_taken_only_with_a_passing_record_of_its_version(with_records, mamba_installed):
    for records, taken in (
        ([], False),
        ([RECORD], True),
        ([replace(RECORD, passed=False)], False),
        ([RECORD, replace(RECORD, torch="2.15.0", passed=False)], False),
        ([replace(RECORD, version="9.8")], False),
        ([replace(RECORD, device_class="sm_90")], False),
        ([replace(RECORD, variant="bf16")], False),
    ):
        with_records(*records)
        choice = resolve(BackendsSpec(), CPU)["ssd"]
        assert choice.name == ("mamba_ssm" if taken else "chunked"), records
        if not taken:
            where = "in fp32 on cpu with mamba_ssm 9.9"
            has_failed = any(not record.passed for record in records)
            said = f"wrong {where}: outputs differ by" if has_failed else f"unproven {where}; run benchmarks/parity.py"
            assert f"not mamba_ssm: {said}" in choice.reason


def test_without_any_record_the_portable_backends_run_and_are_called_unproven(with_records):
    with_records()
    choices = resolve(BackendsSpec(), CPU)
    assert choices.pop("orthogonalise").name == "reference", "it has no other portable backend"
    for choice in choices.values():
        assert choice.name in ("chunked", "torch", "sdpa", "grouped")
        assert not choice.proven and "unproven" in choice.reason and choice.label == f"{choice.name} (unproven)"


def test_a_named_backend_without_a_record_runs_and_says_so(with_records, mamba_installed):
    with_records()
    choice = resolve(BackendsSpec(ssd="mamba_ssm"), CPU)["ssd"]
    assert choice.name == "mamba_ssm" and choice.reason.startswith("named in the spec; unproven in fp32 on cpu")


@pytest.mark.parametrize(
    ("op", "backend"), [("ssd", "mamba_ssm"), ("conv", "causal_conv1d"), ("attention", "varlen"), ("experts", "te")]
)
def test_a_kernel_named_where_there_is_no_gpu_is_refused_in_one_line(op, backend):
    with pytest.raises(
        ValueError, match=rf"train\.backends\.{op}: '{backend}' cannot run on cpu: needs a CUDA device; use"
    ):
        resolve(BackendsSpec(**{op: backend}), CPU)


def test_a_package_may_be_missing_or_broken_in_any_way(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "yaongi_broken.py").write_text("raise ValueError('built for another torch\\nsecond line')")
    (tmp_path / "yaongi_no_library.py").write_text("raise OSError('libfoo.so: cannot open')")
    assert packages.load("yaongi_absent") == "yaongi_absent is not installed"
    broken = packages.load("yaongi_broken")
    assert broken == "yaongi_broken is installed but broken (ValueError: built for another torch)"
    assert "OSError: libfoo.so" in packages.load("yaongi_no_library")


def test_a_module_is_loaded_around_its_packages_init(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    package = tmp_path / "yaongi_partly"
    package.mkdir()
    (package / "__init__.py").write_text("import no_such_extension")
    (package / "kernels.py").write_text("from yaongi_partly.helpers import VALUE")
    (package / "helpers.py").write_text("VALUE = 3")
    assert packages.load_without_init("yaongi_partly.kernels").VALUE == 3
    assert packages.load_without_init("yaongi_absent.kernels") == "yaongi_absent is not installed"


def test_records_are_merged_by_what_they_compared(tmp_path):
    other = replace(RECORD, variant="bf16")
    parity.write([RECORD, other, replace(RECORD, device_class="sm_90")], tmp_path)
    parity.write([replace(RECORD, passed=False)], tmp_path)
    found = {record.key: record.passed for record in parity.committed.__wrapped__(tmp_path)}
    assert found == {RECORD.key: False, other.key: True, replace(RECORD, device_class="sm_90").key: True}


def test_a_comparison_sees_leaks_errors_and_nan(monkeypatch):
    sound = OPS["attention"].backends["sdpa"]

    def outcome(function) -> Record:
        monkeypatch.setitem(OPS["attention"].backends, "sdpa", replace(sound, function=function))
        return compare("attention", "sdpa", Setting(CPU))

    def leaky(q, k, v, documents):
        return sound.function(q, k, v + 1e-2 * v.mean(1, keepdim=True), documents)

    assert outcome(sound.function).passed and outcome(sound.function).leak == 0
    assert not outcome(leaky).passed and outcome(leaky).leak > 1e-4
    assert not outcome(lambda *t: sound.function(*t) * 1.001).passed
    assert outcome(lambda *t: sound.function(*t) * float("nan")).passed is False


def test_only_formats_that_a_backend_computes_are_compared(monkeypatch):
    fussy = replace(OPS["conv"].backends["torch"], unsupported=lambda s: None if s.variant == "fp16" else "no")
    monkeypatch.setitem(OPS["conv"].backends, "torch", fussy)
    assert [setting.variant for setting in variants("conv", "torch", CPU)] == ["fp16"]
    with pytest.raises(ValueError, match="conv: 'torch' cannot run on cpu: no"):
        compare("conv", "torch", Setting(CPU))
    assert check.device_name(CPU)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--device", "gpu"], "--device: gpu is none of cpu, cuda, cuda:0"),
        (["--device", "cuda:7"], "--device: no cuda:7, as torch "),
        (
            ["--device", "cpu", "--write", "--output", "FILE/records"],
            "FILE/records cannot be written (Not a directory);",
        ),
    ],
)
def test_the_benchmark_refuses_bad_places_before_it_compares(
    tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture, arguments: list[str], said: str
):
    """Its comparisons take minutes on a GPU, and would be lost."""
    file = tmp_path / "file"
    file.touch()
    program = str(Path(__file__).parents[2] / "benchmarks" / "parity.py")
    monkeypatch.setattr(sys, "argv", [program, *(each.replace("FILE", str(file)) for each in arguments)])
    monkeypatch.setattr(check, "compare", lambda *_: pytest.fail("nothing need be compared"))
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(program, run_name="__main__")
    assert ended.value.code == 2 and said.replace("FILE", str(file)) in capsys.readouterr().err
