"""Preflight: problems of a node or between nodes are reported in one line before the first step."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import forked
import micro
import numpy as np
import pytest
import torch

from trainer import preflight
from trainer.data.format import ShardWriter
from trainer.data.manifest import Manifest, file_entry, write_manifest
from trainer.distributed import World
from trainer.errors import ForeseenError, GpuError, VolumeError
from trainer.exitcodes import ExitCode
from trainer.preflight import gpus, storage
from trainer.recording.recorder import Recorder
from trainer.spec import TokensSpec

# In a mount namespace of its own a process may have any /dev/shm and any volume.
NAMESPACE = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"])]
can_mount = shutil.which("unshare") and not subprocess.run([*NAMESPACE, "true"], capture_output=True).returncode
mounts = pytest.mark.skipif(not can_mount, reason="needs root or user namespaces, to mount")


def start(spec, directory: Path, mount: str) -> tuple[int, dict, str]:
    """Run the entrypoint where `mount` (shell) has been done: exit code, termination message, output."""
    message = directory / "termination-log"
    message.touch()
    file = micro.write_spec(spec, directory / "spec.yaml")
    script = f'{mount} && exec "$0" -m trainer.entrypoint --spec "$1"'
    environment = micro.environment(YAONGI_TERMINATION_LOG=str(message), NODE_NAME="node-a")
    command = [*NAMESPACE, "sh", "-c", script, sys.executable, str(file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    return done.returncode, json.loads(message.read_text()), done.stdout + done.stderr


@mounts
def test_a_small_dev_shm_ends_with_2(micro_data: Path, tmp_path: Path):
    spec = micro.micro_spec(micro_data, tmp_path / "run", runtime={"preflight": {"min_shared_memory_gib": 1}})
    code, message, output = start(spec, tmp_path, "mount -t tmpfs -o size=64m none /dev/shm")
    assert code == message["code"] == ExitCode.SPEC
    assert message["reason"].startswith("preflight on node node-a: /dev/shm has 64 MiB, the job asks for 1 GiB; mount")
    assert "Traceback" not in output


@mounts
@pytest.mark.parametrize(
    ("mount", "keep_last", "reason"),
    [
        ("mount --bind {0} {0} && mount -o remount,ro,bind {0}", 2, "{0}: Read-only file system; fix the volume"),
        ("mount -t tmpfs -o size=6m none {0}", 2, "{0} cannot take checkpoints (No space left on device); free space"),
        ("mount -t tmpfs -o size=64m none {0}", 900, "{0} has 64 MiB free, the run needs"),
    ],
    ids=["read-only", "full", "too small for its checkpoints"],
)
def test_a_volume_that_cannot_take_checkpoints_ends_with_74(
    micro_data: Path, tmp_path: Path, mount: str, keep_last: int, reason: str
):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    checkpoint = {"keep_last": keep_last, "every_steps": 1}
    spec = micro.micro_spec(micro_data, run_dir, steps=900, checkpoint=checkpoint)
    code, message, output = start(spec, tmp_path, mount.format(run_dir))
    assert code == message["code"] == ExitCode.VOLUME
    assert reason.format(run_dir) in message["reason"]
    assert "Traceback" not in output and not list(run_dir.iterdir())


def test_space_is_asked_for_what_the_run_will_write_and_found_in_what_it_left_behind(
    micro_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(storage.os, "statvfs", lambda _: SimpleNamespace(f_bavail=1, f_frsize=2**20, f_blocks=9))
    one = micro.micro_spec(micro_data, tmp_path, steps=4, checkpoint={"keep_last": 900, "every_steps": 4})
    assert storage.writable(one, None).bytes_per_second
    many = one.updated({"steps": 900})
    with pytest.raises(ForeseenError, match=r"the run needs .* \(225 checkpoints"):
        storage.writable(many, None)
    torn = tmp_path / "checkpoints" / ".unfinished-step-00000004"
    torn.mkdir(parents=True)
    with (torn / "weights").open("wb") as file:
        file.truncate(2**30)
    assert storage.writable(many, None).bytes_per_second


def test_a_writable_volume_is_measured_and_left_clean(micro_data: Path, tmp_path: Path):
    spec = micro.micro_spec(micro_data, tmp_path)
    (tmp_path / "train.yaml").touch()
    measured = storage.writable(spec, None)
    assert measured.bytes_per_second > 0 and "free" in measured.text
    assert [path.name for path in tmp_path.iterdir()] == ["train.yaml"]
    with pytest.raises(
        ForeseenError, match=r"the floor is 1e\+09; .* lower train.runtime.preflight.min_write_mb"
    ) as error:
        storage.writable(spec, 1e9)
    assert error.value.code == ExitCode.VOLUME


@pytest.fixture
def six_megabytes(micro_data: Path, tmp_path: Path) -> TokensSpec:
    """Shards large enough to be timed."""
    with ShardWriter(tmp_path / "x-train", np.uint16) as writer:
        writer.append(np.ones(3_000_000, np.uint16), np.array([3_000_000]))
    entries = [file_entry(tmp_path, f"x-train.{end}", source="x", split="train") for end in ("bin", "idx")]
    write_manifest(tmp_path, Manifest(kind="shards", files=entries))
    return micro.micro_spec(micro_data, tmp_path, tokens={"shards": str(tmp_path)}).tokens


def test_datasets_are_read_and_measured(six_megabytes: TokensSpec, micro_data: Path):
    measured = storage.readable(six_megabytes, None)
    assert measured.text == f"datasets {measured.bytes_per_second / 1e6:,.0f} MB/s"
    with pytest.raises(ForeseenError, match=r"is read at .* MB/s, the floor is 1e\+09") as error:
        storage.readable(six_megabytes, 1e9)
    assert error.value.code == ExitCode.VOLUME
    few = micro.micro_spec(micro_data, micro_data / "run").tokens
    assert storage.readable(few, 1e9).warning is None, "a few kilobytes tell nothing about a volume"


def test_datasets_that_cannot_be_read_end_with_65(six_megabytes: TokensSpec, tmp_path: Path):
    (tmp_path / "x-train.bin").unlink()
    (tmp_path / "x-train.bin").mkdir()
    with pytest.raises(ForeseenError, match=r"x-train\.bin: Is a directory; fix the datasets volume") as error:
        storage.readable(six_megabytes, None)
    assert error.value.code == ExitCode.VOLUME


def test_slow_volumes_without_a_floor_only_warn(monkeypatch: pytest.MonkeyPatch, six_megabytes: TokensSpec):
    monkeypatch.setattr(storage, "SLOW_MB_PER_SECOND", 1e9)
    assert "training may wait for it" in storage.readable(six_megabytes, None).warning


def failing(error: ForeseenError):
    raise error


def test_all_checks_are_made_and_a_permanent_failure_wins(caplog: pytest.LogCaptureFixture):
    checks = {
        "gpus": lambda: failing(GpuError("3 of 8 GPUs")),
        "datasets": lambda: failing(VolumeError("unreadable")),
    }
    with pytest.raises(ForeseenError, match=r"preflight on node .*: unreadable") as error:
        preflight.run(checks)
    assert error.value.code == ExitCode.VOLUME
    assert "3 of 8 GPUs" in caplog.text, "the other is told too"


@pytest.mark.parametrize(
    ("torch_cuda", "driver", "part"),
    [
        ("13.0", (12, 8), "supports CUDA 12.8 and is too old for this torch, built for CUDA 13.0"),
        ("12.9", (12, 2), None),
        ("12.9", (13, 0), None),
        ("12.9", None, "no NVIDIA driver"),
        (None, (13, 0), "built without CUDA"),
    ],
)
def test_the_driver_must_suit_torch(torch_cuda: str | None, driver: tuple[int, int] | None, part: str | None):
    reason = gpus.driver_mismatch(torch_cuda, driver)
    assert reason is None if part is None else part in reason


def test_missing_gpus_are_counted(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(gpus, "driver_cuda_version", lambda: (99, 0))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("PET_NPROC_PER_NODE", "8")
    with pytest.raises(ForeseenError, match="3 of 8 GPUs are visible") as error:
        gpus.visible("cuda")
    assert error.value.code == ExitCode.GPU
    monkeypatch.setenv("PET_NPROC_PER_NODE", "3")
    assert gpus.visible("cuda").text == "3 GPUs"
    assert gpus.visible("cpu").text == ""


def test_errors_that_nvidia_smi_counts_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A program in its place prints what it prints for GPUs with, without and unable to count errors."""
    program = tmp_path / "nvidia-smi"
    program.write_text('#!/bin/sh\nprintf "0, GPU-a, 0, No\\n1, GPU-b, 17, No\\n2, GPU-c, [N/A], [N/A]\\n"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    found = gpus.health()
    assert found == "GPU 1 (GPU-b): 17 uncorrected memory errors since the driver was loaded; reset the GPU"
    monkeypatch.setenv("PATH", "")
    assert gpus.health() is None


def test_products_of_whole_numbers_are_exact_and_a_wrong_one_is_seen(monkeypatch: pytest.MonkeyPatch):
    gpus.computes(torch.device("cpu"))
    right = torch.Tensor.__matmul__

    def one_bit_off(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        product = right(a, b)
        if a.dtype == torch.float32:
            product[3, 5] += 1
        return product

    monkeypatch.setattr(torch.Tensor, "__matmul__", one_bit_off)
    with pytest.raises(ForeseenError, match="computes wrong numbers: 1 of 1048576 elements") as error:
        gpus.computes(torch.device("cpu"))
    assert error.value.code == ExitCode.GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_this_machines_gpus_pass():
    assert gpus.driver_mismatch(torch.version.cuda, gpus.driver_cuda_version()) is None
    assert gpus.visible("cuda").text == f"{torch.cuda.device_count()} GPUs"
    gpus.computes(torch.device("cuda", 0))
    taken = torch.empty(torch.cuda.mem_get_info()[1] // 3, dtype=torch.uint8, device="cuda")
    assert "another process holds the rest" in gpus.computes(torch.device("cuda", 0)).warning
    del taken
    torch.cuda.empty_cache()


@pytest.mark.slow
def test_faults_between_ranks_name_rank_and_node(tmp_path: Path):
    machines = [
        {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "NODE_NAME": f"node-{name}", "RESULT": str(tmp_path / name)}
        for name in "abc"
    ]
    forked.done(forked.run("preflight_ranks", 3, [], tmp_path, machines))
    found = [json.loads((tmp_path / name).read_text()) for name in "abc"]
    assert [finding["check"] for finding in found[0]["sound"]] == ["clocks", "links", "network"]
    assert found[0]["sound"][2]["text"].startswith("gloo over ")
    assert not any(finding["warning"] for finding in found[0]["sound"] if finding["check"] == "clocks")
    by_case = {case: [each[case] for each in found] for case in found[0]}
    for case, expected in {
        "skewed": "preflight on node node-{}: the clock of rank 1 on node-b is 60.",
        "below the floor": "preflight on node node-{}: link rank 1 on node-b → rank 2 on node-c carries 0.0",
        "losing": "preflight on node node-{}: rank 1 on node-b received other data than rank 0 on node-a has sent",
    }.items():
        for rank, (code, reason) in enumerate(by_case[case]):
            assert code == ExitCode.COMMUNICATION, "every rank ends, none waits for the others"
            assert reason.startswith(expected.format("abc"[rank])), reason
    slow = by_case["slow"][0][1]
    assert slow["check"] == "links" and slow["warning"].startswith("link rank 1 on node-b → rank 2 on node-c")
    assert 0.004 < slow["bytes_per_second"] / 1e9 < 0.0106, "4 MiB in a little more than 0.4 s"


def test_results_become_metrics(monkeypatch: pytest.MonkeyPatch, micro_data: Path, tmp_path: Path):
    spec = micro.micro_spec(micro_data, tmp_path)
    monkeypatch.delenv(preflight.VARIABLE, raising=False)
    preflight.of_node(spec)
    between = [preflight.Finding("links", 0.5, "", bytes_per_second=2e9, warning="slow")]
    recorder = Recorder(spec, World(0, 2, 0, 2, torch.device("cpu"), None, None), 0.0)
    recorder.preflight(between)
    other = Recorder(spec, World(1, 2, 1, 2, torch.device("cpu"), None, None), 0.0)
    other.preflight(between)
    monkeypatch.delenv(preflight.VARIABLE)

    def value(recorder: Recorder, name: str, rank: str, **labels: str) -> float | None:
        return recorder.metrics.registry.get_sample_value(f"yaongi_preflight_{name}", {**labels, "rank": rank})

    assert value(recorder, "result", "0", check="checkpoints") == value(recorder, "result", "0", check="datasets") == 1
    assert value(recorder, "bytes_per_second", "0", check="checkpoints") > 0
    assert value(recorder, "result", "0", check="links") == value(other, "result", "1", check="links") == 0
    assert value(other, "result", "1", check="checkpoints") is None, "a node is told of once"
    assert value(other, "seconds", "1") == 0.5 < value(recorder, "seconds", "0")
