"""Byte-level BPE: training, and the wrapper through which all code encodes and decodes. Imports no torch.

Text is cut by one pattern, nothing is normalised, and every byte has a token, so decoding gives back any text exactly.
The pattern keeps a Hangul run together with its leading space (a word and its particles) and apart from Latin letters
written against it (GPU|를), takes at most three digits at a time so that numbers are composed regularly, joins one
leading sign to a word (`.append`, `_name`) and keeps runs of spaces and of newlines whole (indentation is one token).

Ids: 0 is the end of a document; the other special tokens follow, then the 256 bytes, then merges; reserved tokens fill
up to exactly the size asked for. Special tokens written inside a text are ordinary characters unless the caller says
otherwise, so no document can end itself.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Self

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as RawTokenizer

from trainer.data.manifest import DataError, atomic_write

EOD = "<|endoftext|>"
SPECIAL_TOKENS = (
    EOD,
    "<|im_start|>",
    "<|im_end|>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|think_start|>",
    "<|think_end|>",
)
PATTERN = "|".join(
    (
        r"[^\r\n\p{L}\p{M}\p{N}]?\p{Hangul}+",
        r"[^\r\n\p{L}\p{M}\p{N}]?(?:(?!\p{Hangul})[\p{L}\p{M}])+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
SMALLEST_VOCABULARY = len(SPECIAL_TOKENS) + 256


class Tokenizer:
    """A trained tokenizer."""

    eod_id = 0

    def __init__(self, raw: RawTokenizer, digest: str) -> None:
        self.digest = digest
        self._raw = raw
        self._raw.encode_special_tokens = True

    @classmethod
    def load(cls, directory: str | Path) -> Self:
        """The tokenizer in `directory/tokenizer.json`; its digest is the sha256 of that file.

        Raises:
            DataError: the file is missing or is no tokenizer whose id 0 is the end of a document.
        """
        path = Path(directory) / "tokenizer.json"
        try:
            data = path.read_bytes()
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); run the tokenizer step") from None
        try:
            raw = RawTokenizer.from_buffer(data)
        except ValueError as error:
            raise DataError(f"{path}: not a tokenizer ({error}); run the tokenizer step again") from None
        if raw.token_to_id(EOD) != cls.eod_id:
            raise DataError(f"{path}: id {cls.eod_id} is not {EOD}; use a tokenizer made by the tokenizer step")
        return cls(raw, hashlib.sha256(data).hexdigest())

    @property
    def vocab_size(self) -> int:
        return self._raw.get_vocab_size()

    def encode(self, text: str, *, specials: bool = False) -> list[int]:
        """Ids of `text`, without an end of document. `specials`: special tokens written in the text count as such."""
        self._raw.encode_special_tokens = not specials
        try:
            return self._raw.encode(text, add_special_tokens=False).ids
        finally:
            self._raw.encode_special_tokens = True

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text."""
        return [encoding.ids for encoding in self._raw.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text, special tokens included; bytes that are no UTF-8 (a character cut in two) become U+FFFD."""
        return self._raw.decode(list(ids), skip_special_tokens=False)

    def byte_lengths(self) -> list[int]:
        """UTF-8 bytes of text that each id stands for; special and reserved tokens stand for none."""
        special = self._raw.get_added_tokens_decoder()
        return [0 if n in special else len(self._raw.id_to_token(n)) for n in range(self.vocab_size)]


def train(texts: Iterable[str], vocab_size: int) -> RawTokenizer:
    """A tokenizer of exactly `vocab_size` ids; equal texts give an equal tokenizer.

    Raises:
        ValueError: `vocab_size` has no room for the special tokens and the bytes.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise ValueError(f"tokenizer.vocab_size {vocab_size} is too small; it must be at least {SMALLEST_VOCABULARY}")
    raw = RawTokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    raw.train_from_iterator(texts, trainer)
    missing = vocab_size - raw.get_vocab_size()
    raw.add_special_tokens([AddedToken(f"<|reserved_{n}|>", special=True, normalized=False) for n in range(missing)])
    assert raw.get_vocab_size() == vocab_size
    return raw


def save(raw: RawTokenizer, directory: str | Path) -> None:
    """Write `tokenizer.json`, and `tokenizer_config.json` for transformers' AutoTokenizer."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOD,
        "pad_token": EOD,
        "clean_up_tokenization_spaces": False,
    }
    atomic_write(Path(directory) / "tokenizer.json", raw.to_str(pretty=True).encode())
    atomic_write(Path(directory) / "tokenizer_config.json", json.dumps(config, indent=1).encode() + b"\n")
