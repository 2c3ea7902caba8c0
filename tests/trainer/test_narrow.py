"""Copies of expert weights in the dtype of products: made once for each optimizer step, never stale."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from manifests.spec import load_job
from trainer import compiled
from trainer.arithmetic.memory import step_memory
from trainer.model.compiling import compile_layers
from trainer.model.hybrid import HybridModel, build_model
from trainer.modelspec import ModelSpec
from trainer.ops.narrow import Copy, in_place_of
from trainer.optim import build_optimizers, clip_gradients
from trainer.optim.shares import Share
from trainer.parallel.layout import Layout
from trainer.parallel.mesh import keep_copies
from trainer.parameters import head, parameters
from trainer.recomputing import set_policy
from trainer.spec import BackendsSpec, OptimizerSpec

SPEC = ModelSpec(
    vocab_size=96,
    hidden=32,
    layers=["E", "-E"],
    moe={"num_experts": 4, "top_k": 2, "expert_width": 32},
    mlp={"width": 32},
    mtp={"depth": 1, "layer": "E"},
)
STACKS = 2 * 3  # of two layers and the module of multi-token prediction


@pytest.fixture
def casts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The stacks that were cast, as they are."""
    found: list[str] = []
    copy_, names = Tensor.copy_, {}
    refresh = Copy.refresh

    def noted(self: Copy, dtype: torch.dtype) -> None:
        names["now"] = self._name
        refresh(self, dtype)
        names.pop("now")

    def counted(self: Tensor, source: Tensor, *options: bool) -> Tensor:
        if "now" in names and (self.dtype, source.dtype) == (torch.bfloat16, torch.float32):
            found.append(names["now"])
        return copy_(self, source, *options)

    monkeypatch.setattr(Copy, "refresh", noted)
    monkeypatch.setattr(Tensor, "copy_", counted)
    return found


def made(*, copies: bool, adding: bool = False, seed: int = 0) -> HybridModel:
    # The reference multiplies in BF16 and so returns BF16 gradients, as grouped products of a GPU do.
    model = build_model(SPEC, BackendsSpec(experts="reference"), seed=seed)
    if copies:
        names = {p.name for p in parameters(SPEC) if Layout().copied(p)}
        model.keep_copies(names, names if adding else ())
    return model


def batch(number: int) -> tuple[Tensor, Tensor, Tensor]:
    ids_BT = torch.randint(0, SPEC.vocab_size, (2, 16), generator=torch.Generator().manual_seed(number))
    return ids_BT, torch.zeros_like(ids_BT, dtype=torch.int32), ids_BT.roll(-1, dims=1)


def run(model: nn.Module, number: int, *, backward: bool = True) -> float:
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.set_grad_enabled(backward):
        output = model(*batch(number))
    loss = output.ce_sum + output.aux_sum + output.mtp_ce_sum_K.sum()
    if backward:
        loss.backward()
    return loss.item()


@pytest.mark.parametrize("adding", [False, True])
@pytest.mark.parametrize("policy", ["none", "selective", "full"])
def test_steps_are_those_without_copies(policy: str, adding: bool, casts: list[str]) -> None:
    """Bit for bit, as a copy is the cast, and a sum that of the same numbers; and one cast for each weight and step."""
    models = [made(copies=False), made(copies=True, adding=adding)]
    losses: list[list[float]] = [[], []]
    for model, seen in zip(models, losses, strict=True):
        set_policy(model, policy)
        optimizers = build_optimizers(model, OptimizerSpec(), SPEC)
        for step in range(3):
            casts.clear()
            seen += [run(model, 3 * step + number) for number in range(3)]
            assert len(casts) == (STACKS if model is models[1] else 0)
            if step < 2:
                clip_gradients(optimizers.parameters, 1.0)
                optimizers.step()
                optimizers.zero_grad()
    assert losses[0] == losses[1]
    for (name, plain), other in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.equal(plain, other) and torch.equal(plain.grad, other.grad), name


def test_the_optimizer_says_what_torch_has_not_seen() -> None:
    """Collectives and kernels write past torch; after a step every copy counts as stale."""
    model = made(copies=True)
    optimizers = build_optimizers(model, OptimizerSpec(), SPEC)
    run(model, 0)
    before = {name: parameter._version for name, parameter in model.named_parameters()}
    for member in optimizers.members.values():
        member.step = lambda **_: None
    optimizers.step()
    assert all(parameter._version > before[name] for name, parameter in model.named_parameters())


def written_by_init(model: HybridModel) -> None:
    model.init_weights(5, None)


def written_by_load(model: HybridModel) -> None:
    model.load_state_dict(made(copies=False, seed=5).state_dict())


def written_through_state(model: HybridModel) -> None:
    """As torch.distributed.checkpoint does."""
    for key, value in made(copies=False, seed=5).state_dict().items():
        model.state_dict()[key].copy_(value)


def swapped(model: HybridModel) -> None:
    for parameter, other in zip(model.parameters(), made(copies=False, seed=5).parameters(), strict=True):
        parameter.data = other.detach().clone()


def replaced(model: HybridModel) -> None:
    for name, parameter in made(copies=False, seed=5).named_parameters():
        place, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(place), leaf, nn.Parameter(parameter.detach().clone()))


def replaced_over_the_same_memory(model: HybridModel) -> None:
    """Only that it is another parameter tells that the memory has been written, as numpy counts nothing."""
    for name, parameter in made(copies=False, seed=5).named_parameters():
        place, _, leaf = name.rpartition(".")
        module = model.get_submodule(place)
        memory = getattr(module, leaf).detach()
        memory.numpy()[...] = parameter.detach().numpy()
        setattr(module, leaf, nn.Parameter(memory))
        while (version := getattr(module, leaf)._version) < memory._version:
            torch.autograd.graph.increment_version(getattr(module, leaf))
        assert version == memory._version


@pytest.mark.parametrize(
    "write",
    [written_by_init, written_by_load, written_through_state, swapped, replaced, replaced_over_the_same_memory],
)
def test_a_copy_is_made_again_when_the_weight_is_another(
    write: Callable[[HybridModel], None], casts: list[str]
) -> None:
    model = made(copies=True)
    run(model, 0, backward=False)
    with torch.inference_mode():
        run(model, 1, backward=False)
    assert len(casts) == STACKS
    with torch.no_grad():
        write(model)
    assert run(model, 1) == run(made(copies=False, seed=5), 1)
    assert len(casts) == 2 * STACKS


def test_what_inference_made_first_can_be_trained(casts: list[str]) -> None:
    model = made(copies=True)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        model(*batch(0))
    run(model, 0)
    assert len(casts) == STACKS


def test_without_autocast_weights_are_multiplied_as_they_are(casts: list[str]) -> None:
    model = made(copies=True)
    run(model, 0)
    found, expected = model(*batch(0)).ce_sum, made(copies=False)(*batch(0)).ce_sum
    assert torch.equal(found, expected) and len(casts) == STACKS


@pytest.mark.parametrize("adding", [False, True])
def test_compiled_layers_read_the_copies(adding: bool, casts: list[str]) -> None:
    """In one graph, and the code stays when the weights change."""
    with compiled.leaving_nothing(torch.device("cpu")):
        model = build_model(SPEC, BackendsSpec(experts="grouped"), seed=0)
        plain = deepcopy(model)
        names = {p.name for p in parameters(SPEC)}
        for each in (model, plain):
            each.keep_copies(names, names if adding else ())
        compile_layers(model, whole=True, backend="aot_eager")
        for step in range(2):
            casts.clear()
            assert run(model, step) == pytest.approx(run(plain, step), rel=1e-3)
            for parameter, other in zip(model.parameters(), plain.parameters(), strict=True):
                torch.testing.assert_close(parameter.grad, other.grad, rtol=0.1, atol=1e-3)
            assert len(casts) == 2 * STACKS
            with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
                for each in (model, plain):
                    torch._foreach_add_(list(each.parameters()), 0.01)


@pytest.fixture
def second_of_two_ranks() -> Iterator[None]:
    dist.init_process_group("fake", rank=1, world_size=2, store=FakeStore())
    yield
    dist.destroy_process_group()


def test_a_copy_adds_every_gradient_and_keeps_none() -> None:
    plain, model = made(copies=False), made(copies=True, adding=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = [each(*batch(0)) for each in (plain, model)]
    for output in outputs:
        (output.ce_sum + output.mtp_ce_sum_K.sum()).backward(retain_graph=True)
        (output.ce_sum + output.mtp_ce_sum_K.sum()).backward()
    for (name, parameter), other in zip(plain.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(parameter.grad, other.grad) and other.grad.dtype == torch.float32, name
    copies = [copy for moe in model.moe_sublayers() for copy in moe.copies.values()]
    assert len(copies) == STACKS and all(copy.requires_grad and copy.grad is None for copy in copies)


def test_a_graph_contains_the_cast(casts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its replay asks for no version."""
    model = made(copies=True)
    run(model, 0)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    for captures in (False, True):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda captures=captures: captures)
        for copy in model.copies:
            copy.refresh(torch.bfloat16)
        assert len(casts) == (1 + captures) * STACKS


def test_frozen_experts_get_no_gradient() -> None:
    model = build_model(SPEC, BackendsSpec(experts="reference"), seed=0)
    frozen = [p for name, p in model.named_parameters() if "EFD" in name or "EDF" in name]
    for parameter in frozen:
        parameter.requires_grad_(False)
    names = {p.name for p in parameters(SPEC)}
    model.keep_copies(names, names)
    run(model, 0)
    assert len(frozen) == STACKS and all(parameter.grad is None for parameter in frozen)
    assert not any(copy.requires_grad for moe in model.moe_sublayers() for copy in moe.copies.values())


def test_which_copies_add() -> None:
    """Where nobody else waits for gradients: one rank, or experts that are split between ranks."""
    experts = {p.name for p in parameters(SPEC) if p.per_expert}
    for layout, copied, adding in (
        (Layout(), experts, experts),
        (Layout(world=2), experts, set()),
        (Layout(world=2, expert=2), experts, experts),
        (Layout(world=2, data="fsdp", shard=2), set(), set()),
        (Layout(world=2, data="fsdp", shard=2, expert=2), experts, experts),
        (Layout(data="fsdp"), set(), set()),
    ):
        model = build_model(SPEC, BackendsSpec(experts="reference"), device="meta", seed=None)
        model.keep_copies = lambda *names: found.extend(map(set, names))  # noqa: B023
        found: list[set[str]] = []
        keep_copies(model, layout, torch.device("cuda"), torch.bfloat16)
        assert found == [copied, adding], layout
        keep_copies(model, layout, torch.device("cuda"), None)
        keep_copies(model, layout, torch.device("cpu"), torch.bfloat16)
        assert len(found) == 2


@pytest.mark.usefixtures("second_of_two_ranks")
def test_of_cut_experts_a_rank_copies_its_own(casts: list[str]) -> None:
    """Whichever way their part is written: itself, as a DTensor, or past both, which has to be said."""
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("replica", "expert"))
    cut = DTensor.from_local(torch.randn(2, 4, 8), mesh, (Replicate(), Shard(0)), run_check=False)
    moe = nn.Module()
    moe.copies, moe.down_EDF = {}, nn.Parameter(cut)
    copy = Copy(moe, "down_EDF")

    def kept() -> Tensor:
        copy.refresh(torch.bfloat16)
        found: Tensor = moe.copies["down_EDF"]
        assert torch.equal(found, moe.down_EDF.to_local().bfloat16())
        return found

    first = kept()
    assert kept() is first and first.shape == (2, 4, 8) and len(casts) == 1
    with torch.no_grad():
        moe.down_EDF.to_local().add_(1)
        assert kept() is first and len(casts) == 2
        moe.state_dict()["down_EDF"].mul_(2)
        assert kept() is first and len(casts) == 3
        Share(moe.down_EDF).weight.add_(1)
        torch.autograd.graph.increment_version([moe.down_EDF])
        assert kept() is first and len(casts) == 4
    in_place_of(moe.down_EDF.to_local(), first).square().sum().backward()
    gradient = moe.down_EDF.grad
    assert gradient.placements == cut.placements and torch.equal(gradient.to_local(), 2 * first.float())
    moe.down_EDF.grad = None
    moe.copies.clear()
    (adding := Copy(moe, "down_EDF", adds=True)).refresh(torch.bfloat16)
    for times in (1, 2):
        in_place_of(moe.down_EDF.to_local(), moe.copies["down_EDF"]).square().sum().backward()
        gradient = moe.down_EDF.grad
        assert gradient.placements == cut.placements and gradient.shape == cut.shape
        assert torch.equal(gradient.to_local(), 2 * times * first.float())
    adding.refresh(torch.bfloat16)
    assert len(casts) == 5


def test_bytes_beside_products_are_those_of_the_arithmetic(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Casts of weights 12, or 6 a step; casts of gradients 6 and sums 12 but in the first micro-batch, or 10 and 6."""
    runs = {
        "cast in every pass": 12 + 6 + 12 * 2 / 3,
        "copies": 6 / 3 + 6 + 12 * 2 / 3,
        "copies that add": 6 / 3 + (6 + 2 * 10) / 3,
    }
    arguments = "--preset tiny --divide 2 --tokens 64 --micro-batches 3 --repeats 1"
    monkeypatch.setattr(sys, "argv", ["experts_step", *arguments.split()])
    runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "experts_step.py"), run_name="__main__")
    printed = capsys.readouterr().out
    for title, bytes_each in runs.items():
        assert f"{title:20} {bytes_each:5.1f} bytes a weight" in printed
    assert f"copies that add: bytes {runs['cast in every pass'] / runs['copies that add']:.2f}, time" in printed


def test_a_gpu_has_two_more_bytes_for_each_expert_weight() -> None:
    spec = load_job("tiny").train_spec()
    known = parameters(spec.model)
    experts = sum(p.count for p in known if p.per_expert)
    dense = sum(p.count for p in known if p.multiplies and not (p.per_expert or p.whole or p == head(spec.model)))
    assert step_memory(spec).copies == 2 * (experts + dense)
    cut = Layout(world=2, data="fsdp", shard=2, expert=2)
    assert step_memory(spec, cut).copies == experts
    assert step_memory(spec, Layout(world=2, data="fsdp", shard=2)).copies == 0
    assert step_memory(spec.updated({"precision": {"dtype": "fp32"}})).copies == 0
