"""Which models of transformers are models of ours, and how their configuration says the same. Imports no torch.

Within a mixer the names of weights are those of its kind (`Kind.parts`); what stands around the mixers is here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from trainer.errors import SpecError
from trainer.hf import nemotron
from trainer.hf.configs import MAX_LAYERS, Config, attention, common, count, refuse
from trainer.kinds.base import Part
from trainer.modelspec import ModelSpec


@dataclass(frozen=True)
class Architecture:
    """
    Attributes:
        model_type, class_name: its names in config.json.
        outside: our names of embedding, final norm and head → theirs.
        reads: the fields of ModelSpec, from a configuration.
        writes: the configuration of a spec, without the fields that all architectures share.
        misfit: why a spec is not such a model; None if it is.
        useless: why transformers cannot run such a model, although it has the layers.
        places: for each sublayer in order, its prefix in our names, and those of its norm and its mixer in theirs.
        ignored: prefixes of names that a checkpoint may contain and that we have no weights for.
        absent: parts that the kind has and this architecture does not have.
        zeros: names and shapes of tensors that it has and a spec does not have; as zeros they have no effect.
    """

    model_type: str
    class_name: str
    outside: dict[str, str]
    reads: Callable[[Config], Config]
    writes: Callable[[ModelSpec], Config]
    misfit: Callable[[ModelSpec], str | None]
    places: Callable[[ModelSpec], Iterator[tuple[str, str, str]]]
    ignored: tuple[str, ...] = ()
    absent: frozenset[str] = field(default_factory=frozenset)
    zeros: Callable[[ModelSpec], dict[str, tuple[int, int]]] = lambda _: {}
    useless: Callable[[ModelSpec], str | None] = lambda _: None

    def parts(self, spec: ModelSpec) -> list[Part]:
        """All parts of a model, with full names."""
        found = [Part(theirs, ours) for ours, theirs in self.outside.items()]
        if spec.tied_embedding:
            found = [part for part in found if part.ours != "head.weight"]
        for (here, norm, mixer), (_, section) in zip(self.places(spec), spec.trunk(), strict=True):
            found.append(Part(f"{norm}.weight", f"{here}.norm.weight"))
            for part in section.parts():
                if part.theirs not in self.absent:
                    found.append(part._replace(theirs=f"{mixer}.{part.theirs}", ours=f"{here}.mixer.{part.ours}"))
        return found

    def config(self, spec: ModelSpec, max_length: int) -> Config:
        """config.json of a model that was trained on rows of `max_length` tokens."""
        return {
            "architectures": [self.class_name],
            "model_type": self.model_type,
            "vocab_size": spec.vocab_size,
            "hidden_size": spec.hidden,
            "max_position_embeddings": max_length,
            "tie_word_embeddings": spec.tied_embedding,
            "initializer_range": spec.init_std,
            **self.writes(spec),
        }


def architecture_of(config: Config, where: str) -> Architecture:
    """
    Raises:
        SpecError: none that is known.
    """
    name = config.get("model_type")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise SpecError(f"{where}: model_type {name!r} is not known; known are {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]


def native(spec: ModelSpec) -> tuple[Architecture | None, str]:
    """The architecture that a model of ours is, or none and why it is none of each."""
    reasons = []
    for architecture in ARCHITECTURES.values():
        reason = architecture.misfit(spec) or architecture.useless(spec)
        if reason is None:
            return architecture, ""
        reasons.append(f"{architecture.model_type}: {reason}")
    return None, "; ".join(reasons)


def _decoder_config(spec: ModelSpec) -> Config:
    attention = spec.attention
    assert attention is not None and attention.rope_theta is not None
    rope: Config = {"rope_type": "default", "rope_theta": attention.rope_theta}
    if scaling := attention.rope_scaling:
        rope |= {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.original_length is not None:
            rope["original_max_position_embeddings"] = scaling.original_length
        if scaling.kind == "llama3":
            rope |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
        if scaling.kind == "yarn":
            rope |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
    return {
        "num_hidden_layers": len(spec.layers),
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "attention_bias": attention.bias,
        "rms_norm_eps": spec.norm_eps,
        "rope_parameters": rope,
        "hidden_act": "silu",
        **_former_rope(rope),
    }


def _former_rope(rope: Config) -> Config:
    """The same for programs with transformers 4, which would silently use the default base of rotary positions."""
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    return {"rope_theta": rope["rope_theta"]} | ({} if rope["rope_type"] == "default" else {"rope_scaling": scaling})


def _decoder_misfit(spec: ModelSpec, layer: str, *, qk_norm: bool) -> str | None:
    attention = spec.attention
    if set(spec.layers) != {layer}:
        return f"layers are not all {layer}"
    if spec.mup or attention is None or attention.rope_theta is None:
        return "it does not support μP" if spec.mup else "it needs rotary positions (rope_theta)"
    if attention.qk_norm != qk_norm:
        return f"attention has qk_norm {attention.qk_norm}"
    return None


def _dense_misfit(spec: ModelSpec, *, qk_norm: bool, bias: bool) -> str | None:
    if reason := _decoder_misfit(spec, "*-", qk_norm=qk_norm):
        return reason
    assert spec.mlp is not None
    if spec.mlp.activation != "swiglu" or (spec.mlp.bias and not bias):
        return "its MLP must be SwiGLU" + ("" if bias else " without bias")
    return None


def _moe_misfit(spec: ModelSpec) -> str | None:
    if reason := _decoder_misfit(spec, "*E", qk_norm=True):
        return reason
    moe = spec.moe
    assert moe is not None
    if moe.activation != "swiglu" or moe.shared_width:
        return "its experts must be SwiGLU, without a shared one"
    if moe.scores != "softmax" or moe.score_scale != 1 or moe.bias_update_rate:
        return "its router must be a softmax without a scale and without a bias on the choice"
    return None


def _two_in_a_layer(mixers: tuple[str, str]) -> Callable[[ModelSpec], Iterator[tuple[str, str, str]]]:
    def places(spec: ModelSpec) -> Iterator[tuple[str, str, str]]:
        for index in range(len(spec.layers)):
            at = f"model.layers.{index}"
            yield f"layers.{index}.0", f"{at}.input_layernorm", f"{at}.{mixers[0]}"
            yield f"layers.{index}.1", f"{at}.post_attention_layernorm", f"{at}.{mixers[1]}"

    return places


def _reads_dense(config: Config, *, qk_norm: bool) -> Config:
    refuse(config, hold={"hidden_act": "silu", "use_sliding_window": False})
    return common(config) | {
        "layers": ["*-"] * count(config, "num_hidden_layers", MAX_LAYERS),
        "attention": attention(config, qk_norm=qk_norm),
        "mlp": {
            "width": config["intermediate_size"],
            "activation": "swiglu",
            "bias": bool(config.get("mlp_bias", False)),
        },
        "norm_eps": config["rms_norm_eps"],
    }


def _reads_moe(config: Config) -> Config:
    hold = {"hidden_act": "silu", "use_sliding_window": False, "decoder_sparse_step": 1, "mlp_only_layers": []}
    refuse(config, hold=hold)
    return common(config) | {
        "layers": ["*E"] * count(config, "num_hidden_layers", MAX_LAYERS),
        "attention": attention(config, qk_norm=True),
        "moe": {
            "num_experts": config["num_experts"] if "num_experts" in config else config["num_local_experts"],
            "top_k": config["num_experts_per_tok"],
            "expert_width": config["moe_intermediate_size"],
            "activation": "swiglu",
            "scores": "softmax",
            "renormalise": bool(config.get("norm_topk_prob", False)),
            "score_scale": 1.0,
            "bias_update_rate": 0.0,
            "sequence_loss_weight": 0.0,
            "balance_loss_weight": config.get("router_aux_loss_coef", 0.001),
        },
        "norm_eps": config["rms_norm_eps"],
    }


def _moe_config(spec: ModelSpec) -> Config:
    moe = spec.moe
    assert moe is not None
    return _decoder_config(spec) | {
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.expert_width,
        "norm_topk_prob": moe.renormalise,
        "router_aux_loss_coef": moe.balance_loss_weight,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _dense_config(spec: ModelSpec) -> Config:
    assert spec.mlp is not None
    return _decoder_config(spec) | {"intermediate_size": spec.mlp.width, "mlp_bias": spec.mlp.bias}


_DECODER = {
    "embedding.weight": "model.embed_tokens.weight",
    "final_norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
_HYBRID = {
    "embedding.weight": "backbone.embeddings.weight",
    "final_norm.weight": "backbone.norm_f.weight",
    "head.weight": "lm_head.weight",
}
_ROTARY = ("model.rotary_emb.",)

ARCHITECTURES: dict[str, Architecture] = {
    each.model_type: each
    for each in (
        Architecture(
            "qwen3",
            "Qwen3ForCausalLM",
            _DECODER,
            lambda config: _reads_dense(config, qk_norm=True),
            _dense_config,
            lambda spec: _dense_misfit(spec, qk_norm=True, bias=False),
            _two_in_a_layer(("self_attn", "mlp")),
            ignored=_ROTARY,
        ),
        Architecture(
            "qwen3_moe",
            "Qwen3MoeForCausalLM",
            _DECODER,
            _reads_moe,
            _moe_config,
            _moe_misfit,
            _two_in_a_layer(("self_attn", "mlp")),
            ignored=_ROTARY,
            absent=frozenset({"gate.e_score_correction_bias"}),
        ),
        Architecture(
            "llama",
            "LlamaForCausalLM",
            _DECODER,
            lambda config: _reads_dense(config, qk_norm=False),
            _dense_config,
            lambda spec: _dense_misfit(spec, qk_norm=False, bias=True),
            _two_in_a_layer(("self_attn", "mlp")),
            ignored=_ROTARY,
        ),
        Architecture(
            "nemotron_h",
            "NemotronHForCausalLM",
            _HYBRID,
            nemotron.reads,
            nemotron.writes,
            nemotron.misfit,
            nemotron.places,
            ignored=("mtp.",),
            zeros=nemotron.zeros,
            useless=nemotron.useless,
        ),
    )
}
