"""An exported directory gives the checkpoint's logits, refuses damage, and states what it contains."""

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch
from made_run import make_run, save_checkpoint
from micro import make_data
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from trainer import evaluate, export
from trainer.checkpoints.checkpoint import describe_files
from trainer.errors import ForeseenError
from trainer.hf import own
from trainer.model.hybrid import HybridModel
from trainer.specbase import parse
from trainer.trained import load_trained


@pytest.fixture
def exported(tmp_path):
    spec, model = make_run(tmp_path, evaluate={"max_tokens": 50})
    manifest = export.run(spec)
    return spec, model, manifest, Path(spec.run_dir) / "export"


def files(directory):
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


def test_logits_equal_the_checkpoints(exported):
    _, model, manifest, directory = exported
    loaded, tokenizer = export.load(directory)
    ids = torch.randint(0, 320, (2, 32), generator=torch.Generator().manual_seed(1))
    seq_idx = torch.zeros_like(ids, dtype=torch.int32)
    with torch.no_grad():
        assert torch.equal(loaded(ids, seq_idx).logits_BTV, model(ids, seq_idx).logits_BTV)
    assert manifest["parameters"] == sum(p.numel() for p in model.parameters())
    assert tokenizer.decode(tokenizer.encode("다리 river")) == "다리 river"


def test_what_others_left_is_neither_exported_nor_in_the_way(exported):
    spec, _, manifest, directory = exported
    (directory / ".nfs000000001").touch()
    (directory / "._config.json").touch()
    export.load(directory)
    assert export.run(spec) == manifest
    assert not (directory / "._config.json").exists()
    assert files(directory) == {*manifest["files"], "manifest.json", "passport.json"}


def test_weights_that_come_from_a_file_are_not_drawn_first(tmp_path, monkeypatch):
    spec, model = make_run(tmp_path)

    def drawn(*_args, **_kwargs):
        raise AssertionError("weights were drawn")

    monkeypatch.setattr(HybridModel, "init_weights", drawn)
    trained = load_trained(spec, torch.device("cpu")).model
    export.run(spec)
    loaded, _ = export.load(Path(spec.run_dir) / "export")
    expected = model.state_dict()
    assert any(name.endswith("bias_E") for name in expected) and any(name.endswith("class_V") for name in expected)
    for filled in (trained, loaded):
        assert filled.state_dict().keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in filled.state_dict().items())
        assert not any(tensor.is_meta for tensor in [*filled.parameters(), *filled.buffers()])
        assert all(parameter.requires_grad for parameter in filled.parameters())


@pytest.mark.parametrize("name", ["layers.0.1.mixer.bias_E", "layers.1.0.mixer.hash.class_V", "head.weight"])
def test_a_tensor_that_the_file_lacks_is_named(tmp_path, name):
    spec, model = make_run(tmp_path)
    export.run(spec)
    directory = Path(spec.run_dir) / "export"
    whole = model.state_dict()
    left = {key: tensor for key, tensor in whole.items() if key != name}
    assert len(left) == len(whole) - 1

    save_file(left, directory / "model.safetensors")
    manifest = json.loads((directory / "manifest.json").read_text())
    manifest["files"] = {
        file: entry.model_dump() for file, entry in describe_files(directory, manifest["files"]).items()
    }
    (directory / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ForeseenError, match=rf"disagree about {re.escape(name)};") as of_export:
        export.load(directory)

    model.state_dict = lambda: left
    save_checkpoint(spec, model, 16)
    with pytest.raises(ForeseenError, match=rf"model\.{re.escape(name)} should have .* no such tensor") as of_run:
        load_trained(spec, torch.device("cpu"))
    assert of_export.value.code == of_run.value.code == 66


def test_manifest_has_the_digest_of_every_file(exported):
    _, _, manifest, directory = exported
    assert json.loads((directory / "manifest.json").read_text()) == manifest
    present = files(directory) - {"manifest.json", "passport.json"}
    weights = {"model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"}
    beside = {*weights, "generation_config.json", "chat_template.jinja", *(path.name for path in own.CODE)}
    assert present == {*weights, "README.md", *(f"transformers/{name}" for name in beside)}
    for name in present:
        data = (directory / name).read_bytes()
        assert manifest["sha256"][name] == hashlib.sha256(data).hexdigest()
        assert manifest["files"][name]["bytes"] == len(data)


def test_fp32_weights_for_transformers_on_request(exported):
    spec, _, manifest, directory = exported
    assert (
        manifest["transformers_dtype"] == "bf16" and "trust_remote_code=True" in (directory / "README.md").read_text()
    )
    name = "layers.0.0.mixer.out_proj.weight"
    assert load_file(directory / "transformers" / "model.safetensors")[name].dtype == torch.bfloat16
    wide = spec.updated({"export": {"dtype": "fp32"}})
    assert export.run(wide)["transformers_dtype"] == "fp32"
    written, exact = (load_file(directory / at / "model.safetensors") for at in ("transformers", "."))
    assert written.keys() == exact.keys() and all(torch.equal(written[name], exact[name]) for name in exact)
    assert json.loads((directory / "transformers" / "config.json").read_text())["dtype"] == "float32"


def test_config_is_the_model_spec(exported):
    spec, _, _, directory = exported
    assert parse(type(spec.model), json.loads((directory / "config.json").read_text())) == spec.model


def test_transformers_reads_the_tokenizer(exported):
    transformers = pytest.importorskip("transformers")
    _, _, _, directory = exported
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(str(directory))
    _, ours = export.load(directory)
    text = "다리 river <x> 12"
    assert theirs.encode(text, add_special_tokens=False) == ours.encode(text)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "README.md"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damage_is_named(exported, name, damage):
    path = exported[3] / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(data if damage == "flip" else data[:-1])
    with pytest.raises(ForeseenError, match=name) as caught:
        export.load(exported[3])
    assert caught.value.code == 66 and "\n" not in str(caught.value)


@pytest.mark.parametrize("written", ['{"format": 1}', '{"format": 1, "files": 3}', '{"format": 1, "files": {"a": {}}}'])
def test_a_manifest_without_files_is_refused(exported, written):
    (exported[3] / export.MANIFEST).write_text(written)
    with pytest.raises(
        ForeseenError, match=r"manifest\.json does not name the files of an export; export the run again"
    ):
        export.load(exported[3])


def test_export_again_replaces_and_leaves_nothing_behind(exported):
    spec, model, first, directory = exported
    with torch.no_grad():
        model.head.weight.add_(1)
    save_checkpoint(spec, model, 16)
    second = export.run(spec)
    assert second["step"] == 16 and second["sha256"] != first["sha256"]
    assert torch.equal(export.load(directory)[0].head.weight, model.head.weight)
    assert not list(Path(spec.run_dir).glob(".export*"))


def test_failed_export_leaves_the_old_one(exported, monkeypatch):
    spec, model, _, directory = exported

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        export.run(spec)
    assert torch.equal(export.load(directory)[0].head.weight, model.head.weight)


def test_model_card_has_licences_shares_and_this_checkpoints_numbers(exported):
    spec, model, _, directory = exported
    assert "This checkpoint was not evaluated." in (directory / "README.md").read_text()
    result = evaluate.run(spec)
    export.run(spec)
    card = (directory / "README.md").read_text()
    assert "| ko | en | 50.0% | CC0-1.0 | random words | 1 |" in card
    assert f"{result['all']['bits_per_byte']:.4f}" in card
    save_checkpoint(spec, model, 16)  # a newer checkpoint, which eval.json does not cover
    export.run(spec)
    assert "This checkpoint was not evaluated." in (directory / "README.md").read_text()


@pytest.mark.parametrize("task", [evaluate, export])
def test_a_tokenizer_other_than_the_checkpoints_is_refused(tmp_path, task):
    spec, _ = make_run(tmp_path)
    make_data(tmp_path / "other", seed=8)
    other = spec.updated({"tokens": {"tokenizer": str(tmp_path / "other" / "tokenizer")}})
    with pytest.raises(ForeseenError, match=r"is tokenizer \w{12}, .*step-00000012 was trained with") as caught:
        task.run(other)
    assert caught.value.code == 65


@pytest.mark.parametrize("task", [evaluate, export])
def test_a_tokenizer_changed_since_it_was_made_is_refused(tmp_path, task):
    spec, _ = make_run(tmp_path)
    path = Path(spec.tokens.tokenizer) / "tokenizer.json"
    text = path.read_text(encoding="utf-8")
    first, second = sorted(json.loads(text)["model"]["vocab"].items(), key=lambda item: item[1])[-2:]
    swapped = json.loads(text)
    swapped["model"]["vocab"] |= {first[0]: second[1], second[0]: first[1]}  # still a tokenizer, of the same size
    path.write_text(json.dumps(swapped, indent=2, ensure_ascii=False), encoding="utf-8")
    assert path.stat().st_size == len(text.encode())
    with pytest.raises(ForeseenError, match=r"tokenizer\.json: its content differs from the manifest") as caught:
        task.run(spec)
    assert caught.value.code == 65


DECODERS = {
    "qwen3": {"mlp": {"activation": "swiglu"}, "tied_embedding": True, "layers": ["*-", "*-"]},
    "qwen3_moe": {
        "layers": ["*E", "*E"],
        "moe": {"activation": "swiglu", "scores": "softmax", "score_scale": 1.0, "bias_update_rate": 0.0},
    },
    "nemotron_h": {"layers": ["ME", "*-"], "attention": {}},
    "yaongi": {"engram": [{"layer": 1, "rows_per_head": 50, "width_per_order": 16, "num_heads": 2}]},
}


@pytest.mark.parametrize("architecture", DECODERS)
@pytest.mark.usefixtures("remote_code")
def test_transformers_loads_it(architecture, tmp_path, monkeypatch):
    """Weights in several files, tokenizer, generation; the same logits up to the rounding of weights to BF16."""
    monkeypatch.setattr("trainer.hf.folder.FILE_BYTES", 20_000)
    attention = {"attention": {"qk_norm": True, "rope_theta": 1e4}, **DECODERS[architecture]}
    spec, model = make_run(tmp_path, model={"engram": [], **attention}, evaluate={"max_tokens": 50})
    if architecture == "qwen3_moe":
        export.run(spec)
        config = json.loads((Path(spec.run_dir) / "export" / "transformers" / "config.json").read_text())
        assert config["model_type"] == "yaongi", "the router there has no bias"
        for moe in model.moe_sublayers():
            moe.bias_E.zero_()
        save_checkpoint(spec, model, 13)
    manifest = export.run(spec)
    folder = Path(spec.run_dir) / "export" / "transformers"
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert {f"transformers/{path.name}" for path in folder.iterdir()} <= manifest["files"].keys()
    own_code = {"trust_remote_code": True} if architecture == "yaongi" else {}
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **own_code).eval()
    assert theirs.config.model_type == architecture
    loaded, tokenizer = export.load(folder.parent)
    their_tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "다리 river stone 강물"
    assert their_tokenizer(text)["input_ids"] == tokenizer.encode(text)
    with torch.no_grad():
        for name, parameter in loaded.named_parameters():
            if architecture != "yaongi" or not name.endswith(own.FP32):
                parameter.copy_(parameter.bfloat16())
        ids = torch.tensor([tokenizer.encode(text)])
        expected = loaded(ids, torch.zeros_like(ids, dtype=torch.int32)).logits_BTV
        torch.testing.assert_close(theirs(ids).logits, expected, atol=2e-4, rtol=1e-3)
    made = theirs.generate(ids, max_new_tokens=5, do_sample=False)
    assert made.shape[1] > ids.shape[1] and torch.equal(made[:, : ids.shape[1]], ids)
    (folder / "config.json").write_text("{}")
    with pytest.raises(ForeseenError, match=r"transformers/config\.json differs from what was written"):
        export.load(folder.parent)
