"""Models that a job starts from, from a Hub on this machine, and models that do not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_models import llama_tokenizer, qwen_tokenizer
from hub_server import COMMIT
from hub_worker import Hub
from safetensors.torch import load_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from components.plan.step import runnable_here
from components.pretrained import check
from manifests.pretrained import hub_model
from manifests.spec import JobSpec, job_from
from trainer.data.manifest import read_manifest, verify
from trainer.errors import CheckpointError, DataError, SpecError
from trainer.pretrained import find

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
MODEL = {
    "vocab_size": 384,
    "hidden": 32,
    "layers": ["*-", "*-"],
    "attention": {"num_heads": 2, "num_kv_heads": 1, "head_dim": 16, "rope_theta": 1e6, "qk_norm": True},
    "mlp": {"width": 48, "activation": "swiglu"},
    "norm_eps": 1e-6,
    **dict.fromkeys(("mamba", "moe"), None),
    "engram": [],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of Qwen's kind, in several files, with its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    rope = {"rope_type": "default", "rope_theta": 1e6}
    shape = {**SHAPE, "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 384, "rope_parameters": rope}
    Qwen3ForCausalLM(Qwen3Config(**shape)).to(torch.bfloat16).save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return qwen_tokenizer(folder)


@pytest.fixture
def served(hub: Hub, model: Path) -> Hub:
    """The Hub with the model as org/texts, and with files that are not needed."""
    hub.server.files = {path.name: path.read_bytes() for path in model.iterdir()}
    hub.server.files |= {
        "README.md": b"# Model",
        "original/model.safetensors": b"other",
        "pytorch_model.bin": b"pickle",
    }
    return hub


def job(folder: Path, **changes: Any) -> JobSpec:
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": f"문서 {n} a text"}) + "\n" for n in range(40)))
    shared = {"domain": "en", "licence": "CC0-1.0", "weight": 1.0}
    source = shared | {"origin": {"kind": "files", "paths": [str(folder / "a.jsonl")]}}
    value = {"preset": "tiny", "storage": {"datasets_dir": str(folder / "d"), "checkpoints_dir": str(folder / "c")}}
    value["data"] = {"sources": dict.fromkeys(("ko", "en", "code", "math")) | {"web": source}}
    train = {"model": MODEL, "init_from": "org/texts"} | changes.pop("train", {})
    return job_from(value, {"train": train, **changes})


def run(hub: Hub, job: JobSpec) -> tuple[dict[str, Any] | None, str | None]:
    return hub.run(job.model_dump(mode="json"))


def test_a_model_comes_once_at_one_commit_through_faults(served: Hub, model: Path, tmp_path: Path) -> None:
    weights = sorted(path.name for path in model.glob("*.safetensors"))
    served.server.faults = {weights[0]: ["503", "reset"], "api": ["500"]}
    one = job(tmp_path)
    assert run(served, one)[1] is None
    folder = Path(one.models["train.init_from"])
    manifest = read_manifest(folder, "model")
    verify(folder, manifest)
    assert manifest.inputs == {"commit": COMMIT} and manifest.settings["weights"]
    assert find(folder).architecture.model_type == "qwen3"
    same = {path.name for path in model.iterdir()}
    assert (
        {entry.path for entry in manifest.files}
        == same
        == {p.name for p in folder.iterdir() if p.is_file()}
        - {
            ".lock",
            "manifest.json",
        }
    )
    assert load_file(folder / weights[0]).keys() == load_file(model / weights[0]).keys()
    asked = len(served.server.requests)
    served.server.commits["org/texts"] = "f" * 40  # main has moved, but this job keeps its commit
    assert run(served, one)[1] is None and len(served.server.requests) == asked


def test_of_a_tokenizers_model_no_weights_are_fetched_until_they_are_asked_for(served: Hub, tmp_path: Path) -> None:
    alone = job(tmp_path, train={"init_from": None}, tokenizer={"from": "org/texts@main"})
    assert run(served, alone)[1] is None
    folder = Path(alone.models["tokenizer.from"])
    assert sorted(path.suffix for path in folder.iterdir() if path.is_file() and path.name[0] != ".") == [".json"] * 5
    assert run(served, job(tmp_path))[1] is None and len(list(folder.glob("*.safetensors"))) > 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": 64}, "train.init_from: train.model.hidden is 64, but the model in "),
        ({"vocab_size": 512}, "train.init_from: train.model.vocab_size is 512, but the model in "),
    ],
)
def test_what_does_not_fit_is_refused_before_the_weights_come(
    served: Hub, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    result, error = run(served, job(tmp_path, train={"model": MODEL | change}))
    assert result is None and error and error.startswith(message) and "\n" not in error
    assert not [path for method, path, _ in served.server.requests if path.endswith(".safetensors") and method == "GET"]


def test_what_the_hub_refuses_is_one_line(served: Hub, tmp_path: Path) -> None:
    for name, said in (
        ("org/none", "train.init_from: org/none: no such model on the Hub"),
        ("org/texts@v9", "train.init_from: org/texts: has no revision 'v9'"),
    ):
        assert said in (run(served, job(tmp_path, train={"init_from": name}))[1] or "")
    served.server.gated = 403
    assert "accept the model's terms" in (run(served, job(tmp_path))[1] or "")
    served.server.gated = None
    served.server.files = {k: v for k, v in served.server.files.items() if not k.startswith("model")}
    assert "has no safetensors files" in (run(served, job(tmp_path))[1] or "")


def test_names_on_the_hub_and_folders() -> None:
    assert hub_model("Qwen/Qwen3-0.6B") == ("Qwen/Qwen3-0.6B", "main")
    assert hub_model("a/b@refs/pr/1") == ("a/b", "refs/pr/1")
    assert [hub_model(name) for name in ("/a/b", "./b", "../b", "b", "a/b/c", "~/b", "a/b@")] == [None] * 7


def test_folders_that_do_not_fit_are_refused_before_anything_runs(model: Path, tmp_path: Path) -> None:
    check(job(tmp_path, train={"init_from": str(model)}), downloaded=True)
    other = llama_tokenizer(tmp_path / "llama")
    with pytest.raises(SpecError, match=r"^tokenizer\.from: id \d+ is .* in the model's own tokenizer .*leave out"):
        check(job(tmp_path, train={"init_from": str(model)}, tokenizer={"from": str(other)}), downloaded=True)
    with pytest.raises(SpecError, match=r"^train\.init_from: .*none is not a folder on this machine"):
        check(job(tmp_path, train={"init_from": str(tmp_path / "none")}), downloaded=True)
    with pytest.raises(
        SpecError, match=r"^train\.init_from: .*/runs has no run qwen; write \./qwen for a folder, owner/"
    ):
        check(job(tmp_path, train={"init_from": "qwen"}), downloaded=False)
    with pytest.raises(SpecError, match=r"^train\.init_from: .*step-00000007 is not there; train the run to that step"):
        check(job(tmp_path, train={"init_from": "mine-0a1b2c3d@7"}), downloaded=False)
    small = {"model": MODEL | {"vocab_size": 256}, "init_from": None}
    with pytest.raises(SpecError, match=r"^tokenizer\.from: the tokenizer of .* has 295 entries, .*vocab_size is 256"):
        check(job(tmp_path, train=small, tokenizer={"from": str(other)}), downloaded=True)
    pieces = json.loads((other / "tokenizer.json").read_text()) | {"decoder": {"type": "Metaspace", "replacement": "▁"}}
    (tmp_path / "sp").mkdir()
    pieces["decoder"] |= {"prepend_scheme": "always", "split": True}
    (tmp_path / "sp" / "tokenizer.json").write_text(json.dumps(pieces))
    with pytest.raises(DataError, match=r"^tokenizer\.from: .*not byte-level BPE"):
        check(job(tmp_path, tokenizer={"from": str(tmp_path / "sp")}, train={"init_from": None}), downloaded=True)


def test_a_run_that_has_begun_can_be_evaluated_without_the_model(tmp_path: Path) -> None:
    begun = job(tmp_path, train={"init_from": str(tmp_path / "gone")}, cluster={"target": "local"})
    with pytest.raises(SpecError, match="gone is not a folder"):
        runnable_here(begun)
    (Path(begun.run_dir) / "checkpoints" / "step-00000002").mkdir(parents=True)
    assert runnable_here(begun) == begun


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model-00002-of-", "is not a readable safetensors file"),
        ("model.safetensors.index.json", "is not a valid index of weights"),
        ("tokenizer.json", "not a tokenizer"),
        ("tokenizer_config.json", "is not a JSON object"),
    ],
)
def test_files_that_git_lfs_has_not_fetched_are_refused_before_anything_runs(
    model: Path, tmp_path: Path, name: str, message: str
) -> None:
    shutil.copytree(model, tmp_path / "model")
    (file,) = (path for path in (tmp_path / "model").iterdir() if path.name.startswith(name))
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises((CheckpointError, DataError), match=rf"^train\.init_from: .*{file.name}: {message}"):
        check(job(tmp_path, train={"init_from": str(tmp_path / "model")}), downloaded=False)


def test_damaged_weights_of_the_hub_are_refused_when_they_are_here(served: Hub, tmp_path: Path) -> None:
    name = next(name for name in served.server.files if name.endswith(".safetensors"))
    served.server.files[name] = served.server.files[name][:-1]
    assert "is not a readable safetensors file" in (run(served, job(tmp_path))[1] or "")
