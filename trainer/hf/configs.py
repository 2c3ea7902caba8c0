"""What configurations of transformers have in common. Imports no torch."""

from __future__ import annotations

from typing import Any

from trainer.errors import SpecError

Config = dict[str, Any]
FP8_BLOCK = 128  # rows and columns of a weight with one scale
MAX_LAYERS = 10_000
# Fields that change rotary positions in unsupported ways, and the values at which they do not.
UNTURNED = {"partial_rotary_factor": 1.0}
YARN = {"attention_factor": None, "mscale": None, "mscale_all_dim": None, "truncate": True}


def common(config: Config) -> Config:
    _refuse_quantised(config.get("quantization_config"))
    return {
        "vocab_size": config["vocab_size"],
        "hidden": config["hidden_size"],
        "tied_embedding": bool(config.get("tie_word_embeddings", False)),
        "init_std": config.get("initializer_range", 0.02),
    }


def refuse(config: Config, *, hold: dict[str, Any]) -> None:
    """Refuse a configuration with other values than these, which would change the model; fields may be missing."""
    for name, value in hold.items():
        if (found := config.get(name, value)) != value:
            raise SpecError(f"config.json: {name} {found!r} is not supported, only {value!r}")


def count(config: Config, name: str, most: int | None = None) -> int:
    """A field that must be a positive whole number, because it is used in computations here."""
    value = config[name]
    if not isinstance(value, int) or value < 1 or (most and value > most):
        limit = f" up to {most:,}" if most else ""
        raise SpecError(f"config.json: {name} is {value!r}; it must be a positive whole number{limit}")
    return value


def _refuse_quantised(found: Any) -> None:
    """Refuse weights in a format that weights.py cannot read, before any of them is downloaded."""
    if found is None:
        return
    method, block = (
        found.get(name) if isinstance(found, dict) else None for name in ("quant_method", "weight_block_size")
    )
    if method != "fp8" or block != [FP8_BLOCK, FP8_BLOCK]:
        raise SpecError(
            f"config.json: quantization_config with quant_method {method!r} and weight_block_size {block} is not "
            f"supported, only 'fp8' with {[FP8_BLOCK, FP8_BLOCK]}; use the model in BF16"
        )


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


def attention(config: Config, *, qk_norm: bool, turns: bool = True) -> Config:
    """`turns`: whether queries and keys have rotary positions."""
    heads = count(config, "num_attention_heads")
    found = {
        "num_heads": heads,
        "num_kv_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or count(config, "hidden_size") // heads,
        "qk_norm": qk_norm,
        "bias": bool(config.get("attention_bias", False)),
    }
    return found | (_positions(config) if turns else {"rope_theta": None, "rope_scaling": None})


def _positions(config: Config) -> Config:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise SpecError(f"config.json: rope_parameters {rope!r} is not supported, only one set for all layers")
    refuse(config, hold=UNTURNED)
    found = scaling(rope)
    refuse(rope, hold=UNTURNED | (YARN if found and found["kind"] == "yarn" else {}))
    return {"rope_theta": rope.get("rope_theta", config.get("rope_theta", 10000.0)), "rope_scaling": found}
