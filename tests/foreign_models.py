"""Small models as published by others: weights saved by transformers, and their own tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

SPLIT = r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEXTS = ["대한민국의 수도는 서울이다. ", "The capital of Korea is Seoul. ", "def add(a, b):\n    return a + b\n"] * 40
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' }}"
    "{{ m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)


def _bpe(vocab_size: int, specials: list[str]) -> Tokenizer:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(SPLIT), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    raw.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet))
    raw.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    return raw


def qwen_tokenizer(folder: Path) -> Path:
    """Like Qwen's: special tokens after the others, NFC, the end of a turn as eos, <think> an ordinary token."""
    folder.mkdir(parents=True, exist_ok=True)
    raw = _bpe(300, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    raw.normalizer = normalizers.NFC()
    raw.add_tokens([AddedToken("<think>", special=False), AddedToken("</think>", special=False)])
    raw.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": CHATML}))
    return folder


def llama_tokenizer(folder: Path) -> Path:
    """Like Llama 3's: a token before every text, and another name for the end of a document."""
    folder.mkdir(parents=True, exist_ok=True)
    first, last, turn = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"
    raw = _bpe(290, [first, last, "<|start_header_id|>", "<|end_header_id|>", turn])
    raw.post_processor = processors.TemplateProcessing(
        single=f"{first} $A", special_tokens=[(first, raw.token_to_id(first))]
    )
    raw.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": first,
        "eos_token": {"__type": "AddedToken", "content": last},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(LLAMA)
    return folder
