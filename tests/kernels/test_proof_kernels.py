"""Real kernels through the proof of a start: compared by the child in Triton's interpreter, taken, and trained with.

The interpreter is a device class of its own, here without committed records, so that it stands for a GPU that nobody
has had before.
"""

import os
from pathlib import Path

import pytest
import torch

from trainer import ops, parity
from trainer.distributed import World
from trainer.model.hybrid import build_model
from trainer.ops import OPS, Setting
from trainer.ops.check import launchable
from trainer.proof import start
from trainer.proof.prove import Limits
from trainer.spec import BackendsSpec, TrainSpec
from trainer.specbase import parse

pytestmark = pytest.mark.kernels

CPU = torch.device("cpu")
SPEC = {
    "run": "kernels",
    "steps": 2,
    "model": {
        "vocab_size": 64,
        "hidden": 32,
        "layers": ["ME", "N", "*"],
        "mamba": {"num_heads": 2, "head_dim": 16, "d_state": 16, "chunk_size": 16},
        "attention": {"num_heads": 2, "num_kv_heads": 1, "head_dim": 16},
        "moe": {"num_experts": 4, "top_k": 2, "expert_width": 32},
        "engram": [{"layer": 1, "rows_per_head": 50, "width_per_order": 16, "num_heads": 2}],
    },
    "tokens": {"shards": "unused", "tokenizer": "unused", "mix": {"en": {"weight": 1}}, "seq_len": 32},
    "batch": {"tokens_per_step": 32, "micro_batch_rows": 1},
    "checkpoint": {"every_steps": 2},
}
LIMITS = Limits(comparison_seconds=400, all_seconds=800)  # the interpreter is slow


def kernels() -> dict[str, str]:
    """By operation, its first kernel that runs in the interpreter."""
    setting = Setting(CPU)
    found = {}
    for op in OPS.values():
        for name, backend in op.backends.items():
            if not backend.portable and backend.unsupported(setting) is None:
                found.setdefault(op.name, name)
    return found


@pytest.fixture
def new_device_class(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton reads TRITON_INTERPRET=1 when it is imported")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(parity, "committed", lambda: ())
    yield
    parity.forget()


@pytest.mark.timeout(900)
def test_kernels_are_proven_taken_and_train_as_the_portable_backends(new_device_class, tmp_path: Path):
    wanted = kernels()
    if not wanted:
        pytest.skip("no kernel here runs in the interpreter")
    run = parse(TrainSpec, SPEC | {"run_dir": str(tmp_path / "run")})
    before = ops.resolve(BackendsSpec(), CPU)
    assert not any(before[op].proven for op in wanted)
    world = World(0, 1, 0, 1, CPU, None, None)  # type: ignore[arg-type]  # no process group for one rank
    (found,) = start.at_start(run, world, LIMITS).values()
    assert found.made >= len(wanted) and not found.problems and not found.wrong, (found.problems, found.wrong)
    after = ops.resolve(BackendsSpec(), CPU)
    assert {op: after[op].name for op in wanted} == wanted and all(choice.proven for choice in after.values())
    assert losses(run, after) == pytest.approx(losses(run, before), rel=1e-4)
    parity.forget()
    assert [proof.made for proof in start.at_start(run, world, LIMITS).values()] == [0]


def losses(run: TrainSpec, choices: dict[str, ops.Choice]) -> list[float]:
    """Of two steps of gradient descent."""
    classes = list(range(run.model.vocab_size))
    model = build_model(run.model, device=CPU, dtype=None, seed=1, token_classes=classes, choices=choices)
    generator = torch.Generator().manual_seed(3)
    ids_BT = torch.randint(0, run.model.vocab_size, (2, 32), generator=generator)
    seq_idx_BT = (torch.rand(2, 32, generator=generator) < 0.1).int().cumsum(1, dtype=torch.int32)
    found = []
    for _ in range(run.steps):
        with launchable(Setting(CPU)):
            output = model(ids_BT, seq_idx_BT, ids_BT.roll(-1, dims=1))
            loss = (output.ce_sum + output.aux_sum) / ids_BT.numel()
            loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad
                    parameter.grad = None
        found.append(loss.item())
    return found
