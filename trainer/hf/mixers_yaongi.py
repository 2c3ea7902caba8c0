"""The sublayers of a yaongi model in transformers: Mamba-2, experts, attention, MLP and Engram, with their states.

They compute what the trainer computes, in plain torch, for rows of one document. Norms, routing, rotations and the
state space are computed in FP32 for any dtype of the weights.

Legend: B rows, T new positions, S cached and new positions, D hidden, V vocabulary, H heads, K key/value heads or
chosen experts, G groups or rows of a first matrix, P and W widths of a head, I inner width, N width of a state or
orders of n-grams, J tables, C channels, E experts, F width between two matrices, R tokens, Q positions of a chunk.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:  # it needs transformers, and this file does not: trainer/onnxexport.py uses it without
    from .configuration_yaongi import YaongiConfig


class State(dict):
    """The state of one sublayer: tensors with rows as the first dimension. It is also a layer of transformers' Cache,
    which calls its methods."""

    is_compileable = is_croppable = supports_early_init = False

    def last(self, name: str, new_BTC: Tensor, length: int) -> Tensor:
        """The last `length` positions before the new ones (zeros before the first) and the new ones; keeps the last
        `length`."""
        before = self.get(name)
        if before is None:
            before = new_BTC.new_zeros(new_BTC.shape[0], length, *new_BTC.shape[2:])
        joined = torch.cat([before, new_BTC], dim=1)
        self[name] = joined[:, joined.shape[1] - length :]
        return joined

    def all(self, name: str, new_BTC: Tensor) -> Tensor:
        """All positions so far, including the new ones; keeps them."""
        self[name] = torch.cat([self[name], new_BTC], dim=1) if name in self else new_BTC
        return self[name]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.update({name: tensor.index_select(0, beam_idx.to(tensor.device)) for name, tensor in self.items()})

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.update({name: tensor.repeat_interleave(repeats, dim=0) for name, tensor in self.items()})

    def reset(self) -> None:
        self.clear()

    def crop(self, tokens_to_remove: int) -> None:
        raise NotImplementedError("states of Mamba-2 cannot be rolled back; start from an empty cache")


class Step(NamedTuple):
    """What all sublayers of a forward pass share.

    Attributes:
        keep_BT1: False at padding; None if there is no padding.
        allowed_B1TS: the positions that attention sees; None: all positions up to its own.
        turn_BT1W: cosine and sine of rotary positions; None without them.
    """

    ids_BT: Tensor
    keep_BT1: Tensor | None
    allowed_B1TS: Tensor | None
    turn_BT1W: tuple[Tensor, Tensor] | None

    def without_padding(self, x_BTC: Tensor) -> Tensor:
        return x_BTC if self.keep_BT1 is None else x_BTC.masked_fill(~self.keep_BT1, 0)


class RMSNorm(nn.Module):
    """With `num_groups`, each group of channels is normalised separately; with a gate, x · silu(gate) is normalised."""

    def __init__(self, width: int, eps: float, num_groups: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps, self.num_groups = eps, num_groups

    def forward(self, x_D: Tensor, gate_D: Tensor | None = None) -> Tensor:
        wide_D = x_D.float() if gate_D is None else F.silu(gate_D.float()) * x_D
        wide_GW = wide_D.unflatten(-1, (self.num_groups, -1))
        normed_GW = wide_GW * torch.rsqrt(wide_GW.square().mean(-1, keepdim=True) + self.eps)
        return (normed_GW.flatten(-2) * self.weight.float()).to(x_D.dtype)


class CausalConv(nn.Module):
    """Depthwise convolution: y[t] = bias + Σ_k w[K-1-k] · x[t - k·dilation]."""

    def __init__(self, channels: int, kernel: int, dilation: int = 1, *, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels, kernel))
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None
        self.dilation = dilation

    def forward(self, x_BTC: Tensor, state: State) -> Tensor:
        length, taps = x_BTC.shape[1], self.weight.shape[1]
        before_BSC = state.last("conv", x_BTC, (taps - 1) * self.dilation)
        w_CK = self.weight.to(x_BTC.dtype)
        y_BTC = torch.zeros_like(x_BTC) if self.bias is None else self.bias.to(x_BTC.dtype).expand_as(x_BTC)
        for tap in range(taps):
            first = tap * self.dilation
            y_BTC = y_BTC + before_BSC[:, first : first + length] * w_CK[:, tap]
        return y_BTC


def scan(
    x_BTHP: Tensor, dt_BTH: Tensor, A_H: Tensor, B_BTGN: Tensor, C_BTGN: Tensor, h_BHPN: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    """State-space duality (Dao & Gu 2024): h_t = exp(dt_t·A) h_{t-1} + dt_t B_t x_tᵀ, y_t = C_tᵀ h_t, in FP32.

    Computed chunk by chunk, each as a masked product. Also returns the state after the last position.
    """
    per_group = x_BTHP.shape[2] // B_BTGN.shape[2]
    outputs = []
    for x_BQHP, dt_BQH, B_BQGN, C_BQGN in zip(
        *(tensor.float().split(chunk, dim=1) for tensor in (x_BTHP, dt_BTH, B_BTGN, C_BTGN)), strict=True
    ):
        B_BQHN, C_BQHN = (tensor.repeat_interleave(per_group, dim=2) for tensor in (B_BQGN, C_BQGN))
        log_BHQ = (dt_BQH * A_H).transpose(1, 2)
        after_QQ = torch.ones(x_BQHP.shape[1], x_BQHP.shape[1], dtype=torch.bool, device=x_BQHP.device).tril(-1)
        # For each i and j: the sum over j < k ≤ i, summed separately, because differences of long sums lose precision.
        log_BHQQ = torch.where(after_QQ, log_BHQ[..., None], 0).cumsum(-2).masked_fill(after_QQ.T, -math.inf)
        from_start_BQH1 = log_BHQ.cumsum(-1).exp().transpose(1, 2)[..., None]
        dtx_BQHP = dt_BQH[..., None] * x_BQHP
        mix_BHQQ = torch.einsum("bihn,bjhn->bhij", C_BQHN, B_BQHN) * log_BHQQ.exp()
        y_BQHP = torch.einsum("bhij,bjhp->bihp", mix_BHQQ, dtx_BQHP)
        outputs.append(y_BQHP + torch.einsum("bihn,bhpn->bihp", C_BQHN, h_BHPN) * from_start_BQH1)
        to_end_BQH1 = log_BHQQ[..., -1, :].exp().transpose(1, 2)[..., None]
        added_BHPN = torch.einsum("bjhp,bjhn->bhpn", dtx_BQHP * to_end_BQH1, B_BQHN)
        h_BHPN = h_BHPN * from_start_BQH1[:, -1, :, :, None] + added_BHPN
    return torch.cat(outputs, dim=1), h_BHPN


class Mamba2(nn.Module):
    def __init__(self, config: YaongiConfig, spec: dict) -> None:
        super().__init__()
        self.heads, self.groups, self.chunk = spec["num_heads"], spec["num_groups"], spec["chunk_size"]
        inner = self.heads * spec["head_dim"]
        self.widths = (inner, self.groups * spec["d_state"], self.groups * spec["d_state"])  # x, B, C
        self.zxbc_proj = nn.Linear(config.hidden_size, inner + sum(self.widths), bias=False)
        self.dt_proj = nn.Linear(config.hidden_size, self.heads, bias=False)
        self.conv = CausalConv(sum(self.widths), spec["conv_kernel"], bias=True)
        self.A_log = nn.Parameter(torch.zeros(self.heads))
        self.D = nn.Parameter(torch.ones(self.heads))
        self.dt_bias = nn.Parameter(torch.zeros(self.heads))
        self.norm = RMSNorm(inner, config.norm_eps, self.groups)
        self.out_proj = nn.Linear(inner, config.hidden_size, bias=False)

    def forward(self, x_BTD: Tensor, step: Step, state: State) -> Tensor:
        z_BTI, xBC_BTC = self.zxbc_proj(x_BTD).split([self.widths[0], sum(self.widths)], dim=-1)
        # At padding the time step is 0, which leaves the state unchanged.
        dt_BTH = step.without_padding(F.softplus(self.dt_proj(x_BTD).float() + self.dt_bias.float()))
        xBC_BTC = F.silu(self.conv(step.without_padding(xBC_BTC), state))
        x_BTI, B_BTS, C_BTS = xBC_BTC.split(self.widths, dim=-1)
        x_BTHP = x_BTI.unflatten(-1, (self.heads, -1))
        B_BTGN, C_BTGN = (tensor.unflatten(-1, (self.groups, -1)) for tensor in (B_BTS, C_BTS))
        h_BHPN = state.get("ssm")
        if h_BHPN is None:
            h_BHPN = dt_BTH.new_zeros(x_BTD.shape[0], self.heads, x_BTHP.shape[-1], B_BTGN.shape[-1])
        y_BTHP, state["ssm"] = scan(x_BTHP, dt_BTH, -self.A_log.float().exp(), B_BTGN, C_BTGN, h_BHPN, self.chunk)
        y_BTHP = (y_BTHP + self.D.float()[:, None] * x_BTHP).to(x_BTD.dtype)
        return self.out_proj(self.norm(y_BTHP.flatten(2), z_BTI))


class Attention(nn.Module):
    def __init__(self, config: YaongiConfig, spec: dict) -> None:
        super().__init__()
        self.heads, self.kv_heads, width = spec["num_heads"], spec["num_kv_heads"], spec["head_dim"]
        base = config.mup["base_head_dim"] if config.mup else None
        self.factor = math.sqrt(base / width) if base else 1.0  # of μP, in addition to 1/√W
        for name, rows in (("q_proj", self.heads), ("k_proj", self.kv_heads), ("v_proj", self.kv_heads)):
            setattr(self, name, nn.Linear(config.hidden_size, rows * width, bias=spec["bias"]))
        self.o_proj = nn.Linear(self.heads * width, config.hidden_size, bias=spec["bias"])
        self.q_norm = RMSNorm(width, config.norm_eps) if spec["qk_norm"] else nn.Identity()
        self.k_norm = RMSNorm(width, config.norm_eps) if spec["qk_norm"] else nn.Identity()

    def forward(self, x_BTD: Tensor, step: Step, state: State) -> Tensor:
        q_BTHW = self.q_norm(self.q_proj(x_BTD).unflatten(-1, (self.heads, -1))) * self.factor
        k_BTKW = self.k_norm(self.k_proj(x_BTD).unflatten(-1, (self.kv_heads, -1)))
        v_BTKW = self.v_proj(x_BTD).unflatten(-1, (self.kv_heads, -1))
        if step.turn_BT1W is not None:
            q_BTHW, k_BTKW = rotate(q_BTHW, *step.turn_BT1W), rotate(k_BTKW, *step.turn_BT1W)
        k_BSKW, v_BSKW = state.all("k", k_BTKW), state.all("v", v_BTKW)
        y_BHTW = F.scaled_dot_product_attention(
            q_BTHW.transpose(1, 2),
            k_BSKW.transpose(1, 2),
            v_BSKW.transpose(1, 2),
            attn_mask=step.allowed_B1TS,
            is_causal=step.allowed_B1TS is None and x_BTD.shape[1] > 1,
            enable_gqa=self.heads > self.kv_heads,
        )
        return self.o_proj(y_BHTW.transpose(1, 2).flatten(2))


def rotate(x_BTHW: Tensor, cos_BT1W: Tensor, sin_BT1W: Tensor) -> Tensor:
    first, second = x_BTHW.float().chunk(2, dim=-1)
    turned = [first * cos_BT1W - second * sin_BT1W, second * cos_BT1W + first * sin_BT1W]
    return torch.cat(turned, dim=-1).to(x_BTHW.dtype)


def rotary(spec: dict, position_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the angles of each position, FP32 [B, T, 1, W/2], times the amplitude of YaRN."""
    width, theta, scaling = spec["head_dim"], spec["rope_theta"], spec["rope_scaling"] or {"kind": None}
    rate_W = 1 / theta ** (torch.arange(0, width, 2, device=position_BT.device, dtype=torch.float32) / width)
    amplitude, stays_W = 1.0, torch.ones_like(rate_W)  # share of each rate that is not divided by `factor`
    if scaling["kind"] == "linear":
        stays_W = torch.zeros_like(rate_W)
    elif scaling["kind"] == "llama3":
        turns_W = rate_W * (scaling["original_length"] / (2 * math.pi))
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        stays_W = ((turns_W - low) / (high - low)).clamp(0, 1)
    elif scaling["kind"] == "yarn":
        amplitude = 0.1 * math.log(scaling["factor"]) + 1
        ends = (
            width * math.log(scaling["original_length"] / (turns * 2 * math.pi)) / (2 * math.log(theta))
            for turns in (scaling["beta_fast"], scaling["beta_slow"])
        )
        first, last = max(math.floor(next(ends)), 0), min(math.ceil(next(ends)), width - 1)
        channel_W = torch.arange(width // 2, device=rate_W.device, dtype=torch.float32)
        stays_W = 1 - ((channel_W - first) / max(last - first, 1e-3)).clamp(0, 1)
    rate_W = rate_W * stays_W + rate_W / scaling.get("factor", 1) * (1 - stays_W)
    angle_BT1W = (position_BT[..., None].float() * rate_W)[:, :, None]
    return angle_BT1W.cos() * amplitude, angle_BT1W.sin() * amplitude


def activate(before_G: Tensor, kind: str) -> Tensor:
    """Squared ReLU, or SwiGLU of gate and up side by side."""
    if kind == "relu2":
        return F.relu(before_G).square()
    gate_F, up_F = before_G.float().chunk(2, dim=-1)
    return (F.silu(gate_F) * up_F).to(before_G.dtype)


def first(width: int, kind: str) -> tuple[str, int]:
    """Name and number of rows of the first matrix: SwiGLU stacks the rows of gate and up."""
    return ("gate_up", 2 * width) if kind == "swiglu" else ("up", width)


class Mlp(nn.Module):
    def __init__(self, config: YaongiConfig, spec: dict) -> None:
        super().__init__()
        self.kind = spec["activation"]
        self.first, rows = first(spec["width"], self.kind)
        self.add_module(self.first, nn.Linear(config.hidden_size, rows, bias=spec["bias"]))
        self.down = nn.Linear(spec["width"], config.hidden_size, bias=spec["bias"])

    def forward(self, x_BTD: Tensor, step: Step, state: State) -> Tensor:
        return self.down(activate(getattr(self, self.first)(x_BTD), self.kind))


class Moe(nn.Module):
    def __init__(self, config: YaongiConfig, spec: dict) -> None:
        super().__init__()
        self.spec, self.kind, hidden = spec, spec["activation"], config.hidden_size
        experts, width, shared = spec["num_experts"], spec["expert_width"], spec["shared_width"]
        self.router = nn.Linear(hidden, experts, bias=False)
        self.register_buffer("bias_E", torch.zeros(experts, dtype=torch.float32))
        name, rows = first(width, self.kind)
        self.first = f"{name}_EGD" if self.kind == "swiglu" else f"{name}_EFD"
        self.register_parameter(self.first, nn.Parameter(torch.empty(experts, rows, hidden)))
        self.down_EDF = nn.Parameter(torch.empty(experts, hidden, width))
        if shared:
            self.shared_first, rows = f"shared_{name}", first(shared, self.kind)[1]
            self.add_module(self.shared_first, nn.Linear(hidden, rows, bias=False))
            self.shared_down = nn.Linear(shared, hidden, bias=False)

    def forward(self, x_BTD: Tensor, step: Step, state: State) -> Tensor:
        x_RD, first_EGD = x_BTD.flatten(0, 1), getattr(self, self.first)
        logits_RE = x_RD.float() @ self.router.weight.float().T
        score_RE = logits_RE.softmax(-1) if self.spec["scores"] == "softmax" else logits_RE.sigmoid()
        expert_RK = (score_RE + self.bias_E.float()).topk(self.spec["top_k"], dim=-1).indices
        weight_RK = score_RE.gather(-1, expert_RK)
        if self.spec["renormalise"]:
            weight_RK = weight_RK / (weight_RK.sum(-1, keepdim=True) + 1e-20)
        weight_RK = weight_RK * self.spec["score_scale"]
        y_RD = torch.zeros_like(x_RD, dtype=torch.float32)
        for e in expert_RK.unique().tolist():
            token, place = torch.where(expert_RK == e)
            hidden_RF = activate(F.linear(x_RD[token], first_EGD[e]), self.kind)
            own_RD = F.linear(hidden_RF, self.down_EDF[e]).float() * weight_RK[token, place, None]
            y_RD = y_RD.index_add(0, token, own_RD)
        y_BTD = y_RD.to(x_BTD.dtype).view_as(x_BTD)
        if self.spec["shared_width"]:
            y_BTD = y_BTD + self.shared_down(activate(getattr(self, self.shared_first)(x_BTD), self.kind))
        return y_BTD


class NgramHash(nn.Module):
    """Rows of the tables for each position: (x_t·m_0 ⊕ x_{t-1}·m_1 ⊕ …) mod p, of token classes x, in int64."""

    def __init__(self, config: YaongiConfig, spec: dict) -> None:
        super().__init__()
        self.orders, self.heads = spec["max_order"], spec["num_heads"]
        sizes = {"class_V": config.vocab_size, "multiplier_N": self.orders}
        sizes |= dict.fromkeys(("prime_J", "offset_J"), (self.orders - 1) * self.heads)
        for name, size in sizes.items():
            self.register_buffer(name, torch.ones(size, dtype=torch.int64))

    def forward(self, ids_BT: Tensor, state: State) -> Tensor:
        length, back = ids_BT.shape[1], self.orders - 1
        class_BS = self.class_V[state.last("ids", ids_BT, back)]  # zeros before the first are PAD_TOKEN
        mix_BT, columns = class_BS[:, back:] * self.multiplier_N[0], []
        for order in range(1, self.orders):
            earlier_BT = class_BS[:, back - order : back - order + length]
            mix_BT = mix_BT ^ (earlier_BT * self.multiplier_N[order])
            columns.append(mix_BT[..., None] % self.prime_J[(order - 1) * self.heads : order * self.heads])
        return torch.cat(columns, dim=-1) + self.offset_J


class Engram(nn.Module):
    """Memory of hashed n-grams (arXiv 2601.07372): u = σ(gate(h, key))·value, y = u + SiLU(conv(norm(u)))."""

    def __init__(self, config: YaongiConfig, spec: dict) -> None:
        super().__init__()
        hidden, memory = config.hidden_size, (spec["max_order"] - 1) * spec["width_per_order"]
        base = config.mup["base_hidden"] if config.mup else 1
        self.factor = math.sqrt((base / hidden if config.mup else 1.0) / hidden)
        self.hash = NgramHash(config, spec)
        self.tables = nn.Embedding(spec["table_rows"], spec["width_per_order"] // spec["num_heads"])
        self.key_proj = nn.Linear(memory, hidden, bias=False)
        self.value_proj = nn.Linear(memory, hidden, bias=False)
        self.key_norm = RMSNorm(hidden, torch.finfo(torch.float32).eps)
        self.query_norm = RMSNorm(hidden, torch.finfo(torch.float32).eps)
        self.conv_norm = RMSNorm(hidden, config.norm_eps)
        self.conv = CausalConv(hidden, spec["conv_kernel"], spec["max_order"], bias=False)

    def forward(self, x_BTD: Tensor, step: Step, state: State) -> Tensor:
        ids_BT = step.without_padding(step.ids_BT[..., None])[..., 0]  # PAD_TOKEN is 0
        memory_BTM = self.tables(self.hash(ids_BT, state)).flatten(2)
        key_BTD, value_BTD = self.key_norm(self.key_proj(memory_BTM)), self.value_proj(memory_BTM)
        g_BT1 = (key_BTD.float() * self.query_norm(x_BTD).float()).sum(-1, keepdim=True) * self.factor
        gate_BT1 = torch.sigmoid(g_BT1.sign() * g_BT1.abs().clamp(min=1e-6).sqrt())
        u_BTD = gate_BT1.to(value_BTD.dtype) * value_BTD
        return u_BTD + F.silu(self.conv(step.without_padding(self.conv_norm(u_BTD)), state))


MIXERS: dict[str, tuple[str, type[nn.Module]]] = {
    "M": ("mamba", Mamba2),
    "E": ("moe", Moe),
    "*": ("attention", Attention),
    "-": ("mlp", Mlp),
    "N": ("engram", Engram),
}
