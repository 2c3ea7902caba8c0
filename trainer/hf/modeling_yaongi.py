"""A yaongi model in transformers (5 or newer), loaded with `trust_remote_code=True`.

A layer is a string of sublayers, each x ← x + mixer(norm(x)): `M` Mamba-2, `E` mixture of experts, `*` grouped-query
attention, `-` MLP, `N` Engram n-gram memory. A row is one document. It may be padded on either side, but generation
cannot continue from the cache of a row that is padded on the right.

Legend: B rows, T new positions, S cached and new positions, D hidden, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_yaongi import YaongiConfig
from .mixers_yaongi import MIXERS, RMSNorm, State, Step, rotary


class YaongiCache(Cache):
    """A State for each sublayer, and one at the end for the model itself: which positions are not padding."""

    def __init__(self, num_sublayers: int) -> None:
        super().__init__(layers=[State() for _ in range(num_sublayers + 1)])

    def get_seq_length(self, layer_idx: int = 0) -> int:
        seen_BS = self.layers[-1].get("seen")
        return 0 if seen_BS is None else seen_BS.shape[1]


class YaongiSublayer(nn.Module):
    def __init__(self, config: YaongiConfig, symbol: str, layer: int) -> None:
        super().__init__()
        section, mixer = MIXERS[symbol]
        spec = getattr(config, section)
        if isinstance(spec, list):
            spec = next(entry for entry in spec if entry["layer"] == layer)
        self.norm = nn.Identity() if symbol == "N" else RMSNorm(config.hidden_size, config.norm_eps)
        self.mixer = mixer(config, spec)

    def forward(self, x_BTD: Tensor, step: Step, state: State) -> Tensor:
        return x_BTD + self.mixer(self.norm(x_BTD), step, state)


class YaongiForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = YaongiConfig
    base_model_prefix = ""
    _no_split_modules = ["YaongiSublayer"]
    _skip_keys_device_placement = ["past_key_values", "state"]
    _tied_weights_keys = {"head.weight": "embedding.weight"}
    _keep_in_fp32_modules_strict = ["norm", "A_log", "mixer.D", "dt_bias", "router", "bias_E"]
    _is_stateful = True  # states cannot be rolled back, which assisted generation needs
    _supports_sdpa = True

    def __init__(self, config: YaongiConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            nn.ModuleList(YaongiSublayer(config, symbol, index) for symbol in layer)
            for index, layer in enumerate(config.layers or [])
        )
        self.final_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        for parameter in module.parameters(recurse=False):
            if parameter.dim() == 3:  # experts
                nn.init.normal_(parameter, std=self.config.initializer_range)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # `forward` makes its own cache

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embedding = value

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.head = new_embeddings

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: YaongiCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """Logits of the token after each position.

        Args:
            input_ids: the new positions, [B, T].
            attention_mask: [B, S] for the cached and the new positions, 0 at padding; None: no new position is padding.
            position_ids: rotary positions, [B, T]; None counts from the first token of each row.
            labels: [B, T], equal to the ids, or -100 where nothing is predicted; gives `loss`, a mean.
            logits_to_keep: the number of positions at the end, or their indices; 0: all positions.
        """
        if use_cache is None or past_key_values is not None:
            use_cache = past_key_values is not None or (self.config.use_cache and not self.training)
        cache = YaongiCache(sum(map(len, self.layers))) if past_key_values is None else past_key_values
        if not isinstance(cache, YaongiCache):
            raise ValueError(f"past_key_values is a {type(cache).__name__}; pass none, or a YaongiCache of this model")
        step = self._step(input_ids, attention_mask, position_ids, cache.layers[-1])
        x_BTD = self.embedding(input_ids)
        hidden_states, states = [], iter(cache.layers)
        for layer in self.layers:
            hidden_states.append(x_BTD)
            for sublayer, state in zip(layer, states, strict=False):
                x_BTD = sublayer(x_BTD, step=step, state=state)
                if not use_cache:
                    state.clear()
        x_BTD = self.final_norm(x_BTD)
        read_BTD = x_BTD * (self.config.mup["base_hidden"] / self.config.hidden_size) if self.config.mup else x_BTD
        if not isinstance(logits_to_keep, int) or logits_to_keep > 0:
            read_BTD = read_BTD[:, slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep]
        logits_BTV = self.head(read_BTD)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits_BTV, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        output = CausalLMOutputWithPast(
            loss=loss,
            logits=logits_BTV,
            past_key_values=cache if use_cache else None,
            hidden_states=(*hidden_states, x_BTD) if output_hidden_states else None,
        )
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def _step(self, ids_BT: Tensor, mask_BS: Tensor | None, position_BT: Tensor | None, state: State) -> Step:
        length = ids_BT.shape[1]
        new_BT = torch.ones_like(ids_BT, dtype=torch.bool) if mask_BS is None else mask_BS[:, -length:].bool()
        seen_BS = state.all("seen", new_BT)
        past, padded = seen_BS.shape[1] - length, not bool(seen_BS.all())
        attention, allowed_B1TS, turn_BT1W = self.config.attention, None, None
        if attention and (padded or (past and length > 1)):
            index_S = torch.arange(seen_BS.shape[1], device=ids_BT.device)
            itself_TS = index_S[past:, None] == index_S  # also for padding: a softmax over nothing is NaN
            earlier_TS = index_S[past:, None] > index_S
            allowed_B1TS = (itself_TS | (earlier_TS & seen_BS[:, None]))[:, None]
        if attention and attention["rope_theta"] is not None:
            if position_BT is None:
                position_BT = (seen_BS.cumsum(1)[:, past:] - 1).clamp(min=0)
            turn_BT1W = rotary(attention, position_BT)
        return Step(ids_BT, new_BT[..., None] if padded else None, allowed_B1TS, turn_BT1W)
