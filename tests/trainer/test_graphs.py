"""Layers as recordings: what is repeated is what the layers would do, on a tape that does what a CUDA graph does."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import micro
import pytest
import torch
from tape import Tape
from torch import Tensor

from trainer import compiled, graphed, loop, ops, precision
from trainer.distributed import World
from trainer.errors import SpecError
from trainer.model import graphs
from trainer.model.graphs import LayerGraphs
from trainer.model.hybrid import HybridModel, build_model
from trainer.modelspec import ModelSpec
from trainer.parallel.layout import Layout
from trainer.parallel.mesh import Mesh
from trainer.parameters import parameters
from trainer.precision import Precision
from trainer.prepare import without_graphs
from trainer.recomputing import set_policy
from trainer.runtimespec import RecomputeSpec
from trainer.spec import Fp8Spec, TrainSpec

pytestmark = pytest.mark.usefixtures("quiet_checkpoint_library", "leave_no_traces")

SPEC = ModelSpec(
    vocab_size=128,
    hidden=64,
    layers=["ME", "N", "*-", "ME", "*-"],
    mamba={"num_heads": 2, "head_dim": 32, "d_state": 16, "chunk_size": 32},
    attention={"num_heads": 2, "num_kv_heads": 1, "head_dim": 32},
    moe={"num_experts": 8, "top_k": 2, "expert_width": 32, "shared_width": 16},
    mlp={"width": 64},
    engram=[{"layer": 1, "rows_per_head": 50, "width_per_order": 32, "num_heads": 2, "compress_tokens": False}],
    mtp={"depth": 1, "layer": "E"},
)
LORA = SPEC.updated({"mtp": None, "lora": {"rank": 2}})


def batches(count: int, length: int = 64, mean: int = 16) -> Iterator[tuple[Tensor, Tensor, Tensor, int]]:
    """Two rows of random documents, `mean` tokens long, and how many there are."""
    generator = torch.Generator().manual_seed(3)
    for _ in range(count):
        ids_BT = torch.randint(0, SPEC.vocab_size, (2, length), generator=generator)
        begins_BT = torch.rand(2, length, generator=generator) < 1 / mean
        begins_BT[:, 0] = False
        labels_BT = ids_BT.roll(-1, dims=1)
        yield ids_BT, begins_BT.int().cumsum(1, dtype=torch.int32), labels_BT, int(begins_BT.sum()) + 2


def built(spec: ModelSpec = SPEC, *, policy: str = "none", copies: bool = False) -> HybridModel:
    model = build_model(spec, seed=0, dtype=torch.bfloat16 if copies else None)
    set_policy(model, policy)
    if copies:
        names = {parameter.name for parameter in parameters(spec) if parameter.per_expert}
        model.keep_copies(names, names)
    return model


def failed(reason: str) -> None:
    raise AssertionError(reason)


def recorded(model: HybridModel) -> Tape:
    tape = Tape()
    model.graphs = LayerGraphs(model, failed, lambda device: tape)
    return tape


def train(model: HybridModel, given: Any, *, narrow: bool = False, micro_batches: int = 2) -> list[list[Tensor]]:
    """Losses, loads and gradients of each step of two micro-batches; weights and router biases move in place."""
    optimizer, steps = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3), []
    for number, batch in enumerate(given, start=1):
        with torch.autocast(batch[0].device.type, torch.bfloat16, enabled=narrow):
            output = model(*batch)
        (output.ce_sum / 50 + 3 * output.aux_sum + output.mtp_ce_sum_K.sum() / 50).backward()
        steps.append([output.ce_sum.detach(), output.aux_sum.detach(), output.expert_load_LE])
        if number % micro_batches == 0:
            steps[-1] += [p.grad.clone() for p in model.parameters() if p.grad is not None]
            optimizer.step()
            optimizer.zero_grad()
            model.update_router_bias(output.expert_load_LE)
    return steps


def same(found: list[list[Tensor]], expected: list[list[Tensor]]) -> bool:
    pairs = [pair for steps in zip(found, expected, strict=True) for pair in zip(*steps, strict=True)]
    return all(torch.equal(*pair) for pair in pairs)


@pytest.mark.parametrize("policy", ["none", "selective", "full", RecomputeSpec(every=2)], ids=str)
@pytest.mark.parametrize("narrow", [False, True])
def test_steps_are_to_the_bit_those_of_the_layers(policy: Any, narrow: bool):
    """Experts with copies, Engram, multi-token prediction; documents, weights and chosen experts change."""
    model = built(policy=policy, copies=narrow)
    tape = recorded(model)
    found = train(model, batches(8), narrow=narrow)
    expected = train(built(policy=policy, copies=narrow), batches(8), narrow=narrow)
    assert same(found, expected)
    assert tape.recordings == 1 + 2 * len(SPEC.layers) and tape.replays == 8 * tape.recordings


def test_adapters_are_trained_below_layers_without_any():
    """The embedding is frozen, so the stream has no gradient at first."""
    model = built(LORA)
    recorded(model)
    assert same(train(model, batches(6)), train(built(LORA), batches(6)))


def test_all_is_recorded_anew_for_more_documents_than_fit():
    """In the midst of a step; then there is room for them."""
    few, many = list(batches(5)), list(batches(4, mean=4))
    assert all(batch[3] <= 16 for batch in few) and all(16 < batch[3] <= 64 for batch in many)
    mixed = [few[0], many[0], few[1], many[1], few[2], many[2], few[3], many[3], few[4]]
    model = built()
    tape = recorded(model)
    assert same(train(model, mixed, micro_batches=3), train(built(), mixed, micro_batches=3))
    assert tape.recordings <= 3 * (1 + 2 * len(SPEC.layers))


def test_another_shape_is_recorded_anew_in_the_midst_of_a_step():
    mixed = [*batches(3), *batches(2, length=96), *batches(1)]
    model = built()
    tape = recorded(model)
    assert same(train(model, mixed, micro_batches=3), train(built(), mixed, micro_batches=3))
    assert tape.recordings == 3 * (1 + 2 * len(SPEC.layers))


def test_weights_that_have_moved_are_recorded_anew():
    model, other = built(), built()
    tape = recorded(model)
    for each in (model, other):
        train(each, batches(2))
        moved = each.layers[0][0].mixer.out_proj.weight
        moved.data = moved.data * 2
    assert same(train(model, batches(2)), train(other, batches(2)))
    assert tape.recordings == 2 * (1 + 2 * len(SPEC.layers))


def test_what_cannot_be_recorded_is_told_once_and_the_layers_are_called(monkeypatch: pytest.MonkeyPatch):
    model, told = built(), []
    model.graphs = LayerGraphs(model, told.append, lambda device: Tape())
    plain = graphs.Documents.__init__

    def asks(documents: Any, *args: Any, **kwargs: Any) -> None:
        plain(documents, *args, **kwargs)
        documents._any = False  # the attention then looks at what the documents are

    monkeypatch.setattr(graphs.Documents, "__init__", asks)
    assert same(train(model, batches(4)), train(built(), batches(4)))
    assert len(told) == 1 and told[0].startswith("operation not permitted when stream is capturing: aten")


def test_what_has_no_gradient_calls_the_layers():
    model = built()
    tape = recorded(model)
    batch = next(batches(1))
    with torch.no_grad():
        model(*batch)
    model.eval()
    model(*batch)
    model.train()
    model(*batch[:3])  # nobody has counted the documents
    assert not tape.recordings


@pytest.mark.gpu
@pytest.mark.parametrize("policy", ["none", "selective", "full"])
def test_cuda_graphs_are_those_steps_on_a_gpu(policy: str):
    """Real recordings; made three times, as documents grow in number and rows in length."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    given = [*batches(4), *batches(4, mean=4), *batches(4, length=128)]
    on_gpu = [(*(tensor.cuda() for tensor in batch[:3]), batch[3]) for batch in given]

    def steps(recording: bool) -> list[list[Tensor]]:
        model = build_model(SPEC, seed=0, device="cuda", dtype=torch.bfloat16)
        set_policy(model, policy)
        names = {parameter.name for parameter in parameters(SPEC) if parameter.per_expert}
        model.keep_copies(names, names)
        model.graphs = LayerGraphs(model, failed) if recording else None
        return train(model, on_gpu, narrow=True)

    for mine, right in zip(steps(True), steps(False), strict=True):
        for found, expected in zip(mine, right, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_a_stale_weight_would_be_seen():
    """The test of the test: a cast that is not part of the recording."""
    model, narrow = built(copies=True), True
    recorded(model)
    moe = model.moe_sublayers()[0]
    run = moe.run_experts

    def stale(x_SD: Tensor, first: Tensor, *rest: Any, **more: Any) -> Tensor:
        moe.cast = getattr(moe, "cast", None) or (first.detach().clone(),)
        return run(x_SD, moe.cast[0] + 0 * first, *rest, **more)

    moe.run_experts = stale
    moe.product_adds = False
    assert not same(train(model, batches(4), narrow=narrow), train(built(copies=True), batches(4), narrow=narrow))


@pytest.mark.parametrize("symbols", ["ME", "N", "*-"])
@pytest.mark.parametrize("dtype", ["fp32", "fp8"])
def test_each_kind_of_layer_is_compared_before_it_is_taken(symbols: str, dtype: str, micro_data: Path, tmp_path: Path):
    """FP8 with a history, whose scales and statistics are in place, too."""
    fp8 = {"recipe": "delayed", "implementation": "emulated", "bf16_end_layers": 0}
    precision = {"dtype": dtype, **({"fp8": fp8} if dtype == "fp8" else {})}
    spec = micro.micro_spec(micro_data, tmp_path, model={"layers": ["ME", "N", "*-"]}, precision=precision)
    model, kind, chosen = alone(spec, symbols)
    assert kind.converted == (dtype == "fp8")
    tape = Tape()
    assert graphed.problem(model, kind, spec, chosen, lambda device: tape) is None
    assert tape.replays == 6  # of three recordings, twice


def test_recordings_that_miss_something_are_named(micro_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    spec = micro.micro_spec(micro_data, tmp_path, model={"layers": ["*-"], "engram": []})

    def found() -> str | None:
        model, kind, chosen = alone(spec, "*-")
        return graphed.problem(model, kind, spec, chosen, lambda device: Tape())

    with monkeypatch.context() as broken:
        broken.setattr(graphs._Set, "begun", lambda self, *_: (self._documents, self._layers))
        assert "layer *- recorded computes something else: " in found()
    with monkeypatch.context() as broken:
        broken.setattr(torch.Tensor, "add_", lambda total, _: total)
        assert "layer *- recorded computes something else: the gradient of " in found()
    with monkeypatch.context() as broken:
        broken.setattr(graphs.Documents, "prepare", lambda documents, *_, **__: documents.seq_idx_BT.max().item())
        assert found().startswith("layer *- cannot be recorded (operation not permitted when stream is capturing: aten")


def prepared(spec: TrainSpec) -> tuple[Mesh, Precision, dict[str, ops.Choice]]:
    chosen = precision.resolve(spec.precision, None)
    choices = ops.resolve(spec.backends, "cpu", chosen.autocast_dtype or torch.float32, spec.model)
    return Mesh(Layout(), torch.device("cpu")), chosen, choices


def alone(spec: TrainSpec, symbols: str) -> tuple[HybridModel, compiled.Kind, Precision]:
    mesh, chosen, choices = prepared(spec)
    (kind,) = (each for each in compiled.kinds(spec.model, chosen) if each.symbols == symbols)
    return compiled.build(kind, spec, torch.device("cpu"), mesh, chosen, choices), kind, chosen


def world_of(size: int, device: str) -> World:
    return World(0, size, 0, size, torch.device(device), None, None)  # type: ignore[arg-type]


def test_a_run_learns_as_without(micro_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any):
    """All of the loop: Muon, clipping, router biases, Engram, and BF16."""
    monkeypatch.setattr(graphed, "why_not", lambda world, chosen, policy: None)
    tapes: list[Tape] = []
    monkeypatch.setattr(graphs, "CudaRecorder", lambda device: tapes.append(Tape()) or tapes[-1])

    def losses(name: str, wanted: Any) -> list[float]:
        changes = {"model": {"layers": ["ME", "N", "*-", "*E"]}, "precision": {"dtype": "bf16"}}
        spec = micro.micro_spec(micro_data, tmp_path / name, steps=4, runtime={"graphs": wanted}, **changes)
        assert loop.train(spec) == 0
        return [line["loss"] for line in micro.metrics(spec)]

    with caplog.at_level(logging.INFO):
        found = losses("graphs", True)
    assert "layers are launched as CUDA graphs; ME, N, *-, *E computed as without" in caplog.text
    assert found == losses("layers", False) and tapes[-1].replays >= 4 * tapes[-1].recordings


def test_where_graphs_are_not_possible(micro_data: Path, tmp_path: Path):
    spec = micro.micro_spec(micro_data, tmp_path)
    mesh, chosen, choices = prepared(spec)
    assert spec.runtime.graphs == "auto"
    assert not graphed.demanded(spec, world_of(1, "cpu"), mesh, chosen, choices, compiles=False)
    spec = spec.updated({"runtime": {"graphs": True}})
    with pytest.raises(SpecError, match=r"train\.runtime\.graphs: they need a GPU; write false, or auto to use"):
        graphed.demanded(spec, world_of(1, "cpu"), mesh, chosen, choices, compiles=False)
    assert "ranks wait for each other's gradients" in graphed.why_not(world_of(2, "cuda:0"), chosen, "none")
    assert graphed.why_not(world_of(1, "cuda:0"), chosen, "none") is None
    assert "groups of layers are recomputed" in graphed.why_not(world_of(1, "cuda:0"), chosen, "sqrt")
    te = dataclasses.replace(chosen, fp8=Fp8Spec(implementation="te"))
    assert "Transformer Engine" in graphed.why_not(world_of(1, "cuda:0"), te, "none")


def test_a_want_of_memory_for_all_layers_ends_or_is_told(micro_data: Path, tmp_path: Path, caplog: Any):
    spec = micro.micro_spec(micro_data, tmp_path)
    without_graphs(spec, "CUDA out of memory")
    assert "kernel by kernel from here on, not as CUDA graphs: CUDA out of memory" in caplog.text
    with pytest.raises(SpecError, match=r"cannot be recorded \(CUDA out of memory\); write auto or false"):
        without_graphs(spec.updated({"runtime": {"graphs": True}}), "CUDA out of memory")


def test_a_stream_is_given_back_when_a_recording_fails(monkeypatch: pytest.MonkeyPatch):
    """torch.cuda.graph leaves its own as the current one if the recording cannot be ended."""
    now, begun = ["main"], []

    class Recording:
        def __init__(self, graph: Any, *, pool: Any, stream: Any, capture_error_mode: str) -> None:
            begun.append((pool, stream, capture_error_mode))

        def __enter__(self) -> None:
            now[0] = "own"

        def __exit__(self, *_: object) -> None:
            raise RuntimeError("capture failed")

    for name, value in (
        ("Stream", lambda device: "own"),
        ("graph_pool_handle", lambda: (0, 1)),
        ("CUDAGraph", lambda: None),
        ("current_stream", lambda device: now[0]),
        ("set_stream", lambda stream: now.__setitem__(0, stream)),
        ("graph", Recording),
    ):
        monkeypatch.setattr(torch.cuda, name, value)
    with pytest.raises(RuntimeError, match="capture failed"):
        graphs.CudaRecorder(torch.device("cuda")).record(lambda: None)
    assert now == ["main"] and begun == [((0, 1), "own", "thread_local")]
