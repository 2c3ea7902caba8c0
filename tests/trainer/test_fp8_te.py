"""Our side of Transformer Engine without the package; the package itself: tests/kernels/test_te_recipes.py."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from trainer.fp8 import te
from trainer.ops import packages
from trainer.runtimespec import RuntimeSpec
from trainer.spec import Fp8Spec


class Meta:
    """Replaces a recipe's state, with a history of two steps."""

    def __init__(self, values: list[float]) -> None:
        self.amax_history = torch.tensor([[0.0] * len(values), values])
        self.scale = torch.ones(len(values))


class Module:
    def __init__(self, forward: list[float], backward: list[float]) -> None:
        self.fp8_meta: dict = {}
        self.made = (Meta(forward), Meta(backward))

    def init_fp8_meta_tensors(self, recipe: object) -> None:
        assert self.fp8_meta["num_gemms"] == 1 and self.fp8_meta["recipe"] is recipe
        self.fp8_meta["scaling_fwd"], self.fp8_meta["scaling_bwd"] = self.made


def test_state_is_the_histories_and_scales_of_all_modules(monkeypatch):
    monkeypatch.setattr(te, "recipe", lambda fp8: "a recipe")
    modules = {"a.q_proj": Module([3, 1, 9], [0.5, 7]), "a.k_proj": Module([2, 4, 9], [0.25, 7])}
    state = te.TeState(modules, Fp8Spec(recipe="delayed"))
    tensors = state.state_dict()
    assert len(tensors) == 8 and tensors["a.k_proj.scaling_bwd.amax_history"].tolist() == [[0, 0], [0.25, 7]]
    assert tensors["a.q_proj.scaling_fwd.scale"] is modules["a.q_proj"].made[0].scale, "loading fills the module's own"
    assert state.figures() == ({"input": 3.0, "weight": 4.0, "gradient": 0.5}, 0.0)


def test_conversion_keeps_module_and_parameter(monkeypatch):
    """FSDP2 puts gathered weights into the module objects that it wrapped; another object would use sharded ones."""

    class Linear(nn.Module):
        def __init__(self, inputs: int, outputs: int, *, bias: bool, params_dtype: torch.dtype, device: str) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(outputs, inputs, dtype=params_dtype, device=device))

    monkeypatch.setattr(te, "package", lambda: SimpleNamespace(Linear=Linear))
    monkeypatch.setattr(te, "recipe", lambda fp8: "a recipe")
    model = nn.Sequential(nn.Linear(32, 16, bias=False), nn.Linear(16, 32, bias=False))
    modules, weights = list(model), list(model.parameters())
    te.convert(model, ["0.weight"], Fp8Spec(implementation="te", recipe="current"))
    assert [type(module) for module in model] == [Linear, nn.Linear]
    assert all(now is before for now, before in zip(model, modules, strict=True))
    assert all(now is before for now, before in zip(model.parameters(), weights, strict=True))
    assert list(model.state_dict()) == ["0.weight", "1.weight"]


def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setattr(packages, "load", lambda module: "transformer_engine is not installed")
    with pytest.raises(ValueError, match=r"implementation te: transformer_engine is not installed; write torch"):
        te.package()
    assert te.problem(Fp8Spec(), (9, 0)) == "transformer_engine is not installed"


@pytest.mark.parametrize(
    "runtime", [{"compile": True}, {"activation_checkpointing": "full"}, {"activation_checkpointing": "selective"}]
)
def test_delayed_scaling_refuses_compilation_and_recomputation(runtime):
    delayed = Fp8Spec(recipe="delayed", implementation="te")
    with pytest.raises(
        ValueError, match=rf"train\.runtime\.{next(iter(runtime))} does not go with delayed .*recipe current"
    ):
        te.check_runtime(delayed, RuntimeSpec(**runtime))
    te.check_runtime(delayed, RuntimeSpec())
    te.check_runtime(Fp8Spec(recipe="current", implementation="te"), RuntimeSpec(**runtime))
    with pytest.raises(ValueError, match=r"train\.runtime\.graphs does not go with Transformer Engine"):
        te.check_runtime(Fp8Spec(recipe="current", implementation="te"), RuntimeSpec(graphs=True))
    te.check_runtime(Fp8Spec(recipe="delayed", implementation="torch"), RuntimeSpec(**runtime))
