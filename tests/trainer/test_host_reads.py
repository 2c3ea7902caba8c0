"""A step is decided on the device: what the host reads of it and when, and that it decides as the host would."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

import micro
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from trainer import loop
from trainer.checkpoints import checkpoint
from trainer.checkpoints.checkpointer import load_model_weights
from trainer.data.loader import StepBatch
from trainer.kinds.ngrams import token_classes
from trainer.model import hybrid
from trainer.model.hybrid import build_model
from trainer.optim.optimizers import local
from trainer.outcome import Totals, Update
from trainer.prepare import Run
from trainer.recording.recorder import Recorder
from trainer.spec import TrainSpec
from trainer.spikes import SKIP_REASONS

pytestmark = pytest.mark.usefixtures("quiet_checkpoint_library", "leave_no_traces")

TEON = {"model": {"layers": ["ME", "N", "*-", "*E"]}, "optimizer": {"muon": {"teon_layers": 2}}}
METHODS = {"tolist", "item", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__array__"}
OPERATORS = {"_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "unique_dim"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}


class Reads:
    """What makes the host wait for a device: (phase, innermost of our files, operation), in order."""

    def __init__(self) -> None:
        self.phase = ""
        self.found: list[tuple[str, str, str]] = []

    def add(self, operation: str) -> None:
        frame = sys._getframe(1)
        while "/trainer/" not in frame.f_code.co_filename or "/tests/" in frame.f_code.co_filename:
            frame = frame.f_back
            if frame is None:
                return
        self.found.append((self.phase, frame.f_code.co_filename.rpartition("/trainer/")[2], operation))

    def __enter__(self) -> Reads:
        reads = self

        class Methods(TorchFunctionMode):
            def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                name = getattr(function, "__name__", "")
                if name in METHODS:
                    reads.add(name)
                return function(*args, **(kwargs or {}))

        class Operators(TorchDispatchMode):
            def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                name = function._schema.name.partition("::")[2]
                masks = name in INDEXING and any(i is not None and i.dtype == torch.bool for i in args[1])
                if name in OPERATORS or masks:
                    reads.add(name)
                return function(*args, **(kwargs or {}))

        self._modes = Methods(), Operators()
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(None, None, None)


@pytest.mark.parametrize("state_dtype", ["fp32", "bf16"])
def test_a_step_is_read_once_at_its_end(
    micro_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state_dtype: str
) -> None:
    """Experts, Engram, Muon, TEON and AdamW. Operations may read: on a CPU nothing waits there."""
    reads, plain, steps = Reads(), Recorder.phase, 3

    @contextmanager
    def phase(recorder: Recorder, name: str) -> Iterator[None]:
        reads.phase = name
        with plain(recorder, name):
            yield

    monkeypatch.setattr(Recorder, "phase", phase)
    spec = micro.micro_spec(micro_data, tmp_path / "run", steps=steps, checkpoint={"every_steps": 9}, **TEON)
    spec = spec.updated({"optimizer": {"state_dtype": state_dtype}})

    def of_steps() -> list[tuple[str, str, str]]:
        reads.phase = ""
        reads.found.clear()
        with reads:
            assert loop.train(spec) == 0
        by_operations = {read for read in reads.found if read[1].startswith("ops/")}
        assert {phase for phase, _, _ in by_operations} <= {"forward_backward"}
        return [read for read in reads.found if read[0] not in ("", "checkpoint") and read not in by_operations]

    assert of_steps() == [("device", "outcome.py", "tolist")] * steps
    spec = spec.updated({"run_dir": str(tmp_path / "former")})
    monkeypatch.setattr(loop, "apply_gradients", decided_by_the_host)
    assert ("optimizer", "loop.py", "item") in of_steps(), "else this would see none"


def decided_by_the_host(run: Run, step: int, batch: StepBatch, totals: Totals) -> Update:
    """The former loop: it read loss and norm, and called the optimizers only if the step was to be taken."""
    optimizers, clip = run.optimizers, run.spec.optimizer.clip_norm
    optimizers.set_learning_rate_factor(loop.rate_factor(run, step))
    loss = totals.sums[0].item() / batch.num_labels
    gradients = [local(p.grad) for p in optimizers.parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients).double().square().sqrt().item()
    clipped = norm > clip and norm != float("inf")
    if clipped:
        torch._foreach_mul_(gradients, clip / (norm + 1e-6))
    reason = None
    guard = run.spec.optimizer.spike_guard
    for name, value in (("gradient", norm), ("loss", loss)):
        recent = run.guard._recent[name]
        if len(recent) >= guard.window // 2 and value > mean(recent) + guard.sigmas * pstdev(recent):
            reason = f"{name}_spike"
    if not (abs(norm) < float("inf") and abs(loss) < float("inf")):
        reason = "nonfinite"
    if reason is None:
        optimizers.step()
        run.model.update_router_bias(totals.expert_load_LE)
    optimizers.zero_grad()
    number = SKIP_REASONS.index(reason) if reason else -1
    return Update(*(torch.tensor(value, dtype=torch.float64) for value in (norm, clipped, number)))


@pytest.mark.parametrize("state_dtype", ["fp32", "bf16"])
def test_steps_are_to_the_bit_those_that_the_host_decides(
    micro_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state_dtype: str
) -> None:
    """12 steps: some clipped, the seventh without finite gradients, the tenth a spike."""
    plain = hybrid.cross_entropy_sum

    def run(name: str) -> tuple[list[dict], TrainSpec]:
        calls: list[int] = []

        def sometimes_bad(*tensors: Tensor) -> Tensor:
            calls.append(1)
            return plain(*tensors) * {6: float("nan"), 9: 30.0}.get((len(calls) - 1) // 4, 1.0)

        monkeypatch.setattr(hybrid, "cross_entropy_sum", sometimes_bad)
        guard = {"window": 8, "sigmas": 3}
        optimizer = {**TEON["optimizer"], "spike_guard": guard, "clip_norm": 3.5, "state_dtype": state_dtype}
        spec = micro.micro_spec(micro_data, tmp_path / name, steps=12, **{**TEON, "optimizer": optimizer})
        assert loop.train(spec) == 0
        kept = ("step", "loss", "auxiliary", "grad_norm", "clipped", "skipped", "expert_load_max_ratio")
        return [{key: line[key] for key in kept} for line in micro.metrics(spec)], spec

    def weights(spec: TrainSpec) -> dict[str, Tensor]:
        model = build_model(spec.model, seed=3, token_classes=token_classes(micro_data / "tokenizer/tokenizer.json"))
        load_model_weights(checkpoint.step_dir(spec.run_dir, 12), model)
        return model.state_dict()

    lines, spec = run("device")
    with monkeypatch.context() as former:
        former.setattr(loop, "apply_gradients", decided_by_the_host)
        expected, other = run("host")
    assert lines == expected
    assert [line["skipped"] for line in lines] == [None] * 6 + ["nonfinite"] + [None] * 2 + ["loss_spike"] + [None] * 2
    assert {line["clipped"] for line in lines} == {True, False}
    found, wanted = weights(spec), weights(other)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("state_dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 7.0])
def test_a_skipped_step_leaves_weights_and_state(
    make_optimizers: Callable[..., Any], optimizer: str, state_dtype: str, bad: float
) -> None:
    optimizers = make_optimizers(optimizer, state_dtype)
    skip = torch.tensor(False)
    for step in range(3):
        for number, parameter in enumerate(optimizers.parameters):
            generator = torch.Generator().manual_seed(step * 1000 + number)
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            if step == 1:
                parameter.grad.flatten()[:3] = bad
        before = [t.clone() for t in (*optimizers.parameters, *optimizers.state_dict().values())]
        optimizers.step(skip | (step == 1))
        after = [*optimizers.parameters, *optimizers.state_dict().values()]
        same = [torch.equal(one, other) for one, other in zip(before, after, strict=True)]
        assert all(same) if step == 1 else not any(same)


@pytest.fixture
def make_optimizers() -> Callable[..., Any]:
    from named import EXPECTED, MODEL, Named

    from trainer.optim import build_optimizers
    from trainer.spec import OptimizerSpec

    def make(name: str, state_dtype: str) -> Any:
        network = Named({name: expected[0] for name, expected in EXPECTED.items()})
        spec = OptimizerSpec.model_validate({"name": name, "state_dtype": state_dtype})
        return build_optimizers(network, spec, MODEL)

    return make
