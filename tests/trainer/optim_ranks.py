"""A process of test_optim_distributed.py: train the same parameters alone and with the other ranks."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from named import EXPECTED, MODEL, Named
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from trainer.optim import Optimizers, build_optimizers, clip_gradients, muon
from trainer.optim.exchange import Exchange, Trip
from trainer.spec import OptimizerSpec

if "MARGINS" in os.environ:  # tests/margins.py
    sys.path.append(str(Path(__file__).parents[1]))
    import bounds  # noqa: F401  it watches comparisons

STEPS = 3
# Layers 1 and 3 are attention: TEON joins them. Some first dimensions (3, 44, 2) divide by no number of ranks.
DEEP = MODEL.updated({"layers": [*MODEL.layers, "*"]})
SHAPES = {name: expected[0] for name, expected in EXPECTED.items()}
SHAPES |= {name.replace("layers.1.0", "layers.3.0"): shape for name, shape in SHAPES.items() if "layers.1.0" in name}


def spec(**changes) -> OptimizerSpec:
    return OptimizerSpec.model_validate({"muon": {"learning_rate": 0.02}, "adamw": {"learning_rate": 0.01}, **changes})


def gradients(step: int) -> dict[str, torch.Tensor]:
    """After the first step some blocks have no gradient, which ranks with only parts of them must detect together."""
    generator = torch.Generator().manual_seed(step)
    found = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    found["layers.0.0.mixer.zxbc_proj.weight"] *= 1e-30
    if step:
        found["layers.0.1.mixer.up_EFD"][2] = 0
        found["layers.0.0.mixer.out_proj.weight"][:] = 0
        found["layers.1.0.mixer.q_proj.weight"][4:12] = 0  # two heads; of stacks, where layer 3 is joined with 1
        found["layers.1.1.mixer.down.weight"][:12] = 0  # no whole block, but all that the first ranks have
    return found


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def train(network: Named, optimizers: Optimizers) -> list[float]:
    """Norms of the clipped steps."""
    norms = []
    for step in range(STEPS):
        for name, gradient in gradients(step).items():
            parameter = network.get_parameter(name)
            if isinstance(parameter, DTensor):
                gradient = distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
            parameter.grad = gradient
        norms.append(clip_gradients(optimizers.parameters, 1.0)[0].item())
        optimizers.step()
    return norms


class Counter:
    """Replaces the orthogonalisation and counts matrices by shape."""

    def __init__(self) -> None:
        self.original: Callable = muon.orthogonalise_
        self.matrices = 0

    def __call__(self, x_Nmn: torch.Tensor, *arguments) -> torch.Tensor:
        self.matrices += x_Nmn.shape[0]
        return self.original(x_Nmn, *arguments)


def case(layout: str, options: dict, mesh: DeviceMesh, directory: Path) -> None:
    alone = Named(SHAPES)
    reference = build_optimizers(alone, spec(**options), DEEP)
    counter = muon.orthogonalise_ = Counter()
    expected_norms = train(alone, reference)
    expected_matrices, counter.matrices = counter.matrices, 0

    together = Named(SHAPES)
    if layout == "fsdp":
        fully_shard(together, mesh=mesh)
    optimizers = build_optimizers(together, spec(**options), DEEP, share_over=mesh if layout == "shared" else None)
    norms = train(together, optimizers)
    muon.orthogonalise_ = counter.original

    matrices = torch.tensor(counter.matrices)
    dist.all_reduce(matrices)
    assert int(matrices) == expected_matrices, (int(matrices), expected_matrices)
    torch.testing.assert_close(norms, expected_norms, rtol=1e-6, atol=0)
    tolerance = 2e-6 if options.get("state_dtype") != "bf16" else 1e-5  # weights reach 4, whose last digit is 5e-7
    for name, parameter in alone.named_parameters():
        torch.testing.assert_close(full(together.get_parameter(name)), parameter, rtol=0, atol=tolerance, msg=name)

    own = torch.tensor(sum(t.to_local().numel() for t in optimizers.state_dict().values() if isinstance(t, DTensor)))
    dist.all_reduce(own)
    everything = sum(tensor.numel() for tensor in reference.state_dict().values() if tensor.dim())
    assert int(own) == everything, "momentum and moments exist once"

    # Saved by all ranks, loaded by a single rank, and by all ranks into another layout.
    path = directory / f"{layout}-{'-'.join(map(str, options)) or 'plain'}-{dist.get_world_size()}"
    dcp.save(optimizers.state_dict(), checkpoint_id=path)
    for other in (build_optimizers(Named(SHAPES), spec(**options), DEEP, share_over=over) for over in (None, mesh)):
        state = other.state_dict()
        dcp.load(state, checkpoint_id=path)
        for key, value in reference.state_dict().items():
            torch.testing.assert_close(full(state[key]), value, rtol=1e-2 if tolerance > 2e-6 else 0, atol=tolerance)


class Serial(muon._Travelling):
    """One exchange after the other, each trip awaited where it is started."""

    def finish(self) -> None:
        for number, exchange in enumerate(self._exchanges):
            received = (self._send(number) if number else self._outward).arrived()
            updates = exchange.matrices(received, self._like, self._orthogonalise_)
            self._apply(exchange, exchange.to_holders(updates, self._like))


def overlapped(mesh: DeviceMesh) -> None:
    """The updates of several exchanges, bit for bit those of one after the other; and what was under way when."""
    found, events = [], []
    start, arrived, matrices = Exchange._move, Trip.arrived, Exchange.matrices
    spies = {
        (Exchange, "_move"): lambda *args, **kwargs: (events.append("start"), start(*args, **kwargs))[1],
        (Trip, "arrived"): lambda trip: (events.append("arrived"), arrived(trip))[1],
        (Exchange, "matrices"): lambda *args: (events.append("work"), matrices(*args))[1],
    }
    for travelling in (Serial, muon._Travelling):
        network = Named(SHAPES)
        events.clear()
        with ExitStack() as patched:
            patched.enter_context(patch.object(muon, "MAX_BATCH_ELEMENTS", 1))
            patched.enter_context(patch.object(muon, "_Travelling", travelling))
            for (owner, name), spy in spies.items():
                patched.enter_context(patch.object(owner, name, spy))
            optimizers = build_optimizers(network, spec(), DEEP, share_over=mesh)
            train(network, optimizers)
            most = max((work.exchanges for work in optimizers.members["muon"]._work), key=len)
            assert len(most) > 2
        found.append([*network.parameters(), *(full(value) for value in optimizers.state_dict().values())])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
    flying, at_work = 0, []
    for event in events:
        flying += {"start": 1, "arrived": -1, "work": 0}[event]
        at_work += [flying] * (event == "work")
        assert flying <= 2
    pipeline = [1, *[2] * (len(most) - 2), 1]
    assert any(at_work[first : first + len(most)] == pipeline for first in range(len(at_work))), at_work


def main() -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("data",))
    teon = {"muon": {"learning_rate": 0.02, "teon_layers": 2}}
    for layout in ("shared", "fsdp"):
        for options in ({}, teon, {"state_dtype": "bf16"}):
            case(layout, options, mesh, Path(sys.argv[1]))
    overlapped(mesh)
    dist.barrier()
    dist.destroy_process_group()
    print(f"rank {os.environ['RANK']} done")
