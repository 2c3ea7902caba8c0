"""megatron-core's own model, data sets and checkpoints on CPUs: what it trains from our shards and weights, and what we
read of it. Runs in the peers' environment: `make test-peers`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from trainer.checkpoints import boxes, checkpoint
from trainer.checkpoints.checkpointer import load_model_weights
from trainer.fields import stored, version_of
from trainer.hf.architectures import native
from trainer.hf.folder import write
from trainer.hf.weights import tensors
from trainer.megatron.weights import from_model, to_checkpoint
from trainer.model.hybrid import HybridModel, build_model
from trainer.modelspec import ModelSpec
from trainer.spec import TrainSpec
from trainer.specbase import VERSION_FIELD, to_stored_yaml
from trainer.trained import load_trained

sys.path.append(str(Path(__file__).parents[1] / "trainer"))
import micro
from ports import free_port

pytestmark = [pytest.mark.peers, pytest.mark.timeout(900)]
RANK = str(Path(__file__).with_name("megatron_rank.py"))
MOE = ModelSpec.model_validate(
    {
        "vocab_size": micro.VOCAB,
        "hidden": 32,
        "layers": ["*E", "*E"],
        "attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "rope_theta": 1e6, "qk_norm": True},
        "moe": {
            "num_experts": 4,
            "top_k": 2,
            "expert_width": 24,
            "activation": "swiglu",
            "scores": "softmax",
            "score_scale": 1.0,
            "bias_update_rate": 0.0,
            "sequence_loss_weight": 0.0,
        },
        "norm_eps": 1e-6,
        "init_std": 0.15,
    }
)
DENSE = MOE.updated(
    {"layers": ["*-", "*-", "*-"], "moe": None, "mlp": {"width": 48, "activation": "swiglu"}, "tied_embedding": True}
)
# Both kinds of layers, a shared expert, a bias on the choice: all that Megatron's GPT can be of what we have.
MIXED = MOE.updated(
    {
        "layers": ["*-", "*E"],
        "mlp": {"width": 48, "activation": "swiglu"},
        "moe": {"scores": "sigmoid", "bias_update_rate": 1e-3, "shared_width": 16, "score_scale": 2.5},
    }
)
MODELS = {"moe": MOE, "dense": DENSE, "mixed": MIXED}
STEPS, STOP, ROWS, LENGTH = 4, 2, 4, 32
PADDED = micro.VOCAB + 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus, and each model with random weights as one of transformers, or as a checkpoint of ours, in
    `…/<name>`; and in `…/<name>-begin` what Megatron begins with."""
    folder = tmp_path_factory.mktemp("megatron")
    micro.make_data(folder)
    for name, model in MODELS.items():
        ours = build_model(model, seed=1)
        with torch.no_grad():
            for key, value in ours.state_dict().items():
                if key.endswith(("bias_E", "norm.weight")):  # that begin with the same number everywhere
                    value.add_(torch.randn(value.shape, generator=torch.Generator().manual_seed(len(key))) * 0.1)
        if name == "mixed":
            kept(folder, name, ours)
        else:
            published(folder / name, model, ours.state_dict())
        from_model(run_of(folder, f"{name}-begin", model, folder / name), folder / f"{name}-begin", torch.float32)
    return folder


def run_of(folder: Path, name: str, model: ModelSpec, init_from: Path | None = None) -> TrainSpec:
    made = micro.micro_spec(folder, folder / name)
    spec = made.model_copy(update={"model": model, "init_from": str(init_from) if init_from else None})
    (folder / name).mkdir(exist_ok=True)
    (folder / name / "train.yaml").write_bytes(to_stored_yaml(spec))
    return spec


def published(folder: Path, model: ModelSpec, state: dict[str, Tensor]) -> Path:
    """The folder for transformers of an export, in FP32."""
    architecture, _ = native(model)
    assert architecture is not None
    named = tensors(architecture, model, state, torch.float32)
    tokenizer = folder.parent / "tokenizer"
    write(folder, architecture.config(model, LENGTH), named, tokenizer, dtype=torch.float32)
    return folder


def kept(folder: Path, name: str, ours: HybridModel) -> None:
    """A checkpoint of ours."""
    spec, state = run_of(folder, name, ours.spec), {f"model.{key}": value for key, value in ours.state_dict().items()}
    hidden = checkpoint.unfinished_dir(spec.run_dir, 1)
    hidden.mkdir(parents=True)
    parts = [boxes.whole(key, value.shape) for key, value in state.items()]
    boxes.write(hidden, parts, lambda _: torch.float32, lambda box: state[box.key])
    files = checkpoint.describe_files(hidden, [file.name for file in hidden.iterdir()])
    made: dict[str, Any] = {"step": 1, "spec": {VERSION_FIELD: version_of(spec)} | stored(spec), "files": files}
    made |= {"code_version": "", "digests": {}, "cursor": {}, "world_size": 1, "scalars": {}}
    checkpoint.publish(spec.run_dir, checkpoint.CheckpointManifest(**made))


def run(folder: Path, ranks: int, tasks: list[dict[str, Any]]) -> None:
    """Tasks of tests/peers/megatron_rank.py, in that many processes."""
    base = {"tensor": 1, "expert": 1, "padded": micro.VOCAB, "rows": ROWS, "seq_len": LENGTH, "seed": 3, "balance": 0.0}
    base |= {"numbered": True, "load": "", "rate": 1e-3, "steps": STEPS, "stop": STEPS, "cache": str(folder / "cache")}
    base |= {"shards": [str(folder / "shards" / f"{name}-train") for name in ("ko", "en")], "weights": [0.6, 0.4]}
    file = folder / f"tasks-{ranks}.json"
    file.write_text(json.dumps([base | task for task in tasks]))
    environment = os.environ | {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    started = [
        subprocess.Popen([sys.executable, RANK, str(file)], env=environment | {"RANK": str(rank)}, stderr=log)
        for rank in range(ranks)
        if (log := (folder / f"rank-{ranks}-{rank}.log").open("w"))
    ]
    try:
        codes = [process.wait(800) for process in started]
    finally:
        for process in started:
            process.kill()
    assert not any(codes), (folder / f"rank-{ranks}-0.log").read_text()[-3000:]


def logits(folder: Path, name: str, load: Path | None = None, out: str = "", **more: Any) -> dict[str, Any]:
    ids = torch.randint(micro.VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(0)).tolist()
    load = load or folder / f"{name}-begin" / "release"
    made = {"task": "logits", "model": MODELS[name].model_dump(mode="json"), "load": str(load), "ids": ids}
    return made | {"out": str(folder / f"{out or name}.pt")} | more


def training(folder: Path, name: str, run: str, **more: Any) -> dict[str, Any]:
    made = {"task": "train", "model": MODELS[name].model_dump(mode="json"), "run": str(folder / run / "megatron")}
    made |= {"load": str(folder / f"{name}-begin" / "release"), "out": str(folder / run / f"{more.get('stop', STEPS)}")}
    return made | more


def states(folder: Path, name: str) -> dict[str, Any]:
    """What Transformer Engine's layers ask for; a place in a stack is axis, index and number."""
    modules = [f"self_attention.{module}" for module in ("linear_qkv", "linear_proj", "core_attention")]
    if name == "dense":
        of_layers = [*modules, "mlp.linear_fc1", "mlp.linear_fc2"]
        made = [[f"decoder.layers.{module}", [[0, layer, 3]]] for module in of_layers for layer in range(3)]
        made.append(["decoder.final_layernorm", []])
    else:
        made = [[f"decoder.layers.1.{module}", []] for module in [*modules, "pre_mlp_layernorm"]]
        experts = "decoder.layers.1.mlp.experts.experts.linear_fc2"
        made += [[experts, [[0, expert, 4]]] for expert in range(4)]
    load = str(folder / f"{name}-begin" / "release")
    return {"task": "states", "states": made, "load": load, "out": str(folder / f"{name}.states")}


def newest(folder: Path, run: str) -> Path:
    return folder / run / "megatron" / f"iter_{STEPS:07d}"


@pytest.fixture(scope="module")
def alone(folder: Path) -> Path:
    """What one process makes."""
    runs = {"straight": "moe", "stopped": "moe", "dense-run": "dense", "mixed-run": "mixed", "stack": "moe"}
    for run_name, name in runs.items():
        run_of(folder, run_name, MODELS[name])
    tasks = [logits(folder, name) for name in MODELS]
    tasks.append(logits(folder, "moe", out="padded", padded=PADDED))
    tasks += [
        training(folder, "moe", "straight", balance=0.01),
        training(folder, "moe", "stopped", balance=0.01, stop=STOP),
    ]
    tasks.append(training(folder, "moe", "stopped", balance=0.01))
    tasks += [training(folder, "dense", "dense-run"), training(folder, "mixed", "mixed-run", padded=PADDED)]
    tasks.append(training(folder, "moe", "stack", numbered=False, load=""))
    tasks += [
        logits(folder, "moe", newest(folder, "straight"), "straight"),
        logits(folder, "dense", newest(folder, "dense-run"), "dense-run"),
        logits(folder, "mixed", newest(folder, "mixed-run"), "mixed-run", padded=PADDED),
        logits(folder, "moe", newest(folder, "stack"), "stack", numbered=False),
    ]
    tasks += [states(folder, "dense"), states(folder, "moe")]
    run(folder, 1, tasks)
    return folder


@pytest.fixture(scope="module")
def pair(folder: Path, alone: Path) -> Path:
    """What two processes make, which share the experts (EP 2) or every matrix (TP 2)."""
    for run_name, name in {
        "shared": "moe",
        "shared-stopped": "moe",
        "split": "dense",
        "split-stopped": "dense",
    }.items():
        run_of(folder, run_name, MODELS[name])
    experts, matrices = {"expert": 2}, {"tensor": 2}
    tasks = [
        logits(folder, "moe", out="moe-2", **experts),
        logits(folder, "dense", out="dense-2", **matrices),
        training(folder, "moe", "shared", **experts),
        training(folder, "moe", "shared-stopped", stop=STOP, **experts),
        training(folder, "moe", "shared-stopped", **experts),
        training(folder, "dense", "split", **matrices),
        training(folder, "dense", "split-stopped", stop=STOP, **matrices),
        training(folder, "dense", "split-stopped", **matrices),
        logits(folder, "moe", newest(folder, "shared"), "shared", **experts),
        logits(folder, "dense", newest(folder, "split"), "split", **matrices),
    ]
    run(folder, 2, tasks)
    return folder


def of_transformers(folder: Path) -> Tensor:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return _logits(folder.parent, lambda ids: model(ids).logits)


def of_ours(model: HybridModel, folder: Path) -> Tensor:
    return _logits(folder, lambda ids: model(ids, torch.zeros_like(ids)).logits_BTV)


def _logits(folder: Path, model: Callable[[Tensor], Tensor]) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor(logits(folder, "moe")["ids"]))


def assert_equal(found: Path, wanted: Tensor) -> None:
    """Logits are equal up to 1e-4 of the largest; Megatron's may be of padding too."""
    theirs = torch.load(found)[..., : micro.VOCAB]
    assert (theirs - wanted).abs().max() < 1e-4 * wanted.abs().max()


@pytest.mark.parametrize(("name", "out"), [("moe", "moe"), ("moe", "padded"), ("dense", "dense")])
def test_megatron_computes_what_transformers_does_from_its_weights(alone: Path, name: str, out: str) -> None:
    assert_equal(alone / f"{out}.pt", of_transformers(alone / name))


@pytest.mark.parametrize("name", ["moe", "dense"])
def test_so_do_two_processes_that_share_the_weights(pair: Path, name: str) -> None:
    assert_equal(pair / f"{name}-2.pt", of_transformers(pair / name))


@pytest.mark.parametrize(
    ("name", "run_name"),
    [("moe", "straight"), ("moe", "stack"), ("dense", "dense-run"), ("moe", "shared"), ("dense", "split")],
)
def test_transformers_computes_what_megatron_does_from_its_checkpoint(pair: Path, name: str, run_name: str) -> None:
    spec = run_of(pair, run_name, MODELS[name])
    assert to_checkpoint(spec, pair / run_name / "megatron").name == f"step-{STEPS:08d}"
    state = load_trained(spec, torch.device("cpu")).model.state_dict()
    assert_equal(pair / f"{run_name}.pt", of_transformers(published(pair / f"{run_name}-made", MODELS[name], state)))


def test_shared_experts_and_biases_are_converted_both_ways(alone: Path) -> None:
    """transformers has no such model; ours computes the same."""
    spec = run_of(alone, "mixed-run", MIXED)
    assert_equal(alone / "mixed.pt", of_ours(load_model_of(run_of(alone, "mixed", MIXED)), alone))
    to_checkpoint(spec, alone / "mixed-run" / "megatron")
    assert_equal(alone / "mixed-run.pt", of_ours(load_model_of(spec), alone))


@pytest.mark.parametrize(("name", "number"), [("dense", 16), ("moe", 8)])
def test_layers_of_transformer_engine_find_their_empty_states(alone: Path, name: str, number: int) -> None:
    found = json.loads((alone / f"{name}.states").read_text())
    assert len(found) == number and all(shape == [0] for shape in found.values())


def load_model_of(spec: TrainSpec) -> HybridModel:
    model = build_model(spec.model, seed=None).to_empty(device="cpu")
    path = checkpoint.latest(spec.run_dir)
    assert path is not None
    load_model_weights(path, model)
    return model.eval()


def losses(folder: Path, run_name: str, stop: int = STEPS) -> list[float]:
    found: list[float] = json.loads((folder / run_name / f"{stop}").read_text())
    return found


@pytest.mark.parametrize(
    ("straight", "stopped"), [("straight", "stopped"), ("shared", "shared-stopped"), ("split", "split-stopped")]
)
def test_it_trains_on_our_shards_and_resumes_with_the_same_losses(pair: Path, straight: str, stopped: str) -> None:
    whole = losses(pair, straight)
    assert len(whole) == STEPS and whole[-1] < whole[0]
    assert [*losses(pair, stopped, STOP), *losses(pair, stopped)] == whole


def test_two_processes_train_as_one_does(pair: Path) -> None:
    assert losses(pair, "split") == pytest.approx(losses(pair, "dense-run"), rel=1e-5)
