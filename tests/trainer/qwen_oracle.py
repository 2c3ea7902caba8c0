"""transformers' Qwen3 and Qwen3-MoE as oracles: independent implementations of the decoders, with our weights."""

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from trainer.model.hybrid import HybridModel
from trainer.modelspec import ModelSpec

DENSE = ModelSpec.model_validate(
    {
        "vocab_size": 96,
        "hidden": 64,
        "layers": ["*-", "*-", "*-"],
        "attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 32, "rope_theta": 1e6, "qk_norm": True},
        "mlp": {"width": 96, "activation": "swiglu"},
        "norm_eps": 1e-6,
        "init_std": 0.15,
    }
)
MOE = DENSE.updated(
    {
        "layers": ["*E", "*E", "*E"],
        "mlp": None,
        "moe": {
            "num_experts": 8,
            "top_k": 3,
            "expert_width": 32,
            "activation": "swiglu",
            "scores": "softmax",
            "score_scale": 1.0,
            "bias_update_rate": 0.0,
            "sequence_loss_weight": 0.0,
        },
    }
)


def qwen_for(spec: ModelSpec) -> Qwen3ForCausalLM | Qwen3MoeForCausalLM:
    """An uninitialised model of the same shape."""
    shared = {
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden,
        "num_hidden_layers": len(spec.layers),
        "num_attention_heads": spec.attention.num_heads,
        "num_key_value_heads": spec.attention.num_kv_heads,
        "head_dim": spec.attention.head_dim,
        "rope_parameters": {"rope_type": "default", "rope_theta": spec.attention.rope_theta},
        "rms_norm_eps": spec.norm_eps,
        "attention_bias": spec.attention.bias,
        "tie_word_embeddings": spec.tied_embedding,
        "use_cache": False,
    }
    if spec.mlp:
        return Qwen3ForCausalLM(Qwen3Config(intermediate_size=spec.mlp.width, **shared))
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            num_experts=spec.moe.num_experts,
            num_experts_per_tok=spec.moe.top_k,
            moe_intermediate_size=spec.moe.expert_width,
            norm_topk_prob=spec.moe.renormalise,
            **shared,
        )
    )


def paired(ours: HybridModel, theirs) -> dict[str, tuple[torch.Tensor, list[torch.Tensor]]]:
    """Name → our tensor and their tensors, which concatenated by rows give ours."""
    found = {"embedding.weight": (ours.embedding.weight, [theirs.model.embed_tokens.weight])}
    if not ours.spec.tied_embedding:
        found["head.weight"] = (ours.head.weight, [theirs.lm_head.weight])
    found["final_norm.weight"] = (ours.final_norm.weight, [theirs.model.norm.weight])
    for index, (layer, block) in enumerate(zip(ours.layers, theirs.model.layers, strict=True)):
        attention, other = layer
        pairs = {
            "0.norm.weight": (attention.norm.weight, [block.input_layernorm.weight]),
            "1.norm.weight": (other.norm.weight, [block.post_attention_layernorm.weight]),
        }
        for name, parameter in attention.mixer.named_parameters():
            pairs[f"0.mixer.{name}"] = (parameter, [block.self_attn.get_parameter(name)])
        mixer, mlp = other.mixer, block.mlp
        if ours.spec.mlp:
            pairs["1.mixer.gate_up.weight"] = (mixer.gate_up.weight, [mlp.gate_proj.weight, mlp.up_proj.weight])
            pairs["1.mixer.down.weight"] = (mixer.down.weight, [mlp.down_proj.weight])
        else:
            pairs["1.mixer.gate_up_EGD"] = (mixer.gate_up_EGD, [mlp.experts.gate_up_proj])
            pairs["1.mixer.down_EDF"] = (mixer.down_EDF, [mlp.experts.down_proj])
            pairs["1.mixer.router.weight"] = (mixer.router.weight, [mlp.gate.weight])
        found |= {f"layers.{index}.{name}": pair for name, pair in pairs.items()}
    return found


@torch.no_grad()
def copy_weights(ours: HybridModel, theirs) -> None:
    for mine, others in paired(ours, theirs).values():
        for other, part in zip(others, mine.chunk(len(others)), strict=True):
            other.copy_(part)
