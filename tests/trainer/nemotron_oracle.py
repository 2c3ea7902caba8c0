"""transformers' NemotronH as an oracle: an independent implementation of the architecture, with our weights."""

import torch
from transformers import NemotronHConfig, NemotronHForCausalLM

from trainer.model.hybrid import HybridModel
from trainer.modelspec import ModelSpec

BLOCK_TYPES = {"M": "linear_attention", "E": "moe", "*": "full_attention", "-": "mlp"}


def nemotron_for(spec: ModelSpec) -> NemotronHForCausalLM:
    """An uninitialised NemotronH of the same shape; it has one mixer in each layer, so our layers are spread out."""
    config = NemotronHConfig(
        vocab_size=spec.vocab_size,
        hidden_size=spec.hidden,
        layers_block_type=[BLOCK_TYPES[symbol] for layer in spec.layers for symbol in layer],
        num_attention_heads=spec.attention.num_heads,
        num_key_value_heads=spec.attention.num_kv_heads,
        head_dim=spec.attention.head_dim,
        intermediate_size=spec.mlp.width if spec.mlp else 8,
        ssm_state_size=spec.mamba.d_state,
        mamba_num_heads=spec.mamba.num_heads,
        mamba_head_dim=spec.mamba.head_dim,
        n_groups=spec.mamba.num_groups,
        conv_kernel=spec.mamba.conv_kernel,
        chunk_size=spec.mamba.chunk_size,
        n_routed_experts=spec.moe.num_experts,
        num_experts_per_tok=spec.moe.top_k,
        moe_intermediate_size=spec.moe.expert_width,
        moe_shared_expert_intermediate_size=spec.moe.shared_width or 8,
        routed_scaling_factor=spec.moe.score_scale,
        layer_norm_epsilon=spec.norm_eps,
        use_cache=False,
    )
    model = NemotronHForCausalLM(config)
    for block in model.model.layers:
        if block.block_type == "linear_attention":
            # The mixer class uses time_step_min, a constant of the initialisation, as a lower bound of dt in the
            # forward pass; the published checkpoints and the paper have no bound.
            block.mixer.time_step_limit = tuple(config.time_step_limit)
    return model


def paired_parameters(ours: HybridModel, theirs: NemotronHForCausalLM) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    """(name, our tensor, the corresponding view of their tensor) for each of our parameters and router biases."""
    backbone = theirs.model
    pairs = [
        ("embedding.weight", ours.embedding.weight, backbone.embeddings.weight),
        ("head.weight", ours.head.weight, theirs.lm_head.weight),
        ("final_norm.weight", ours.final_norm.weight, backbone.norm_f.weight),
    ]
    sublayers = [(f"layers.{i}.{j}", sub) for i, layer in enumerate(ours.layers) for j, sub in enumerate(layer)]
    for (name, sublayer), block in zip(sublayers, backbone.layers, strict=True):
        pairs.append((f"{name}.norm.weight", sublayer.norm.weight, block.norm.weight))
        pairs += [
            (f"{name}.mixer.{leaf}", mine, other) for leaf, mine, other in _mixer_pairs(sublayer.mixer, block.mixer)
        ]
    return pairs


def _mixer_pairs(mine, other):
    kind = type(mine).__name__
    if kind == "Mamba2":
        rows = mine.zxbc_proj.weight.shape[0]
        return [
            ("zxbc_proj.weight", mine.zxbc_proj.weight, _Rows(other.in_proj.weight, slice(None, rows))),
            ("dt_proj.weight", mine.dt_proj.weight, _Rows(other.in_proj.weight, slice(rows, None))),
            ("conv.weight", mine.conv.weight, _Rows(other.conv1d.weight, (slice(None), 0))),
            ("conv.bias", mine.conv.bias, other.conv1d.bias),
            *((leaf, getattr(mine, leaf), getattr(other, leaf)) for leaf in ("A_log", "D", "dt_bias")),
            ("norm.weight", mine.norm.weight, other.norm.weight),
            ("out_proj.weight", mine.out_proj.weight, other.out_proj.weight),
        ]
    if kind == "Moe":
        pairs = [
            ("router.weight", mine.router.weight, other.gate.weight),
            ("bias_E", mine.bias_E, other.gate.e_score_correction_bias),
            ("up_EFD", mine.up_EFD, other.experts.up_proj),
            ("down_EDF", mine.down_EDF, other.experts.down_proj),
        ]
        if mine.spec.shared_width:
            pairs.append(("shared_up.weight", mine.shared_up.weight, other.shared_experts.up_proj.weight))
            pairs.append(("shared_down.weight", mine.shared_down.weight, other.shared_experts.down_proj.weight))
        return pairs
    if kind == "Attention":
        names = ("q_proj", "k_proj", "v_proj", "o_proj")
        return [(f"{n}.weight", getattr(mine, n).weight, getattr(other, n).weight) for n in names]
    return [
        ("up.weight", mine.up.weight, other.up_proj.weight),
        ("down.weight", mine.down.weight, other.down_proj.weight),
    ]


class _Rows:
    """Part of a tensor of theirs, and the same part of its gradient."""

    def __init__(self, tensor: torch.Tensor, index) -> None:
        self.tensor, self.index = tensor, index

    def copy_(self, source: torch.Tensor) -> None:
        self.tensor[self.index].copy_(source)

    @property
    def grad(self) -> torch.Tensor:
        return self.tensor.grad[self.index]


@torch.no_grad()
def copy_weights(ours: HybridModel, theirs: NemotronHForCausalLM) -> None:
    for block in theirs.model.layers:
        if block.block_type == "moe":  # they always have a shared expert; with zero output it has no effect
            block.mixer.shared_experts.down_proj.weight.zero_()
    for _name, mine, other in paired_parameters(ours, theirs):
        other.copy_(mine)
