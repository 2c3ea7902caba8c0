"""What configurations of transformers have in common. Imports no torch."""

from __future__ import annotations

from typing import Any

from trainer.errors import SpecError

Config = dict[str, Any]


def common(config: Config) -> Config:
    return {
        "vocab_size": config["vocab_size"],
        "hidden": config["hidden_size"],
        "tied_embedding": bool(config.get("tie_word_embeddings", False)),
        "init_std": config.get("initializer_range", 0.02),
    }


def refuse(config: Config, *, hold: dict[str, Any]) -> None:
    """Refuse a configuration that has other values than these; fields may be missing. Others change the model."""
    for name, value in hold.items():
        if (found := config.get(name, value)) != value:
            raise SpecError(f"config.json: {name} {found!r} is not supported, only {value!r}")


def scaling(rope: Config) -> Config | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    names = {
        "factor": "factor",
        "original_max_position_embeddings": "original_length",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
    }
    return {"kind": kind} | {ours: rope[theirs] for theirs, ours in names.items() if theirs in rope}


def attention(config: Config, *, qk_norm: bool) -> Config:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    heads = config["num_attention_heads"]
    return {
        "num_heads": heads,
        "num_kv_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or config["hidden_size"] // heads,
        "rope_theta": rope.get("rope_theta", config.get("rope_theta", 10000.0)),
        "rope_scaling": scaling(rope),
        "qk_norm": qk_norm,
        "bias": bool(config.get("attention_bias", False)),
    }
