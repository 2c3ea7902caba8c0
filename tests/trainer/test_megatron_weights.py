"""Weights into the files of Megatron core and back, without Megatron; tests/peers/test_megatron_model.py reads and
writes such files with it."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import micro
import parallel_ranks
import pytest
import torch
from qwen_oracle import DENSE, MOE, qwen_for
from test_hf_weights import imported
from torch import Tensor

from trainer import export
from trainer.checkpoints import checkpoint
from trainer.checkpoints.boxes import Boxes, whole
from trainer.errors import CheckpointError, SpecError
from trainer.megatron.layout import extra_states, matrices
from trainer.megatron.weights import from_model, main, to_checkpoint
from trainer.modelspec import ModelSpec
from trainer.spec import TrainSpec
from trainer.specbase import to_stored_yaml
from trainer.trained import load_trained

QWEN_MOE = MOE.updated({"vocab_size": micro.VOCAB, "layers": ["*E", "*E"]})
QWEN = DENSE.updated({"vocab_size": micro.VOCAB, "tied_embedding": True})
# All that Megatron's GPT has: layers of both kinds, a shared expert, a bias on the choice.
MIXED = QWEN_MOE.updated(
    {
        "layers": ["*-", "*E"],
        "mlp": {"width": 48, "activation": "swiglu"},
        "moe": {"scores": "sigmoid", "bias_update_rate": 1e-3, "shared_width": 16, "score_scale": 2.5},
    }
)
BIASED = DENSE.updated(
    {
        "vocab_size": micro.VOCAB,
        "attention": {"bias": True, "qk_norm": False},
        "mlp": {"bias": True, "activation": "relu2"},
    }
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("megatron")
    micro.make_data(folder)
    torch.manual_seed(0)
    for name, model in (("moe", QWEN_MOE), ("dense", QWEN)):
        qwen_for(model).to(torch.bfloat16).save_pretrained(folder / name, max_shard_size="80KB")
    return folder


def run_of(folder: Path, name: str, model: ModelSpec, init_from: Path | None = None) -> TrainSpec:
    made = micro.micro_spec(folder, folder / name, steps=2, checkpoint={"every_steps": 2})
    spec = made.model_copy(update={"model": model, "init_from": str(init_from) if init_from else None})
    (folder / name).mkdir(exist_ok=True)
    (folder / name / "train.yaml").write_bytes(to_stored_yaml(spec))
    return spec


def as_trained(spec: TrainSpec, step: int = 2) -> Path:
    """The checkpoint that Megatron would begin with, as one that it wrote."""
    there = Path(spec.run_dir) / "megatron"
    shutil.copytree(from_model(spec, there / "begin", torch.float32), there / f"iter_{step:07d}")
    (there / "latest_checkpointed_iteration.txt").write_text(str(step))
    return there


def weights(spec: TrainSpec) -> dict[str, Tensor]:
    return load_trained(spec, torch.device("cpu")).model.state_dict()


@pytest.mark.parametrize(("name", "model"), [("moe", QWEN_MOE), ("dense", QWEN)])
def test_a_model_of_transformers_comes_back_as_it_was(folder: Path, name: str, model: ModelSpec) -> None:
    spec = run_of(folder, f"from-{name}", model, folder / name)
    there = as_trained(spec)
    made = to_checkpoint(spec, there)
    assert made == checkpoint.latest(spec.run_dir) and made.name == "step-00000002"
    wanted, found = imported(folder / name).state_dict(), weights(spec)
    assert found.keys() == wanted.keys() and all(torch.equal(found[key], value) for key, value in wanted.items())
    before = (made / "checkpoint.json").stat().st_mtime_ns
    assert to_checkpoint(spec, there) == made and (made / "checkpoint.json").stat().st_mtime_ns == before
    assert export.run(spec)["step"] == 2 and (Path(spec.run_dir) / "export" / "transformers").is_dir()


@pytest.mark.parametrize("model", [MIXED, BIASED], ids=["mixed", "biased"])
def test_our_own_runs_and_exports_come_back_as_they_were(tmp_path: Path, model: ModelSpec) -> None:
    micro.make_data(tmp_path)
    first = run_of(tmp_path, "first", model)
    parallel_ranks.run([first], 1, tmp_path)
    export.run(first)
    wanted = weights(first)
    for name, origin in (("run", first.run_dir), ("export", f"{first.run_dir}/export")):
        spec = run_of(tmp_path, name, model, Path(origin))
        to_checkpoint(spec, as_trained(spec))
        found = weights(spec)
        assert all(torch.equal(found[key], value) for key, value in wanted.items()), name


def test_layers_in_a_stack_are_read_too(folder: Path) -> None:
    """Megatron stacks layers with experts if it was started with a number as moe_layer_freq."""
    stacked = {matrix.key: matrix.shape for matrix in matrices(QWEN_MOE, stacked=True)}
    assert stacked["decoder.layers.self_attention.linear_qkv.weight"] == (2, 4 * 32 + 2 * 2 * 32, 64)
    assert stacked["decoder.layers.mlp.experts.experts.linear_fc1.weight"] == (2, 8, 64, 64)
    assert "decoder.layers.mlp.experts.experts.linear_fc2._extra_state/shard_1.7_2.8" in extra_states(
        QWEN_MOE, stacked=True
    )


def test_it_is_bf16_and_written_once(folder: Path) -> None:
    spec = run_of(folder, "once", QWEN_MOE, folder / "moe")
    made = from_model(spec, folder / "once")
    found = Boxes(made)
    key = "decoder.layers.0.mlp.router.weight"
    router = torch.empty(found.shapes[key])
    found.read(whole(key, found.shapes[key]), router)
    assert torch.equal(router, imported(folder / "moe").state_dict()["layers.0.1.mixer.router.weight"])
    size = (made / "__0_0.distcp").stat().st_size
    numbers = sum(torch.Size(shape).numel() for shape in found.shapes.values())
    assert 2 * numbers < size < 4 * numbers
    before = made.stat().st_mtime_ns
    from_model(spec, folder / "once")
    assert made.stat().st_mtime_ns == before and (folder / "once" / "latest_checkpointed_iteration.txt").is_file()
    other = run_of(folder, "once", QWEN, folder / "dense")
    assert from_model(other, folder / "once").stat().st_mtime_ns != before


def cut(there: Path) -> None:
    file = there / "iter_0000002" / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-100])


def garbled(there: Path) -> None:
    file = there / "iter_0000002" / "__0_0.distcp"
    file.write_bytes(b"\0" * file.stat().st_size)


def no_file(there: Path) -> None:
    (there / "iter_0000002" / "__0_0.distcp").unlink()


def no_index(there: Path) -> None:
    (there / "iter_0000002" / ".metadata").unlink()


def half_an_index(there: Path) -> None:
    index = there / "iter_0000002" / ".metadata"
    index.write_bytes(index.read_bytes()[:200])


def another_index(there: Path) -> None:
    (there / "iter_0000002" / ".metadata").write_bytes(pickle.dumps({"a": 1}))


def no_tracker(there: Path) -> None:
    (there / "latest_checkpointed_iteration.txt").unlink()


def only_begun(there: Path) -> None:
    (there / "latest_checkpointed_iteration.txt").write_text("release")


def no_iteration(there: Path) -> None:
    shutil.rmtree(there / "iter_0000002")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (cut, r"__0_0.distcp: has [\d,]+ bytes, the index needs"),
        (garbled, "cannot be read"),
        (no_file, "__0_0.distcp: missing"),
        (no_index, "metadata: cannot be read"),
        (half_an_index, "is not an index of a checkpoint"),
        (another_index, "is not an index of a checkpoint"),
        (no_tracker, "no checkpoint is finished"),
        (only_begun, "says 'release'"),
        (no_iteration, "iter_0000002: missing"),
    ],
)
def test_damage_is_one_line(folder: Path, damage: Callable[[Path], None], said: str) -> None:
    spec = run_of(folder, f"damaged-{damage.__name__}", QWEN_MOE, folder / "moe")
    damage(there := as_trained(spec))
    with pytest.raises(CheckpointError, match=said) as error:
        to_checkpoint(spec, there)
    assert "\n" not in str(error.value)
    assert not list((Path(spec.run_dir) / "checkpoints").glob("*step*"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"layers": ["*E"]}, "has decoder.layers.1"),
        ({"layers": ["*E"] * 3}, "has no decoder.layers.2"),
        ({"moe": {"num_experts": 16}}, r"router.weight has shape \[8, 64\], train.model needs \[16, 64\]"),
        ({"vocab_size": micro.VOCAB + 1}, "word_embeddings.weight has shape"),
        ({"attention": {"qk_norm": False}}, "q?k?_?layernorm.weight, which train.model does not"),
        ({"tied_embedding": True}, "has output_layer.weight, which train.model does not"),
    ],
)
def test_another_model_is_one_line(folder: Path, change: dict[str, object], said: str) -> None:
    there = folder / "another" / "megatron"
    if not there.exists():
        as_trained(run_of(folder, "another", QWEN_MOE, folder / "moe"))
    with pytest.raises(CheckpointError, match=said):
        to_checkpoint(run_of(folder, "another", QWEN_MOE.updated(change)), there)


def test_what_cannot_be_converted_is_one_line(folder: Path) -> None:
    with pytest.raises(SpecError, match="init_from is missing"):
        from_model(run_of(folder, "x", QWEN), folder / "x")
    with pytest.raises(SpecError, match="tied_embedding"):
        from_model(run_of(folder, "x", QWEN.updated({"tied_embedding": False}), folder / "dense"), folder / "x")
    with pytest.raises(SpecError, match="no layer 'ME'"):
        list(matrices(micro.micro_spec(folder, folder / "x").model, stacked=False))


def test_the_steps_are_programs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_of(folder, "program", QWEN, folder / "dense")
    file = str(folder / "program" / "train.yaml")
    assert main(["import", "--spec", file]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "program" / "megatron" / "begin" / "release")
    assert main(["export", "--spec", file]) != 0
    assert capsys.readouterr().err.startswith("error: ")
    said = json.loads((folder / "program" / "megatron" / "begin" / "release" / "metadata.json").read_text())
    assert said["sharded_backend"] == "torch_dist"
