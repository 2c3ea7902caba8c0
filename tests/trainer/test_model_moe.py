"""Router and balance of the experts against plain loops."""

import pytest
import torch
from bounds import below
from torch import nn

from trainer.kinds.moe import MoeSpec
from trainer.model.hybrid import build_model
from trainer.model.mixer import Mixed
from trainer.model.moe import Moe
from trainer.modelspec import ModelSpec
from trainer.ops import Documents
from trainer.ops.experts import experts_reference
from trainer.ops.router import router_torch

FUNCTIONS = {"experts": experts_reference, "router": router_torch}
SPEC = MoeSpec(
    num_experts=8, top_k=3, expert_width=16, score_scale=2.5, sequence_loss_weight=0.01, bias_update_rate=0.1
)
HIDDEN = 12


def made(spec: MoeSpec) -> Moe:
    return Moe(ModelSpec(vocab_size=16, hidden=HIDDEN, layers=["E"], moe=spec), spec, FUNCTIONS)


def mixed(moe: Moe, x_BTD: torch.Tensor) -> Mixed:
    return moe(x_BTD, nn.Identity(), torch.zeros(x_BTD.shape[:2]), Documents.one_per_row(*x_BTD.shape[:2]))


@pytest.fixture
def moe() -> Moe:
    torch.manual_seed(0)
    module = made(SPEC)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.5)
        module.bias_E.normal_(0, 0.3)
    return module


def test_output_equals_a_loop_over_tokens(moe):
    x_BTD = torch.randn(2, 9, HIDDEN)
    output = mixed(moe, x_BTD)
    load = [0] * 8
    for b in range(2):
        for t in range(9):
            x = x_BTD[b, t].double()
            scores = torch.sigmoid(moe.router.weight.double() @ x)
            chosen = sorted(range(8), key=lambda e, s=scores: -(s[e] + moe.bias_E[e]))[:3]
            total = sum(scores[e] for e in chosen)
            y = torch.zeros(HIDDEN, dtype=torch.float64)
            for e in chosen:
                load[e] += 1
                expert = moe.down_EDF[e].double() @ torch.relu(moe.up_EFD[e].double() @ x) ** 2
                y += 2.5 * scores[e] / total * expert
            torch.testing.assert_close(output.y_BTD[b, t].double(), y, atol=1e-4, rtol=1e-4)
    assert output.load_E.tolist() == load and output.load_E.dtype == torch.int64


def test_bias_decides_the_choice_but_not_the_weights(moe):
    moe.bias_E.zero_()
    moe.bias_E[5] = 10.0
    scores_SE, expert_SK, weight_SK, _ = moe.routed(moe.project(torch.randn(1, 50, HIDDEN))[1][0])
    assert (expert_SK == 5).any(-1).all()
    chosen_SK = scores_SE.gather(1, expert_SK)
    torch.testing.assert_close(weight_SK, 2.5 * chosen_SK / chosen_SK.sum(-1, keepdim=True))


def test_router_stays_fp32_under_autocast(moe):
    x_BTD = torch.randn(1, 50, HIDDEN)
    expected = moe.project(x_BTD)[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = moe.project(x_BTD)[1]
        weight_SK = moe.routed(found[0]).weight_SK
    assert found.dtype == weight_SK.dtype == torch.float32
    assert torch.equal(found, expected)


def test_sequence_loss_equals_the_paper_row_by_row(moe):
    scores_BTE = torch.rand(3, 10, 8)
    expected = 0.0
    for row in scores_BTE:
        for e in range(8):
            f = sum(float(e in token.topk(3).indices) for token in row) * 8 / (3 * 10)
            P = sum(float(token[e] / token.sum()) for token in row) / 10
            expected += SPEC.sequence_loss_weight * f * P
    torch.testing.assert_close(moe.sequence_loss(scores_BTE), torch.tensor(expected))


def test_sequence_loss_pushes_scores_towards_balance(moe):
    x_BTD = torch.randn(2, 40, HIDDEN)
    mixed(moe, x_BTD).aux_loss.backward()
    with torch.no_grad():
        before = mixed(moe, x_BTD).aux_loss.item()
        moe.router.weight -= 5.0 * moe.router.weight.grad
        assert mixed(moe, x_BTD).aux_loss.item() < before


def test_bias_update_lowers_the_busy_and_keeps_the_level(moe):
    before_E = moe.bias_E.clone()
    moe.update_bias(torch.tensor([100, 0, 0, 40, 40, 40, 40, 60]))  # the mean is 40
    delta_E = moe.bias_E - before_E
    signs = torch.tensor([-1.0, 1, 1, 0, 0, 0, 0, -1])
    torch.testing.assert_close(delta_E, 0.1 * (signs - signs.mean()))
    below(delta_E.sum().abs(), 1e-6)


def test_bias_alone_balances_a_skewed_router():
    torch.manual_seed(0)
    spec = SPEC.updated({"bias_update_rate": 0.02})
    moe = made(spec)
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.normal_(0, 0.3)
        moe.bias_E.zero_()
        moe.router.weight[:2] += 0.8
    x_BTD = torch.randn(1, 600, HIDDEN) + 0.3
    first = mixed(moe, x_BTD).load_E
    for _ in range(60):
        moe.update_bias(mixed(moe, x_BTD).load_E)
    last = mixed(moe, x_BTD).load_E
    mean = 600 * 3 / 8
    assert first.max() > 2 * mean and last.max() < 1.3 * mean


def test_model_updates_each_of_its_biases():
    model = build_model(
        ModelSpec(vocab_size=16, hidden=8, layers=["E", "E"], moe=SPEC.updated({"expert_width": 4})), seed=0
    )
    ids_BT = torch.randint(0, 16, (2, 12))
    load_LE = model(ids_BT, torch.zeros(2, 12, dtype=torch.int32)).expert_load_LE
    assert load_LE.shape == (2, 8) and load_LE.sum(1).tolist() == [72, 72]
    model.update_router_bias(load_LE)
    for moe, load_E in zip(model.moe_sublayers(), load_LE, strict=True):
        assert moe.bias_E[load_E.argmax()] < moe.bias_E[load_E.argmin()]
    assert {name for name in model.state_dict() if name.endswith("bias_E")} == {
        "layers.0.0.mixer.bias_E",
        "layers.1.0.mixer.bias_E",
    }
