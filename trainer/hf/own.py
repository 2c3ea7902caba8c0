"""Models that transformers does not have: their configuration and weights for the files `…_yaongi.py` beside this one,
which are copied into the folder. Imports neither torch nor those files.

The weights keep our names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trainer.kinds.engram import EngramSpec
from trainer.modelspec import ModelSpec

CODE = tuple(
    Path(__file__).with_name(name) for name in ("configuration_yaongi.py", "mixers_yaongi.py", "modeling_yaongi.py")
)
SYMBOLS = frozenset("ME*-N")  # the kinds of layers in those files
SHARED = ("vocab_size", "hidden", "mtp", "lora", "init_std", "tied_embedding")  # left out, or under transformers' names
# Suffixes of names of weights that stay FP32, because computations with them are FP32: the same weights as
# `_keep_in_fp32_modules_strict` in modeling_yaongi.py.
FP32 = ("norm.weight", "A_log", "mixer.D", "dt_bias", "router.weight", "bias_E")


def misfit(spec: ModelSpec) -> str | None:
    """Why the files cannot compute a model; None if they can."""
    unknown = sorted({section.label for _, section in spec.trunk() if section.symbol not in SYMBOLS})
    return f"the modelling file has no {unknown[0]}; add it to trainer/hf/mixers_yaongi.py" if unknown else None


def config(spec: ModelSpec, max_length: int) -> dict[str, Any]:
    """config.json of a model that was trained on rows of `max_length` tokens."""
    sections = spec.model_dump(mode="json", exclude=set(SHARED))
    for section, engram in zip(sections["engram"], spec.sections(EngramSpec), strict=True):
        section["table_rows"] = sum(engram.primes(spec))
    found = {
        "architectures": ["YaongiForCausalLM"],
        "model_type": "yaongi",
        "auto_map": {
            "AutoConfig": "configuration_yaongi.YaongiConfig",
            "AutoModelForCausalLM": "modeling_yaongi.YaongiForCausalLM",
        },
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden,
        "num_hidden_layers": len(spec.layers),
        "max_position_embeddings": max_length,
        "tie_word_embeddings": spec.tied_embedding,
        "initializer_range": spec.init_std,
        **sections,
    }
    if attention := spec.attention:
        found |= {"num_attention_heads": attention.num_heads, "num_key_value_heads": attention.num_kv_heads}
    return found
