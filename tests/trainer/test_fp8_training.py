"""Runs with FP8 products: they resume exactly, share scales between ranks, read other checkpoints, learn like BF16."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forked
import micro
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from bounds import below

from trainer import evaluate
from trainer.checkpoints import checkpoint
from trainer.checkpoints.checkpointer import load_model_weights
from trainer.checkpoints.index import Reader
from trainer.kinds.ngrams import token_classes
from trainer.loop import train
from trainer.model.hybrid import build_model
from trainer.spec import TrainSpec


@pytest.fixture(autouse=True)
def leave_no_traces() -> Iterator[None]:
    """Training changes threads, determinism and process group of its process."""
    logging.getLogger("torch.distributed.checkpoint").setLevel(logging.WARNING)
    logging.getLogger("c10d-NullHandler-dcp_logger").setLevel(logging.WARNING)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True
    leave()


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def fp8(recipe: str, **more: Any) -> dict[str, Any]:
    options = {"recipe": recipe, "implementation": "emulated", "bf16_end_layers": 0, "amax_history_steps": 3}
    return {"dtype": "fp8", "fp8": {**options, **more}}


def losses(spec: TrainSpec) -> list[float]:
    return [line["loss"] for line in micro.metrics(spec)]


def history(spec: TrainSpec, step: int) -> dict[str, torch.Tensor]:
    """The FP8 tensors in a checkpoint."""
    path = checkpoint.step_dir(spec.run_dir, step)
    found = {k: v for k, v in Reader(path).read_metadata().state_dict_metadata.items() if k.startswith("fp8.")}
    tensors = {key: torch.empty(entry.size, dtype=entry.properties.dtype) for key, entry in found.items()}
    if tensors:
        dcp.load(tensors, storage_reader=Reader(path), no_dist=True)
    return tensors


def test_a_resumed_run_repeats_an_undisturbed_one_bit_for_bit(micro_data: Path, tmp_path: Path):
    """With a history of 3 steps the scales of step 4 need amaxes from before the checkpoint of step 3."""
    every = {"checkpoint": {"every_steps": 3}, "steps": 5, "precision": fp8("delayed")}
    whole = micro.micro_spec(micro_data, tmp_path / "whole", **every)
    assert train(whole) == 0
    leave()
    first = micro.micro_spec(micro_data, tmp_path / "parts", **every)
    assert train(first) == 0
    leave()
    (tmp_path / "parts" / "checkpoints" / "LATEST").write_text("step-00000003")
    assert train(first) == 0
    assert losses(first) == losses(whole) and len(losses(whole)) == 5
    for key, value in history(whole, 5).items():
        assert torch.equal(value, history(first, 5)[key]), key
    state = history(whole, 5)
    assert state["fp8.steps"] == 5 and state["fp8.history_HN"].shape[0] == 3
    largest = torch.tensor([448, 448, 57344]).repeat(state["fp8.scale_N"].numel() // 3)
    assert torch.equal(state["fp8.scale_N"], largest / state["fp8.history_HN"].amax(0))


def test_checkpoints_pass_between_precisions(micro_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    spec = micro.micro_spec(
        micro_data, tmp_path / "run", steps=2, precision=fp8("delayed"), schedule={"name": "constant"}
    )
    assert train(spec) == 0
    assert history(spec, 2)
    model = build_model(spec.model, seed=9, token_classes=token_classes(micro_data / "tokenizer" / "tokenizer.json"))
    assert load_model_weights(checkpoint.step_dir(spec.run_dir, 2), model).step == 2
    assert evaluate.run(spec)["precision"] == "fp32", "on a CPU, without emulation"
    leave()
    plain: TrainSpec = spec.updated({"steps": 3, "precision": {"dtype": "bf16"}})
    assert train(plain) == 0
    assert not history(plain, 3)
    leave()
    back: TrainSpec = spec.updated({"steps": 4})
    with caplog.at_level(logging.WARNING, logger="trainer"):
        assert train(back) == 0
    assert "no amax history of this FP8 recipe and model; it is reset" in caplog.text
    assert history(back, 4)["fp8.steps"] == 1


def test_nothing_to_convert_is_one_clear_line(micro_data: Path, tmp_path: Path):
    spec = micro.micro_spec(micro_data, tmp_path / "run", precision=fp8("block128"))
    with pytest.raises(ValueError, match=r"no product of this model can be FP8 \(.*side 32 is not a multiple of 128"):
        train(spec)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["delayed", pytest.param("current", marks=pytest.mark.proof)])
def test_ranks_agree_on_the_scales(micro_data: Path, tmp_path: Path, recipe: str):
    """The same micro-batches on one rank and on two give the same amaxes; all ranks must know the largest."""
    runs = []
    for ranks in (1, 2):
        spec = micro.micro_spec(micro_data, tmp_path / str(ranks), steps=2, precision=fp8(recipe))
        forked.done(forked.train(spec, ranks))
        runs.append(spec)
    assert losses(runs[1]) == pytest.approx(losses(runs[0]), rel=1e-6)
    if recipe == "delayed":
        one, two = (history(spec, 2)["fp8.history_HN"][:2] for spec in runs)
        # DDP averages, so each of two ranks works on twice the loss, and gradients are twice as large.
        expected = one * torch.tensor([1, 1, 2]).repeat(one.shape[1] // 3)
        torch.testing.assert_close(two, expected, rtol=1e-3, atol=0)
        assert (two > 0).all()


WIDE = {
    "hidden": 128,
    "layers": ["ME", "N", "*-", "ME"],
    "mamba": {"num_heads": 4, "head_dim": 32, "d_state": 64, "chunk_size": 16},
    "attention": {"num_heads": 4, "num_kv_heads": 4, "head_dim": 32},
    "moe": {"num_experts": 4, "top_k": 2, "expert_width": 128},
    "mlp": {"width": 128},
    "engram": [{"layer": 1, "rows_per_head": 50, "width_per_order": 64, "num_heads": 2}],
}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_fp8_learns_as_bf16_does(micro_data: Path, tmp_path: Path):
    """Every product of every kind of layer in FP8, widths of 128: after 12 steps within 0.03 nats of BF16."""
    last = {}
    for name, precision in {
        "bf16": {"dtype": "bf16"},
        "delayed": fp8("delayed", amax_history_steps=8),
        "current": fp8("current"),
        "block128": fp8("block128"),
    }.items():
        spec = micro.micro_spec(micro_data, tmp_path / name, steps=12, model=WIDE, precision=precision)
        assert train(spec) == 0
        leave()
        run = losses(spec)
        last[name] = sum(run[-3:]) / 3
        assert last[name] < run[0] - 0.3
    print(json.dumps(last))
    for recipe in ("delayed", "current", "block128"):
        assert last[recipe] != last["bf16"]
        below(abs(last[recipe] - last["bf16"]), 0.03, last)
