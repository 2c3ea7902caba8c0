"""NemotronH, transformers' hybrid: which of our models fit it, and its configuration. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from math import inf

from trainer.errors import SpecError
from trainer.hf.configs import Config, attention, common, refuse
from trainer.kinds.attention import AttentionSpec
from trainer.kinds.mamba2 import MambaSpec
from trainer.kinds.mlp import MlpSpec
from trainer.kinds.moe import MoeSpec
from trainer.modelspec import ModelSpec

BLOCKS = {"M": "linear_attention", "E": "moe", "*": "full_attention", "-": "mlp"}  # NemotronH's names
FORMER_BLOCKS = {"mamba": "M", "attention": "*"} | {name: symbol for symbol, name in BLOCKS.items()}
NO_SHARED_WIDTH = 16  # NemotronH always has a shared expert: zeros of this width if ours has none


def places(spec: ModelSpec) -> Iterator[tuple[str, str, str]]:
    for number, (place, _) in enumerate(spec.trunk()):
        yield f"layers.{place}", f"backbone.layers.{number}.norm", f"backbone.layers.{number}.mixer"


def _sections(spec: ModelSpec) -> tuple[MambaSpec | None, AttentionSpec | None, MoeSpec | None, MlpSpec | None]:
    """The sections that a layer uses; None for the others."""
    used = set("".join(spec.layers))
    return (
        spec.mamba if "M" in used else None,
        spec.attention if "*" in used else None,
        spec.moe if "E" in used else None,
        spec.mlp if "-" in used else None,
    )


def misfit(spec: ModelSpec) -> str | None:
    if unknown := {section.label for _, section in spec.trunk() if section.symbol not in BLOCKS}:
        return f"it has no {', '.join(sorted(unknown))}"
    if spec.mup or spec.tied_embedding:
        return "it does not support μP" if spec.mup else "its head is never tied to the embedding"
    _, attends, moe, mlp = _sections(spec)
    if attends and (attends.rope_theta is not None or attends.qk_norm or attends.bias):
        return "its attention has no positions, no norms of queries and keys, and no biases"
    if moe and mlp and mlp.bias:
        return "if its MLPs have biases, so do its shared experts"
    if (moe and moe.activation != "relu2") or (mlp and mlp.activation != "relu2"):
        return "its MLPs and experts use squared ReLU"
    if moe and (moe.scores != "sigmoid" or not moe.renormalise):
        return "its router uses a sigmoid, renormalised"
    return None


def useless(spec: ModelSpec) -> str | None:
    return None if "*" in "".join(spec.layers) else "its cache needs at least one attention layer"


def reads(config: Config) -> Config:
    hold = {
        "mamba_hidden_act": "silu",
        "mlp_hidden_act": "relu2",
        "use_bias": False,
        "mamba_proj_bias": False,
        "use_conv_bias": True,
        "n_group": 1,
        "norm_topk_prob": True,
        "moe_latent_size": None,
        "residual_in_fp32": False,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "sliding_window": None,
    }
    refuse(config, hold=hold)
    limit = config.get("time_step_limit")
    if limit not in (None, [0, inf], [0, {"__float__": "Infinity"}]):  # as written by Python's JSON or transformers 5
        raise SpecError(f"config.json: time_step_limit {limit} is not supported, only 0 to infinity")
    blocks = config.get("layers_block_type") or config["hybrid_override_pattern"]
    if not isinstance(blocks, str | list):
        raise SpecError(f"config.json: layers_block_type is {blocks!r}; it must be a list of the layers' kinds")
    symbols = [FORMER_BLOCKS.get(block, block) for block in map(str, blocks)]
    if unknown := sorted(set(symbols) - BLOCKS.keys()):
        known = ", ".join(BLOCKS.values())
        raise SpecError(f"config.json: layers_block_type has '{unknown[0]}', which is not one of {known}")
    found = common(config) | {"layers": symbols, "norm_eps": config["layer_norm_epsilon"], "tied_embedding": False}
    if "M" in symbols:
        found["mamba"] = {
            "num_heads": config["mamba_num_heads"],
            "head_dim": config["mamba_head_dim"],
            "d_state": config["ssm_state_size"],
            "num_groups": config["n_groups"],
            "conv_kernel": config["conv_kernel"],
            "chunk_size": config["chunk_size"],
        }
    if "*" in symbols:
        found["attention"] = attention(config, qk_norm=False, turns=False)
    if "-" in symbols:
        found["mlp"] = {"width": config["intermediate_size"], "bias": bool(config.get("mlp_bias", False))}
    if "E" in symbols:
        found["moe"] = {
            "num_experts": config["n_routed_experts"],
            "top_k": config["num_experts_per_tok"],
            "expert_width": config["moe_intermediate_size"],
            "shared_width": config["moe_shared_expert_intermediate_size"],
            "score_scale": config["routed_scaling_factor"],
        }
    return found


def zeros(spec: ModelSpec) -> dict[str, tuple[int, int]]:
    found = {}
    for (_, _, mixer), (_, section) in zip(places(spec), spec.trunk(), strict=True):
        if isinstance(section, MoeSpec) and not section.shared_width:
            found[f"{mixer}.shared_experts.up_proj.weight"] = (NO_SHARED_WIDTH, spec.hidden)
            found[f"{mixer}.shared_experts.down_proj.weight"] = (spec.hidden, NO_SHARED_WIDTH)
    return found


def writes(spec: ModelSpec) -> Config:
    symbols = [section.symbol for _, section in spec.trunk()]
    found: Config = {
        "layers_block_type": [BLOCKS[symbol] for symbol in symbols],
        "hybrid_override_pattern": "".join(symbols),  # the same for vLLM and llama.cpp with an older transformers
        "num_hidden_layers": spec.num_sublayers,
        "layer_norm_epsilon": spec.norm_eps,
        "mlp_hidden_act": "relu2",
        "mamba_hidden_act": "silu",
        "use_bias": False,
        "use_conv_bias": True,
        "mamba_proj_bias": False,
        "mamba_ssm_cache_dtype": "float32",  # for vLLM; some versions use FP16 without it
        # A parameter of initialisation, which its forward pass also uses as a lower bound of time steps. We have none.
        "time_step_min": 1e-30,
        "time_step_limit": [0.0, float("inf")],
    }
    mamba, attends, moe, mlp = _sections(spec)
    if mamba:
        found |= {
            "mamba_num_heads": mamba.num_heads,
            "mamba_head_dim": mamba.head_dim,
            "ssm_state_size": mamba.d_state,
            "n_groups": mamba.num_groups,
            "conv_kernel": mamba.conv_kernel,
            "chunk_size": mamba.chunk_size,
        }
    if attends:
        found |= {
            "num_attention_heads": attends.num_heads,
            "num_key_value_heads": attends.num_kv_heads,
            "head_dim": attends.head_dim,
            "attention_bias": False,
        }
    if mlp:
        found |= {"intermediate_size": mlp.width, "mlp_bias": mlp.bias}
    if moe:
        found |= {
            "n_routed_experts": moe.num_experts,
            "num_experts_per_tok": moe.top_k,
            "moe_intermediate_size": moe.expert_width,
            "moe_shared_expert_intermediate_size": moe.shared_width or NO_SHARED_WIDTH,
            "n_shared_experts": 1,
            "routed_scaling_factor": moe.score_scale,
            "norm_topk_prob": True,
            "n_group": 1,
            "topk_group": 1,
        }
    return found
