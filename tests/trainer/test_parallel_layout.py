"""Meshes: which ones are valid, what each rank holds, and that computing this needs no PyTorch."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import micro
import pytest

from trainer.arithmetic.memory import choose_layout, refuse_too_large, training_memory
from trainer.modelspec import ModelSpec
from trainer.parallel.layout import Layout, resolve
from trainer.parameters import parameters
from trainer.spec import OptimizerSpec, ParallelSpec
from trainer.specbase import SpecError

MODEL = ModelSpec(
    vocab_size=64,
    hidden=16,
    layers=("M*", "E-"),
    mamba={"num_heads": 2, "head_dim": 8, "d_state": 8},
    attention={"num_heads": 2, "num_kv_heads": 1, "head_dim": 8},
    moe={"num_experts": 12, "top_k": 2, "expert_width": 8},
    mlp={"width": 24},
)
WITHOUT_EXPERTS = MODEL.updated({"layers": ["M*"], "moe": None})


@pytest.mark.parametrize(
    ("fields", "world", "node", "expected"),
    [
        ({}, 1, 1, "ddp=1x1,experts=1x1"),
        ({}, 4, 4, "ddp=4x1,experts=4x1"),
        ({"data": "fsdp"}, 1, 1, "ddp=1x1,experts=1x1"),
        ({"data": "fsdp"}, 16, 8, "fsdp=2x8,experts=16x1"),
        ({"data": "fsdp"}, 4, 1, "fsdp=1x4,experts=4x1"),
        ({"shard": 2}, 8, 8, "fsdp=4x2,experts=8x1"),
        ({"data": "fsdp", "expert": 4}, 16, 8, "fsdp=2x8,experts=4x4"),
        ({"expert": 4, "shard_optimizer": True}, 8, 8, "ddp=8x1,experts=2x4,optimizer=1x8"),
    ],
)
def test_mesh_of_a_spec(fields: dict[str, Any], world: int, node: int, expected: str):
    assert str(resolve(ParallelSpec(**fields), MODEL, world, node)) == expected


@pytest.mark.parametrize(
    ("fields", "model", "message"),
    [
        ({"expert": 3}, MODEL, r"train\.parallel\.expert 3 must divide the 8 ranks .* write one of 1, 2, 4$"),
        ({"expert": 8}, MODEL, r"train\.parallel\.expert 8 must divide .* the 12 experts; write one of 1, 2, 4$"),
        (
            {"expert": 2},
            WITHOUT_EXPERTS,
            r"train\.parallel\.expert 2: train\.model\.layers has no experts \(E\); write 1",
        ),
        ({"shard": 3}, MODEL, r"train\.parallel\.shard 3 does not divide the 8 ranks .* write one of 2, 4, 8$"),
        ({"data": "ddp", "shard": 2}, MODEL, r"train\.parallel\.shard is for fsdp.*remove shard"),
        ({"data": "fsdp", "shard_optimizer": True}, MODEL, r"train\.parallel\.shard_optimizer is for ddp.*remove one"),
    ],
)
def test_impossible_mesh_is_one_line_that_says_the_way_out(fields: dict[str, Any], model: ModelSpec, message: str):
    with pytest.raises(ValueError, match=message) as error:
        resolve(ParallelSpec(**fields), model, 8, 8)
    assert "\n" not in str(error.value)


def test_one_rank_shares_with_nobody():
    with pytest.raises(ValueError, match=r"train\.parallel\.shard 2 does not divide the 1 ranks .*; remove it$"):
        resolve(ParallelSpec(shard=2), MODEL, 1, 1)


def test_auto_shards_as_far_as_the_memory_demands():
    whole = training_memory(MODEL).total
    node = training_memory(MODEL, layout=Layout(16, "fsdp", 4)).total
    choose = [
        choose_layout(ParallelSpec(), MODEL, OptimizerSpec(), 16, 4, gpu_bytes)
        for gpu_bytes in (None, 2 * whole, 2 * whole - 1, 2 * node, 2 * node - 1)
    ]
    assert [layout.data for layout in choose] == ["ddp", "ddp", "fsdp", "fsdp", "fsdp"]
    assert [layout.shard for layout in choose] == [1, 1, 4, 4, 16]


@pytest.mark.parametrize("device", ["GPU", "CPU"])
def test_state_that_no_rank_can_hold_is_one_line_before_anything_is_built(monkeypatch, tmp_path, device):
    from trainer import agreement, prepare

    spec = micro.micro_spec(tmp_path, tmp_path / "run")
    spec = spec.updated({"runtime": {"preflight": {"enabled": False}}})
    needed = training_memory(spec.model, spec.optimizer).state
    refuse_too_large(spec, Layout(), needed)
    refuse_too_large(spec, Layout(), None)
    if device == "GPU":
        monkeypatch.setattr(agreement, "device_bytes", lambda _: needed - 1)
    else:
        monkeypatch.setattr(agreement, "device_bytes", lambda _: None)
        monkeypatch.setattr(agreement.hostmemory, "limit_bytes", lambda: 2 * needed - 1)  # two ranks share it
    world = SimpleNamespace(size=2, rank=0, local_size=2, device=None, gather=lambda value: [value, value])
    with pytest.raises(SpecError, match=r"weights, gradients and optimizer state take .* GiB .*smaller model$"):
        prepare.prepare(spec, world, 0.0)
    assert not (tmp_path / "run").exists()


def test_shares_add_up_to_the_whole():
    one = training_memory(MODEL)
    sharded = training_memory(MODEL, layout=Layout(8, "fsdp", 8))
    small = 4 * sum(p.count for p in parameters(MODEL) if len(p.shape) < 2 or re.search("router|conv", p.name))
    cut = (one.weights - small) / 8
    assert cut <= sharded.weights - small <= cut * 1.2, "small ones are whole, rows that 8 does not divide rounded up"
    assert sharded.gathered > 0 == one.gathered
    predicting = training_memory(MODEL.updated({"mtp": {"depth": 1, "layer": "*E"}}), layout=Layout(8, "fsdp", 8))
    own_of_module = 2 * 4 * (3 * MODEL.hidden + 2 * MODEL.hidden**2)
    assert predicting.gathered == sharded.gathered + own_of_module, "its layer is cut like any other"
    experts = 4 * math.prod((12, 8, 16)) * 2  # up and down, FP32
    by_expert = training_memory(MODEL, layout=Layout(8, expert=4))
    assert by_expert.weights == one.weights - experts * 3 // 4
    assert training_memory(MODEL, layout=Layout(8, shard_optimizer=True)).optimizer == math.ceil(one.optimizer / 8)


def test_meshes_need_no_pytorch():
    code = "import sys; sys.modules['torch'] = None; import trainer.parallel.layout, trainer.arithmetic.memory"
    subprocess.run([sys.executable, "-c", code], check=True)
