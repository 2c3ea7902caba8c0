"""An export made again with weights in INT8 or FP8, and exports loaded in other dtypes."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from made_run import make_run
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from pipelines import checks, quantize
from pipelines.cli import app
from trainer import evaluate, export, onnxexport, pretrained, quantise
from trainer.checkpoints.checkpoint import describe_files
from trainer.data.tokenizer import Tokenizer
from trainer.errors import ForeseenError
from trainer.generate import complete
from trainer.loading import load
from trainer.ops.quantised import Kind
from trainer.scoring import Score
from trainer.spec import TrainSpec

IDS = torch.randint(0, 320, (2, 32), generator=torch.Generator().manual_seed(1))


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS, torch.zeros_like(IDS, dtype=torch.int32)).logits_BTV


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainSpec, Path]:
    spec, _ = make_run(tmp_path_factory.mktemp("run"), evaluate={"max_tokens": 50})
    export.run(spec)
    return spec, Path(spec.run_dir) / "export"


def no_scores(*_: object) -> quantise.Scores:
    return {"all": Score(1.0, 2, 3, 1).summary()}


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_an_export_is_made_again(exported: tuple[TrainSpec, Path], kind: Kind, tmp_path: Path) -> None:
    """Loads bit for bit as when quantised while loading; verifies; states the scores of the run's evaluation."""
    spec, directory = exported
    output = directory.with_name(f"export-{kind}")
    result = CliRunner().invoke(app, ["quantize", str(directory), "--to", kind])
    assert result.exit_code == 0, result.output
    model, tokenizer = export.load(output)
    whole, _ = load(directory, weights=kind)
    assert torch.equal(logits(model), logits(whole)) and torch.equal(logits(load(output)[0]), logits(whole))
    assert not torch.equal(logits(model), logits(export.load(directory)[0]))
    assert tokenizer.encode("다리 river") == Tokenizer.load(directory).encode("다리 river")
    assert model.state_dict()["head.weight"].element_size() == 1
    manifest = json.loads((output / "manifest.json").read_text())
    assert (manifest["format"], manifest["weights"]) == (2, kind)
    assert manifest["max_position_embeddings"] == spec.tokens.seq_len
    measured = evaluate.run(spec)
    assert manifest["measured"]["before"] == measured["domains"] | {"all": measured["all"]}
    after = manifest["measured"]["after"]["all"]["perplexity"]
    assert 0 < abs(after / measured["all"]["perplexity"] - 1) < 0.1
    assert f"{after:.4f}" in result.output and f"{after:.4f}" in (output / "README.md").read_text()
    found = {check.what: check for check in checks.checks(output, None)}
    assert {check.mark for check in found.values()} == {checks.GOOD, checks.OPEN}
    assert found["made from"].mark == checks.GOOD and str(directory) in found["made from"].detail
    elsewhere = shutil.copytree(output, tmp_path / "copy" / "model")
    assert ("made from", checks.OPEN) in [(each.what, each.mark) for each in checks.checks(elsewhere, None)]
    (elsewhere.parent / "export").mkdir()
    (elsewhere.parent / "export" / "passport.json").write_text("{}")
    (other,) = [each for each in checks.checks(elsewhere, None) if each.what == "made from"]
    assert other.mark == checks.OPEN and "was exported again since" in other.detail
    small, large = ((folder / "model.safetensors").stat().st_size for folder in (output, directory))
    assert small < 0.45 * large and f"{small / large:.0%}" in result.output  # headers are a large part here
    quantise.run(directory, output, kind, no_scores)  # again
    assert json.loads((output / "manifest.json").read_text())["measured"]["after"] == no_scores()
    assert sorted(path.name for path in directory.parent.glob(".export-*")) == []


def test_a_key_demands_a_passport(exported: tuple[TrainSpec, Path], tmp_path: Path, monkeypatch: Any) -> None:
    former = shutil.copytree(exported[1], tmp_path / "former")
    (former / "passport.json").unlink()
    monkeypatch.setattr(quantise.signing, "signer", object)
    with pytest.raises(ForeseenError, match="former has no passport to sign; export the run again, or unset YAONGI_"):
        quantise.run(former, tmp_path / "made", "int8", no_scores)


def test_scores_of_a_text_are_its_log_likelihood(
    exported: tuple[TrainSpec, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text.txt").write_text("다리 river stone moon 강물", encoding="utf-8")
    model, tokenizer = export.load(exported[1])
    ids = torch.tensor([[*tokenizer.encode("다리 river stone moon 강물"), tokenizer.eod_id]])
    with torch.inference_mode():
        logp = model(ids, torch.zeros_like(ids, dtype=torch.int32)).logits_BTV[0].double().log_softmax(-1)
    total = -sum(float(logp[t, ids[0, t + 1]]) for t in range(ids.shape[1] - 1))
    num_bytes = len("다리 river stone moon 강물".encode()) - tokenizer.byte_lengths()[int(ids[0, 0])]
    score = quantise.on_text(tmp_path / "text.txt")(model, tokenizer, torch.device("cpu"))["all"]
    assert score["bits_per_byte"] == pytest.approx(total / math.log(2) / num_bytes, rel=1e-5)
    assert score["perplexity"] == pytest.approx(math.exp(total / (ids.shape[1] - 1)), rel=1e-5)
    for size, begun in ((8, "다리 r"), (25, "다리 river stone moon ")):  # a file that is longer than what is read
        monkeypatch.setattr(quantise, "TEXT_BYTES", size)
        found = quantise.on_text(tmp_path / "text.txt")(model, tokenizer, torch.device("cpu"))["all"]
        assert found["tokens"] == len(tokenizer.encode(begun))
    monkeypatch.undo()
    monkeypatch.setattr(quantise, "TEXT_TOKENS", 3)
    score = quantise.on_text(tmp_path / "text.txt")(model, tokenizer, torch.device("cpu"))["all"]
    assert score["tokens"] == 3
    assert score["loss"] == pytest.approx(-sum(float(logp[t, ids[0, t + 1]]) for t in range(3)) / 3, rel=1e-5)


def test_bf16_is_what_the_folder_for_transformers_holds(exported: tuple[TrainSpec, Path]) -> None:
    model, _ = load(exported[1], weights="bf16")
    theirs = load_file(exported[1] / "transformers" / "model.safetensors")
    ours = model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]) for name in ours)
    exact = logits(export.load(exported[1])[0])
    assert logits(model).dtype == torch.bfloat16 and (logits(model) - exact).std() < 0.1 * exact.std()
    assert torch.equal(logits(load(exported[1])[0]), exact)  # auto on a CPU


@pytest.fixture
def small(exported: tuple[TrainSpec, Path], tmp_path: Path) -> Path:
    quantise.run(exported[1], tmp_path / "small", "int8", no_scores)
    return tmp_path / "small"


def changed(directory: Path, **fields: object) -> None:
    """Change the manifest of an export, and state its files as they are."""
    manifest = json.loads((directory / "manifest.json").read_text())
    files = describe_files(directory, manifest["files"])
    manifest |= {"files": {name: entry.model_dump() for name, entry in files.items()}, **fields}
    (directory / "manifest.json").write_text(json.dumps(manifest))


def test_what_a_quantised_export_cannot_be_used_for(
    small: Path, tmp_path: Path, exported: tuple[TrainSpec, Path]
) -> None:
    spec, directory = exported
    with pytest.raises(ForeseenError, match="small holds weights as int8, but quantising needs FP32; name the export"):
        quantise.run(small, tmp_path / "again", "fp8", no_scores)
    for weights in ("fp32", "bf16", "fp8"):
        with pytest.raises(ForeseenError, match=f"holds weights as int8, which cannot become {weights}"):
            load(small, weights=weights)
    with pytest.raises(ForeseenError, match="holds weights as int8, but training begins with FP32"):
        pretrained.refuse_misfit(pretrained.find(small), spec.model)
    with pytest.raises(ForeseenError, match="holds weights as int8, but ONNX is written from FP32"):
        onnxexport.refuse_quantised(small, json.loads((small / "manifest.json").read_text()), "ONNX is written from")
    with pytest.raises(ForeseenError, match="is inside the export"):
        quantise.run(directory, directory / "int8", "int8", no_scores)
    with pytest.raises(ForeseenError, match="exists and is no quantised export"):
        quantise.run(directory, tmp_path, "int8", no_scores)


def test_damage_and_unknown_formats_are_named(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed(small, weights="int4")
    with pytest.raises(ForeseenError, match=r"manifest\.json has format 2 int4, this version reads up to 2") as caught:
        load(small)
    assert caught.value.code == 66
    changed(small, weights="int8")
    with monkeypatch.context() as patch, pytest.raises(ForeseenError, match="has format 2 int8"):
        patch.setattr(export, "FORMATS", {(1, None)})  # as an earlier version
        load(small)
    tensors = load_file(small / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if k != "head.weight_scale"}, small / "model.safetensors")
    with pytest.raises(ForeseenError, match=r"model\.safetensors differs from what was written"):
        load(small)
    changed(small)
    with pytest.raises(ForeseenError, match=r"disagree about head\.weight_scale"):
        load(small)


def test_a_weight_that_is_not_finite_is_named(exported: tuple[TrainSpec, Path], tmp_path: Path) -> None:
    directory = shutil.copytree(exported[1], tmp_path / "export")
    tensors = load_file(directory / "model.safetensors")
    tensors["head.weight"][3, 4] = float("nan")
    save_file(tensors, directory / "model.safetensors")
    changed(directory)
    with pytest.raises(ForeseenError, match=r"head\.weight has numbers that are not finite"):
        load(directory, weights="fp8")


def test_bad_options_end_with_one_line(exported: tuple[TrainSpec, Path], tmp_path: Path) -> None:
    wrong = CliRunner().invoke(app, ["quantize", str(exported[1]), "--to", "int4"])
    assert wrong.exit_code == 2 and "int4" in wrong.output
    wrong = CliRunner().invoke(app, ["generate", str(exported[1]), "--prompt", "x", "--weights", "int4"])
    assert wrong.exit_code == 2 and "int4" in wrong.output
    alone = shutil.copytree(exported[1], tmp_path / "alone")
    with pytest.raises(ForeseenError, match="held-out text of its run is not here; give a text: --text FILE"):
        quantize._measure(alone, None)
    with pytest.raises(ForeseenError, match=r"none\.txt: cannot be read"):
        quantize._measure(alone, tmp_path / "none.txt")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    with pytest.raises(ForeseenError, match="is not UTF-8 text"):
        quantize._measure(alone, tmp_path / "bytes")
    (tmp_path / "empty").write_text("")
    with pytest.raises(ForeseenError, match="has no text to score"):
        quantise.run(alone, tmp_path / "made", "int8", quantise.on_text(tmp_path / "empty"))
    assert not (tmp_path / "made").exists()
    (tmp_path / "file").touch()
    with pytest.raises(
        ForeseenError, match=r"file/x/\.y-unfinished.*: cannot be created \(Not a directory\)"
    ) as caught:
        quantise.run(alone, tmp_path / "file" / "x" / "y", "int8", no_scores)
    assert caught.value.code == 74


def test_generate_quantises_while_loading(exported: tuple[TrainSpec, Path]) -> None:
    told = ["generate", str(exported[1]), "--prompt", "river", "--tokens", "5", "--temperature", "0"]
    texts = {w: CliRunner().invoke(app, [*told, "--weights", w]) for w in ("fp32", "int8", "fp8", "bf16")}
    assert {result.exit_code for result in texts.values()} == {0}
    for weights, result in texts.items():
        model, tokenizer = load(exported[1], weights=weights)
        text = complete(model, tokenizer, ["river"], max_tokens=5, temperature=0, seed=0)[0]
        assert result.stdout == f"river{text}\n"
