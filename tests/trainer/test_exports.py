"""Exports during training: of the model before the first step, and of each checkpoint."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import micro
import pytest
import torch
from made_run import save_checkpoint
from safetensors.torch import load_file

from trainer import export, exported, exportlinks, loop
from trainer.checkpoints import checkpoint
from trainer.errors import SpecError, VolumeError
from trainer.exports import Exports, initial_source
from trainer.kinds.ngrams import token_classes
from trainer.model.hybrid import build_model
from trainer.preflight.storage import exports_to_come
from trainer.spec import TrainSpec
from trainer.specbase import to_stored_yaml

pytestmark = pytest.mark.timeout(600)
STEPS = (0, 2, 4)


@pytest.fixture(scope="module")
def ran(micro_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainSpec, str]:
    """A run of two ranks with weights shared by FSDP2, which keeps one checkpoint and exports all of them."""
    place = tmp_path_factory.mktemp("exports")
    spec = micro.micro_spec(
        micro_data,
        place / "run",
        steps=4,
        checkpoint={"every_steps": 2, "keep_last": 1},
        parallel={"data": "fsdp", "shard": 2},
        schedule={"decay_fraction": 1, "warmup_fraction": 0},  # else the newest from before the decay is kept too
        export={"initial": True, "checkpoints": True, "folder": str(place / "out")},
    )
    code, output = micro.finish(micro.start(spec, ranks=2))
    assert code == 0, output
    return spec, output


def test_each_checkpoint_is_exported_though_only_one_is_kept(ran):
    spec, output = ran
    assert exported.steps(spec.run_dir) == list(STEPS)
    assert [checkpoint.step_of(path) for path in checkpoint.published(spec.run_dir)] == [4]
    for step in STEPS:
        assert f"exported the model of step {step} in" in output
        manifest, model = export.read(exported.step_dir(spec.run_dir, step))
        assert (manifest["step"], model) == (step, spec.model)
    assert not initial_source(spec.run_dir).parent.exists()
    assert "wait" in output and output.index("exported the model of step 4") < output.index("done: 4 steps")


def test_the_initial_model_is_the_one_that_a_single_process_would_draw(ran):
    spec, _ = ran
    classes = token_classes(Path(spec.tokens.tokenizer) / "tokenizer.json")
    drawn = build_model(spec.model, spec.backends, seed=spec.seed, token_classes=classes).state_dict()
    written = load_file(exported.step_dir(spec.run_dir, 0) / "model.safetensors")
    assert written.keys() == drawn.keys() and all(torch.equal(written[name], drawn[name]) for name in drawn)


def test_the_last_of_them_is_the_final_export(ran):
    spec, _ = ran
    export.run(spec)
    last, final = exported.step_dir(spec.run_dir, 4), exported.final_dir(spec.run_dir)
    assert (last / "model.safetensors").read_bytes() == (final / "model.safetensors").read_bytes()
    passports = [json.loads((folder / "passport.json").read_text()) for folder in (last, final)]
    assert passports[0]["checkpoint"] == passports[1]["checkpoint"]
    early = json.loads((exported.step_dir(spec.run_dir, 2) / "passport.json").read_text())
    assert early["training"]["steps"] == 2 and early["data"]["tokens"] == 2 * micro.TOKENS_PER_STEP


def test_the_folder_has_the_names_of_transformers(ran):
    spec, _ = ran
    folder = Path(spec.export.folder)
    exportlinks.show(spec)
    names = {"initial_model", "checkpoint-2", "checkpoint-4"}
    assert (
        names
        <= {path.name for path in folder.iterdir()}
        <= names
        | {
            "final_model",
            "model_info.json",
            "training_info.json",
        }
    )
    assert not os.path.isabs(os.readlink(folder / "checkpoint-2"))
    assert exported.around(folder / "checkpoint-2") == exported.step_dir(spec.run_dir, 2).resolve()
    facts = json.loads((folder / "training_info.json").read_text())
    assert (facts["step"], facts["planned_steps"], facts["tokens"]) == (4, 4, 4 * micro.TOKENS_PER_STEP)
    assert facts["result"]["steps"] == 4
    model = build_model(spec.model, seed=0, token_classes=token_classes(Path(spec.tokens.tokenizer) / "tokenizer.json"))
    counted = sum(parameter.numel() for parameter in model.parameters())
    assert json.loads((folder / "model_info.json").read_text())["parameters"] == counted


def test_a_folder_shows_one_run_and_what_is_no_link_stays(ran, tmp_path):
    spec, _ = ran
    folder = tmp_path / "mine"
    (folder / "checkpoint-2").mkdir(parents=True)
    (folder / "checkpoint-9").symlink_to("../another")
    (folder / "notes").symlink_to("../another")
    exportlinks.show(spec.updated({"export": {"folder": str(folder)}}))
    assert (folder / "checkpoint-2").is_dir() and not (folder / "checkpoint-2").is_symlink()
    assert not (folder / "checkpoint-9").is_symlink() and (folder / "notes").is_symlink()
    assert (folder / "checkpoint-4").is_symlink()
    (tmp_path / "file").touch()
    with pytest.raises(VolumeError, match="cannot be written"):
        exportlinks.show(spec.updated({"export": {"folder": str(tmp_path / "file" / "below")}}))


def untrained(micro_data: Path, place: Path, **wanted: object) -> TrainSpec:
    from made_run import make_model

    spec = micro.micro_spec(micro_data, place / "run", export={"checkpoints": True, **wanted})
    Path(spec.run_dir, "logs").mkdir(parents=True)
    Path(spec.run_dir, "train.yaml").write_bytes(to_stored_yaml(spec))
    save_checkpoint(spec, make_model(spec), 4)
    return spec


def wait_for(exports: Exports) -> None:
    deadline = time.monotonic() + 300
    exports.finish(lambda working: working and time.monotonic() < deadline)


def test_a_resumed_run_makes_what_is_missing_and_nothing_twice(micro_data, tmp_path, caplog):
    spec = untrained(micro_data, tmp_path)
    exports = Exports(spec)
    exports.begin(3)  # the checkpoint of step 4 is of a branch that is abandoned
    assert not exports.in_use()
    exports.begin(4)
    assert list(exports.in_use()) == [4]
    wait_for(exports)
    made = exported.step_dir(spec.run_dir, 4).stat()
    again = Exports(spec)
    again.begin(4)
    assert not again.in_use() and exported.step_dir(spec.run_dir, 4).stat() == made


def test_a_failed_export_is_one_warning(micro_data, tmp_path, caplog):
    spec = untrained(micro_data, tmp_path)
    path = checkpoint.step_dir(spec.run_dir, 4)
    shutil.rmtree(path)
    exports = Exports(spec)
    exports.published(path)
    wait_for(exports)
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert line.startswith("the model of step 4 was not exported (checkpoint step-00000004: ")
    assert line.endswith("; training continues") and "cannot be read" in line and "\n" not in line
    assert "Traceback" in Path(spec.run_dir, "logs/exports.log").read_text()


def test_a_stopped_run_ends_its_export_at_once(micro_data, tmp_path, caplog):
    spec = untrained(micro_data, tmp_path)
    exports = Exports(spec)
    exports.published(checkpoint.step_dir(spec.run_dir, 4))
    while exports._child is None:
        time.sleep(0.01)
    child = exports._child
    exports.close()
    assert child.returncode == -signal.SIGTERM and not exported.steps(spec.run_dir)
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.parametrize(("asked", "expected"), [(0, 0), (143, 143)])
def test_a_stop_while_exports_are_awaited_leaves_the_run_unfinished(micro_data, tmp_path, asked, expected):
    """Its exports are made when it is resumed."""
    spec = untrained(micro_data, tmp_path)
    done, told, left = [], [], iter([True, True, False])
    world = SimpleNamespace(broadcast=lambda value: value, barrier=lambda: None)
    checkpoints = SimpleNamespace(wait=lambda: None, saved_step=spec.steps, close=lambda: None)
    recorder = SimpleNamespace(phase=lambda name: nullcontext(), result=lambda *_: done.append(1), close=lambda: None)
    exports = SimpleNamespace(finish=lambda go_on: told.extend(iter(lambda: go_on(next(left)), False)))
    loader = SimpleNamespace(close=lambda: None)
    run = SimpleNamespace(spec=spec, world=world, checkpoints=checkpoints, recorder=recorder, exports=exports)
    run.loader = loader
    beats = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.checkpoint, "read_manifest", lambda path: None)
        patch.setattr(loop.distributed, "stop", lambda: None)
        code = loop.finish(run, SimpleNamespace(code=lambda: asked), 0, lambda: beats.append(1))
    assert (code, bool(done)) == (expected, not asked) and len(beats) == (1 if asked else 3)


def test_the_checkpoint_of_a_step_in_use_is_not_deleted(tmp_path):
    for step in (2, 4, 6):
        checkpoint.step_dir(tmp_path, step).mkdir(parents=True)
    checkpoint.prune(tmp_path, keep_last=1, in_use=[2])
    assert [checkpoint.step_of(path) for path in checkpoint.published(tmp_path)] == [6, 2]


def test_the_room_for_exports_is_known_before(ran, tmp_path):
    spec, _ = ran
    written = sum(
        file.stat().st_size
        for step in STEPS
        for file in exported.step_dir(spec.run_dir, step).rglob("model*.safetensors")
    )
    expected = exports_to_come(spec, tmp_path)
    assert expected == pytest.approx(written, rel=0.25), "beside the weights, such small files have names and tables"
    assert exports_to_come(spec, Path(spec.run_dir)) == 0
    assert exports_to_come(spec.updated({"export": None}), tmp_path) == 0


def test_what_cannot_be_is_refused(micro_data, tmp_path):
    with pytest.raises(SpecError, match=r"folder 'out' must be an absolute path; write /"):
        micro.micro_spec(micro_data, tmp_path, export={"folder": "out"})
