"""Jobs that do not fit on this machine are refused before their download, in one line with both numbers."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from components.plan import feasible
from manifests.spec import JobSpec, load_job
from trainer.data.manifest import FileEntry, Manifest, write_manifest
from trainer.errors import SpecError, VolumeError

GIB = 2**30


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimpleNamespace:
    """Two cores, no GPU, much memory and disk, unless a test changes it."""
    here = SimpleNamespace(memory=1 << 40, free=1 << 45, devices=tmp_path / "dev")
    here.devices.mkdir()
    monkeypatch.setattr(feasible, "DEVICES", here.devices)
    monkeypatch.setattr(feasible, "limit_bytes", lambda: here.memory)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=here.free, f_frsize=1, f_blocks=1))
    return here


def job(tmp_path: Path, preset: str, **train: object) -> JobSpec:
    storage = {"datasets_dir": str(tmp_path / "datasets"), "checkpoints_dir": str(tmp_path / "checkpoints")}
    return load_job(preset, {"storage": storage, "train": train})


@pytest.mark.parametrize("preset", ["tiny", "small"])
def test_small_presets_are_for_any_machine(machine: SimpleNamespace, tmp_path: Path, preset: str) -> None:
    machine.memory, machine.free = 8 * GIB, 10 * GIB
    feasible.refuse_hopeless(job(tmp_path, preset), train=True)


def test_years_of_two_cores_are_refused_unless_somebody_insists(machine: SimpleNamespace, tmp_path: Path) -> None:
    large = job(tmp_path, "h100-4b")
    with pytest.raises(SpecError, match=r"take about [\d,]{5,} days on 2 cores without a GPU.*device: cpu"):
        feasible.refuse_hopeless(large, train=True)
    feasible.refuse_hopeless(large, train=False)
    feasible.refuse_hopeless(job(tmp_path, "h100-4b", runtime={"device": "cpu"}), train=True)
    (machine.devices / "nvidia0").touch()
    feasible.refuse_hopeless(large, train=True)


def test_megatron_is_missed_before_any_data_is_downloaded(
    machine: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = job(tmp_path, "qwen3-30b-a3b-megatron", runtime={"device": "cpu"})
    with pytest.raises(SpecError, match=r"Megatron-LM is not in this image"):
        feasible.refuse_hopeless(wanted, train=True)
    machine.free = 10_000 * GIB
    feasible.refuse_hopeless(wanted, train=False)  # only its data
    (tmp_path / "pretrain_gpt.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    feasible.refuse_hopeless(wanted, train=True)


def test_a_model_beyond_the_memory_is_refused_although_somebody_insists(
    machine: SimpleNamespace, tmp_path: Path
) -> None:
    machine.memory = 24 * GIB
    with pytest.raises(SpecError, match=r"take 41\.2 GiB .* without a GPU, has 24\.0"):
        feasible.refuse_hopeless(job(tmp_path, "h100-4b", runtime={"device": "cpu"}), train=True)


def test_a_volume_without_room_for_data_and_checkpoints_is_named_with_both_numbers(
    machine: SimpleNamespace, tmp_path: Path
) -> None:
    (machine.devices / "nvidia0").touch()
    machine.free = 50 * GIB
    large = job(tmp_path, "h100-4b")
    # 108 GB ÷ 1.2 of text, a third of that again as tokens, and the checkpoints.
    with pytest.raises(
        VolumeError, match=r"datasets has 50\.0 GiB free, the job needs about 111\.8 GiB there"
    ) as error:
        feasible.refuse_hopeless(large, train=False)
    assert error.value.code == 74
    machine.free = 150 * GIB
    feasible.refuse_hopeless(large, train=False)
    with pytest.raises(VolumeError, match=r"150\.0 GiB free"):
        feasible.refuse_hopeless(large, train=True)
    there = {name: large.byte_budget(name) or 0 for name in large.data.sources}
    for kind in ("raw", "shards"):
        files = [
            FileEntry(path=name, bytes=1, algorithm="sha256", checksum="", source=name, text_bytes=size)
            for name, size in there.items()
        ]
        folder = Path(large.stage_dir(kind))
        folder.mkdir(parents=True)
        write_manifest(folder, Manifest(kind=kind, files=files))
    feasible.refuse_hopeless(large, train=True)
    with pytest.raises(VolumeError, match=r"the job needs about"):  # what a longer run appends
        machine.free = 1 * GIB
        feasible.refuse_hopeless(large.updated({"train": {"steps": large.train.steps * 5 // 4}}), train=False)
