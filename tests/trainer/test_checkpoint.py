"""Checkpoints on a disk that corrupts data, fills up or loses bytes."""

from __future__ import annotations

import errno
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from trainer.checkpoints import checkpoint
from trainer.checkpoints.checkpoint import CheckpointManifest, latest, verify
from trainer.checkpoints.checkpointer import load_model, load_model_weights
from trainer.errors import CheckpointError, ForeseenError
from trainer.exitcodes import ExitCode


def write_checkpoint(run_dir: Path, step: int, *, skipped: int = 0, broken: bool = False) -> Path:
    """A checkpoint of a small module, made of the same parts as a real one.

    Args:
        skipped: number of skipped steps before it.
        broken: a weight is infinite, which an earlier version would have published.
    """
    torch.manual_seed(step)
    tensors = {f"model.{name}": tensor for name, tensor in nn.Linear(64, 64).state_dict().items()}
    if broken:
        tensors["model.bias"][7] = torch.inf
    hidden = checkpoint.unfinished_dir(run_dir, step)
    hidden.mkdir(parents=True)
    dcp.save(tensors, storage_writer=dcp.FileSystemWriter(hidden), no_dist=True)
    files = checkpoint.describe_files(hidden, [entry.name for entry in hidden.iterdir()])
    manifest = CheckpointManifest(
        step=step,
        spec={},
        code_version="test",
        digests={},
        cursor={},
        world_size=1,
        scalars={"skipped_in_a_row": skipped} if skipped else {},
        files=files,
    )
    return checkpoint.publish(run_dir, manifest)


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("run")
    for step in (4, 8):
        write_checkpoint(run_dir, step)
    return run_dir


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


def empty(file: Path) -> None:
    file.write_bytes(b"")


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "checkpoint.json"])
@pytest.mark.parametrize("damage", [flip, truncate, empty, Path.unlink])
def test_damaged_file_is_named_and_the_older_checkpoint_used(
    two_checkpoints: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, name, damage
):
    run_dir = tmp_path / "run"
    shutil.copytree(two_checkpoints, run_dir)
    newest = run_dir / "checkpoints" / "step-00000008"
    assert latest(run_dir) == newest
    damage(newest / name)
    with pytest.raises(ForeseenError, match=name.replace(".", r"\.")) as error:
        verify(newest)
    assert error.value.code == ExitCode.CHECKPOINT and "\n" not in str(error.value)
    assert latest(run_dir) == run_dir / "checkpoints" / "step-00000004"
    damage(run_dir / "checkpoints" / "step-00000004" / name)
    assert sum("next older" in record.message for record in caplog.records) == 1
    with pytest.raises(ForeseenError, match="none of 2 checkpoints verifies") as error:
        latest(run_dir)
    assert error.value.code == ExitCode.CHECKPOINT
    assert sum("next older" in record.message for record in caplog.records) == 2, "not of the oldest"
    shutil.rmtree(newest)
    caplog.clear()
    with pytest.raises(ForeseenError, match="none of 1 checkpoints verifies"):
        latest(run_dir)
    assert not caplog.records


def test_file_that_does_not_belong_is_ignored_and_named_once_if_it_can_be_seen(
    two_checkpoints: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    run_dir = tmp_path / "run"
    shutil.copytree(two_checkpoints, run_dir)
    newest = run_dir / "checkpoints" / "step-00000008"
    for name in (".nfs000000001", ".DS_Store", "._checkpoint.json"):
        (newest / name).write_bytes(b"?")
    (newest / ".snapshot").mkdir()
    assert latest(run_dir) == newest and not caplog.messages
    (newest / "__9_9.distcp").write_bytes(b"?")
    (newest / "lost+found").mkdir()
    for _ in range(2):
        assert latest(run_dir) == newest
    assert len(caplog.messages) == 2 and "__9_9.distcp" in caplog.text and "lost+found" in caplog.text
    model = nn.Linear(64, 64)
    assert load_model_weights(newest, model).step == 8


def test_what_lies_beside_the_checkpoints_is_none_of_them(
    two_checkpoints: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    run_dir = tmp_path / "run"
    shutil.copytree(two_checkpoints, run_dir)
    directory = run_dir / "checkpoints"
    for name in ("step-0000.bak", "step-00000012.bak", "lost+found", ".snapshot"):
        (directory / name).mkdir()
    for name in (".nfs000000001", ".DS_Store", "._step-00000008", "step-00000016"):
        (directory / name).write_bytes(b"?")
    before = {path.name for path in directory.iterdir()}
    assert latest(run_dir) == directory / "step-00000008"
    checkpoint.prune(run_dir, keep_last=1)
    checkpoint.clean_unfinished(run_dir)
    assert before - {path.name for path in directory.iterdir()} == {"step-00000004"}
    assert not caplog.messages


def test_row_of_skipped_steps_costs_no_checkpoint(tmp_path: Path):
    def kept(*made: int, skipped: int = 0) -> list[int]:
        for step in made:
            write_checkpoint(tmp_path, step, skipped=skipped)
            checkpoint.prune(tmp_path, keep_last=2)
        return [int(path.name[-8:]) for path in reversed(checkpoint.published(tmp_path))]

    assert kept(10, 20, 30) == [20, 30]
    assert kept(40, skipped=1) == [20, 30, 40]
    assert kept(50, skipped=9) == [20, 30, 50], "of the row, only the newest is of use"
    assert kept(60) == [30, 60], "the row is over"
    assert checkpoint.newest_until(tmp_path, 59) == checkpoint.step_dir(tmp_path, 30)
    assert checkpoint.newest_until(tmp_path, 29) is None


def test_weights_that_an_earlier_version_should_not_have_published_are_refused(tmp_path: Path):
    write_checkpoint(tmp_path, 4)
    for step, way_back in ((8, "step-00000004"), (4, "there is no earlier checkpoint")):
        path = write_checkpoint(tmp_path, step, broken=True)
        with pytest.raises(ForeseenError, match=r"model\.bias is not finite") as error:
            load_model_weights(path, nn.Linear(64, 64))
        assert error.value.code == ExitCode.DIVERGED and "\n" not in str(error.value)
        assert path.name in str(error.value) and way_back in str(error.value)


def test_latest_follows_the_pointer_that_a_person_sets_back(two_checkpoints: Path, tmp_path: Path):
    run_dir = tmp_path / "run"
    shutil.copytree(two_checkpoints, run_dir)
    (run_dir / "checkpoints" / "LATEST").write_text("step-00000004\n")
    assert latest(run_dir) == run_dir / "checkpoints" / "step-00000004"
    for text in ("", "nonsense", "step-00000099\n"):
        (run_dir / "checkpoints" / "LATEST").write_text(text)
        assert latest(run_dir) == run_dir / "checkpoints" / "step-00000008"


def test_branch_that_was_given_up_goes_with_the_next_checkpoint(tmp_path: Path):
    directory = tmp_path / "checkpoints"
    for step in (20, 40, 60):
        write_checkpoint(tmp_path, step)
    (directory / "LATEST").write_text("step-00000020\n")
    (directory / "step-00000060-copy").mkdir()
    checkpoint.prune(tmp_path, keep_last=2)
    assert latest(tmp_path) == checkpoint.step_dir(tmp_path, 20), "pruning keeps what LATEST names"
    newest = write_checkpoint(tmp_path, 30)
    checkpoint.prune(tmp_path, keep_last=2)
    names = sorted(path.name for path in directory.iterdir())
    assert names == ["LATEST", "step-00000020", "step-00000030", "step-00000060-copy"]
    assert latest(tmp_path) == newest


def test_old_checkpoint_that_cannot_be_deleted_is_only_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    plain = Path.rename

    def rename(path: Path, target: Path) -> Path:
        if target.name.startswith(".deleted-"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return plain(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    for step in (20, 40):
        write_checkpoint(tmp_path, step)
        checkpoint.prune(tmp_path, keep_last=1)
    assert "step-00000020 cannot be deleted (Permission denied)" in caplog.text
    assert latest(tmp_path) == checkpoint.step_dir(tmp_path, 40)


def test_missing_target_of_latest_is_never_replaced_by_a_newer_one(two_checkpoints: Path, tmp_path: Path):
    run_dir = tmp_path / "run"
    shutil.copytree(two_checkpoints, run_dir)
    (run_dir / "checkpoints" / "LATEST").write_text("step-00000006\n")
    assert latest(run_dir) == run_dir / "checkpoints" / "step-00000004"
    (run_dir / "checkpoints" / "LATEST").write_text("step-00000002\n")
    with pytest.raises(ForeseenError, match="names step 2, which is not there") as error:
        latest(run_dir)
    assert error.value.code == ExitCode.CHECKPOINT


@pytest.mark.parametrize("broken", ["checksum", "iterdir"])
def test_disk_that_cannot_read_a_checkpoint_costs_only_that_one(
    two_checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
):
    run_dir = tmp_path / "run"
    shutil.copytree(two_checkpoints, run_dir)
    owner = checkpoint if broken == "checksum" else Path
    plain = getattr(owner, broken)

    def failing(file: Path, *rest: str) -> object:
        if "step-00000008" in str(file):
            raise OSError(errno.EIO, "Input/output error", str(file))
        return plain(file, *rest)

    monkeypatch.setattr(owner, broken, failing)
    with pytest.raises(ForeseenError, match=r"step-00000008.* cannot be read \(Input/output error\)") as error:
        verify(run_dir / "checkpoints" / "step-00000008")
    assert error.value.code == ExitCode.CHECKPOINT
    assert latest(run_dir) == run_dir / "checkpoints" / "step-00000004"


def test_unfinished_checkpoints_are_invisible_and_cleaned(two_checkpoints: Path, tmp_path: Path):
    run_dir = tmp_path / "run"
    shutil.copytree(two_checkpoints, run_dir)
    source = run_dir / "checkpoints" / "step-00000008"
    shutil.copytree(source, checkpoint.unfinished_dir(run_dir, 12))
    assert latest(run_dir) == source
    checkpoint.clean_unfinished(run_dir)
    assert sorted(p.name for p in source.parent.iterdir()) == ["LATEST", "step-00000004", "step-00000008"]


def test_what_a_rank_has_found_reaches_the_others_whole():
    found = pickle.loads(pickle.dumps(CheckpointError("a file is missing")))
    assert type(found) is CheckpointError and found.code == 66 and str(found) == "a file is missing"


def test_run_without_checkpoints_starts_from_the_beginning(tmp_path: Path):
    assert latest(tmp_path) is None
    (tmp_path / "checkpoints").mkdir()
    assert latest(tmp_path) is None
    assert checkpoint.latest_step(tmp_path) == 0


def test_index_with_foreign_classes_is_not_unpickled(two_checkpoints: Path, tmp_path: Path):
    path = tmp_path / "step-00000008"
    shutil.copytree(two_checkpoints / "checkpoints" / "step-00000008", path)
    (path / ".metadata").write_bytes(pickle.dumps(print))
    with pytest.raises(ForeseenError, match=r"builtins\.print.*not loaded"):
        load_model(path, nn.Linear(64, 64))


def test_weights_come_back_and_another_shape_is_refused(two_checkpoints: Path):
    path = two_checkpoints / "checkpoints" / "step-00000008"
    torch.manual_seed(8)
    expected = nn.Linear(64, 64)
    found = nn.Linear(64, 64)
    assert load_model_weights(path, found).step == 8
    assert torch.equal(found.weight, expected.weight) and torch.equal(found.bias, expected.bias)
    with pytest.raises(ForeseenError, match=r"model\.weight should have shape \(32, 64\)") as error:
        load_model_weights(path, nn.Linear(64, 32))
    assert error.value.code == ExitCode.CHECKPOINT


def test_tensors_that_cannot_be_read_are_one_line(two_checkpoints: Path, tmp_path: Path):
    """A file changes between verification and loading, or on another node than the one that verified it."""
    path = tmp_path / "step-00000008"
    shutil.copytree(two_checkpoints / "checkpoints" / "step-00000008", path)
    (path / "__0_0.distcp").unlink()
    with pytest.raises(ForeseenError, match=r"step-00000008 cannot be loaded: .*__0_0\.distcp") as error:
        load_model(path, nn.Linear(64, 64))
    assert error.value.code == ExitCode.CHECKPOINT and "\n" not in str(error.value)


def test_launchers_can_verify_without_torch():
    modules = "trainer.checkpoints.checkpoint, trainer.process.restarts, trainer.exitcodes"
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
