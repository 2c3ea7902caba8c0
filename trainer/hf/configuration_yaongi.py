"""Configuration of a yaongi model in transformers: its spec, under the names of transformers where those exist."""

from transformers import PretrainedConfig


class YaongiConfig(PretrainedConfig):
    """`layers` and the sections of the kinds are those of the model's spec; an Engram also has its `table_rows`."""

    model_type = "yaongi"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 1
    hidden_size: int = 1
    num_hidden_layers: int = 0
    max_position_embeddings: int = 0
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    use_cache: bool = True
    norm_eps: float = 1e-5
    layers: list | None = None
    mamba: dict | None = None
    attention: dict | None = None
    moe: dict | None = None
    mlp: dict | None = None
    engram: list | None = None
    mup: dict | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list | None = None
