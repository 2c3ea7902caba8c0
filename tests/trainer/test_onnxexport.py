"""ONNX exports give the model's logits in onnxruntime, with and without a cache; what cannot be exported is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from made_run import make_run
from micro import VOCAB
from numpy.typing import NDArray

from trainer import export, onnxexport
from trainer.errors import ForeseenError
from trainer.model.hybrid import HybridModel

MODELS: dict[str, dict[str, Any]] = {
    "as dual-h100-dense": {
        "layers": ["*-", "*-"],
        "attention": {"num_heads": 4, "num_kv_heads": 2, "qk_norm": True, "rope_theta": 1e4},
        "mlp": {"activation": "swiglu"},
        "tied_embedding": True,
    },
    "squared ReLU, biases, YaRN, μP, prediction ahead": {
        "layers": ["*", "-", "*-"],
        "attention": {
            "bias": True,
            "rope_theta": 1e3,
            "rope_scaling": {"kind": "yarn", "factor": 4.0, "original_length": 16},
        },
        "mlp": {"bias": True},
        "mup": {"base_hidden": 16, "base_head_dim": 8},
        "mtp": {"depth": 1, "layer": "*-"},
    },
    "no positions": {"layers": ["*-"], "attention": {"num_kv_heads": 2}},
}


class Graph(NamedTuple):
    """An export, its ONNX folder, its model and a session of onnxruntime."""

    directory: Path
    folder: Path
    model: HybridModel
    session: Any

    def __call__(self, ids_BT: Any, mask_BS: Any = None, past: list[NDArray] | None = None) -> list[NDArray]:
        """Logits, then keys and values of each layer with attention."""
        spec, ids_BT = self.model.spec.attention, np.asarray(ids_BT)
        assert spec is not None
        names = [entry.name for entry in self.session.get_inputs()][2:]
        past = past or [np.zeros((len(ids_BT), spec.num_kv_heads, 0, spec.head_dim), np.float32) for _ in names]
        if mask_BS is None:
            mask_BS = np.ones((len(ids_BT), past[0].shape[2] + ids_BT.shape[1]), np.int64)
        feed = {"input_ids": ids_BT, "attention_mask": np.asarray(mask_BS)} | dict(zip(names, past, strict=True))
        return self.session.run(None, feed)

    def expected(self, ids_BT: torch.Tensor) -> NDArray:
        with torch.no_grad():
            return self.model(ids_BT, torch.zeros_like(ids_BT, dtype=torch.int32)).logits_BTV.numpy()


@pytest.fixture(scope="module", params=MODELS)
def graph(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Graph]:
    spec, _ = make_run(tmp_path_factory.mktemp("onnx"), model={"engram": [], **MODELS[request.param]})
    export.run(spec)
    directory = Path(spec.run_dir) / "export"
    file = onnxexport.run(directory, directory.with_name("export-onnx"))
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    yield Graph(directory, file.parent, export.load(directory)[0], session)


def close(actual: NDArray, expected: NDArray) -> None:
    assert actual.shape == expected.shape and np.abs(expected).max() > 0.3
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def ids(rows: int, length: int) -> torch.Tensor:
    return torch.randint(1, VOCAB, (rows, length))


@pytest.mark.parametrize(("rows", "length"), [(1, 1), (1, 40), (3, 1), (3, 17), (2, 200)])
def test_logits_without_a_past(graph: Graph, rows: int, length: int) -> None:
    ids_BT = ids(rows, length)
    close(graph(ids_BT)[0], graph.expected(ids_BT))


@pytest.mark.parametrize("rows", [1, 2])
def test_logits_step_by_step_and_in_pieces(graph: Graph, rows: int) -> None:
    ids_BT, past, parts = ids(rows, 30), None, []
    for first, last in [(0, 1), (1, 2), (2, 14), *((t, t + 1) for t in range(14, 25)), (25, 30)]:
        logits, *past = graph(ids_BT[:, first:last], past=past)
        parts.append(logits)
        assert all(cached.shape[2] == last for cached in past)
    close(np.concatenate(parts, 1), graph.expected(ids_BT))


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_padded_on_either_side_are_as_alone(graph: Graph, side: str) -> None:
    lengths, next_BT = (3, 12, 7), ids(3, 2)
    rows = [ids(1, length)[0] for length in lengths]
    ids_BT, mask_BT = torch.full((3, 12), 7), torch.zeros(3, 12, dtype=torch.int64)
    for i, row in enumerate(rows):
        place = slice(12 - len(row), None) if side == "left" else slice(len(row))
        ids_BT[i, place], mask_BT[i, place] = row, 1
    logits, *past = graph(ids_BT, mask_BT)
    for i, row in enumerate(rows):
        close(logits[i][mask_BT[i].bool().numpy()], graph.expected(row[None])[0])
    longer_BS = torch.cat([mask_BT, torch.ones(3, 2, dtype=torch.int64)], 1)
    logits, *_ = graph(next_BT, longer_BS, past)
    for i, row in enumerate(rows):
        whole = torch.cat([row, next_BT[i]])
        close(logits[i], graph.expected(whole[None])[0, -2:])


def test_files_names_and_origin(graph: Graph) -> None:
    model = onnx.load(graph.folder / "model.onnx", load_external_data=False)
    layers = sum(layer.count("*") for layer in graph.model.spec.layers)
    cache = [f"{layer}.{what}" for layer in range(layers) for what in ("key", "value")]
    assert [entry.name for entry in model.graph.input] == [
        *("input_ids", "attention_mask"),
        *(f"past_key_values.{name}" for name in cache),
    ]
    assert [entry.name for entry in model.graph.output] == ["logits", *(f"present.{name}" for name in cache)]
    kept = [p for name, p in graph.model.named_parameters() if not name.startswith("mtp.")]
    weights = sum(parameter.nbytes for parameter in kept)
    outside = (graph.folder / "model.onnx.data").stat().st_size
    assert 0.9 * weights < outside < 1.05 * weights, "each once, and none in the graph's file"
    props = {entry.key: entry.value for entry in model.metadata_props}
    manifest = json.loads((graph.directory / "manifest.json").read_text())
    assert props["yaongi.checkpoint_digest"] == manifest["checkpoint_digest"] and props["yaongi.step"] == "12"
    assert len(props["yaongi.passport_sha256"]) == 64
    there = {path.name for path in graph.folder.iterdir()}
    native = graph.model.spec.mup is None  # as Qwen3 and NemotronH
    assert there == {
        *("model.onnx", "model.onnx.data", "tokenizer.json", "tokenizer_config.json"),
        *("generation_config.json", "chat_template.jinja", *(["config.json"] if native else [])),
    }
    if native:
        assert json.loads((graph.folder / "config.json").read_text())["dtype"] == "float32"


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({}, "a model with Engram and Mamba-2 and experts cannot"),
        ({"layers": ["*E"], "engram": []}, "a model with experts cannot"),
        ({"layers": ["-"], "engram": []}, "a model without attention cannot"),
    ],
)
def test_a_kind_that_cannot_be_exported_is_named(model: dict[str, Any], said: str, tmp_path: Path, yaongi) -> None:
    spec, _ = make_run(tmp_path, model=model)
    export.run(spec)
    code, _, error = yaongi("onnx", spec.run_dir)
    assert code == 2 and said in error and error.count("\n") == 1 and "onnx" not in str(list(tmp_path.iterdir()))


def test_what_is_in_the_way_or_missing_is_named(tmp_path: Path, yaongi, monkeypatch) -> None:
    spec, _ = make_run(tmp_path, model={"engram": [], "layers": ["*-"]})
    export.run(spec)
    directory = Path(spec.run_dir) / "export"
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").touch()
    for output, said in [
        ("notes", "notes exists and is not an ONNX export"),
        (str(directory / "x"), "is inside the export"),
    ]:
        code, _, error = yaongi("onnx", str(directory), output)
        assert code == 2 and said in error and error.count("\n") == 1

    def full(*_arguments: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(onnxexport, "_translated", full)
        code, _, error = yaongi("onnx", spec.run_dir)
        assert code == 74 and error.count("\n") == 1
        assert [path.name for path in directory.parent.iterdir() if "onnx" in path.name] == []
    with monkeypatch.context() as patch:
        patch.setattr(onnxexport, "PACKAGES", ("onnx", "onnxscripts"))
        code, _, error = yaongi("onnx", spec.run_dir)
        assert code == 69 and "pip install 'yaongi[onnx]'" in error and error.count("\n") == 1
    (directory / "config.json").write_text((directory / "config.json").read_text() + " ")
    with pytest.raises(ForeseenError, match=r"config\.json differs"):
        onnxexport.run(directory, tmp_path / "new")


def test_the_verb_writes_beside_the_export_and_replaces_what_it_wrote(tmp_path: Path, yaongi) -> None:
    spec, _ = make_run(tmp_path, model={"engram": [], "layers": ["*-"]})
    export.run(spec)
    folder = Path(spec.run_dir) / "export-onnx"
    folder.mkdir()
    (folder / "model.onnx").touch()
    (folder / "old").touch()
    code, said, error = yaongi("onnx", spec.run_dir)
    assert (code, said) == (0, f"wrote {folder}/model.onnx\n"), error
    assert not (folder / "old").exists() and (folder / "model.onnx").stat().st_size > 1000
    assert not list(Path(spec.run_dir).glob(".export*"))
    assert yaongi("verify", spec.run_dir)[0] == 0
