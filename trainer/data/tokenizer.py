"""Byte-level BPE: training, and the wrapper through which all code encodes and decodes. Imports no torch.

Text is cut by one pattern, nothing is normalised, and every byte has a token, so decoding gives back any text exactly.
The pattern keeps a Hangul run together with its leading space (a word and its particles) and separates it from adjacent
Latin letters (GPU|를), takes at most three digits at a time so that numbers are split regularly, joins one leading sign
to a word (`.append`, `_name`) and keeps runs of up to 128 spaces or newlines whole (indentation is one token). It uses
only syntax that the regular expressions of `tokenizers` (Oniguruma) and tiktoken (Rust) interpret alike; the bound
exists because tiktoken's engine fails on look-ahead after a megabyte of blanks.

Ids: 0 is the end of a document; then the other special tokens, the 256 bytes and the merges; reserved tokens fill up to
exactly the requested size. Special tokens written in a text are ordinary characters unless the caller says otherwise,
so no document can end itself. Bytes that are not UTF-8 have ids too (`encode_bytes`), so any bytes survive a round
trip.

The wrapper accepts any byte-level BPE, also that of another model (`tokenizer.from`), whose rules and ids may differ.
"""

from __future__ import annotations

import hashlib
import json
import re
from codecs import getincrementaldecoder
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as RawTokenizer

from trainer.data.vocabulary import EOD, SMALLEST_VOCABULARY, SPECIAL_TOKENS
from trainer.errors import DataError
from trainer.files import atomic_write, unreadable

PATTERN = "|".join(
    (
        r"[^\r\n\p{L}\p{M}\p{N}]?\p{Hangul}+",
        r"[^\r\n\p{L}\p{M}\p{N}]?[[\p{L}\p{M}]&&\P{Hangul}]+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*",
        r"\s{0,128}[\r\n]{1,128}",
        r"\s{1,128}(?!\S)",
        r"\s",
    )
)
# The characters that represent bytes in the vocabulary: printable bytes as themselves, the others from U+0100 on.
_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_OTHERS = (byte for byte in range(256) if byte not in _PRINTABLE)
BYTE_OF = {chr(b): b for b in _PRINTABLE} | {chr(0x100 + n): b for n, b in enumerate(_OTHERS)}


# The files of a tokenizer, by their names in transformers; only the first is required.
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)


def files_of(directory: Path) -> list[Path]:
    """The files of FILES that exist in a directory."""
    return [directory / name for name in FILES if (directory / name).is_file()]


class Tokenizer:
    """A trained tokenizer.

    Attributes:
        digest: sha256 of tokenizer.json.
        eod, eod_id: the end of a document.
        prefix: ids that its own rules put before every text, as Llama's do; most tokenizers have none.
        vocab_size: the highest id plus one.
    """

    def __init__(self, raw: RawTokenizer, digest: str, eod: str) -> None:
        ids = raw.get_vocab()
        self.digest, self.eod, self.eod_id = digest, eod, ids[eod]
        self.prefix = [n for n in raw.encode("", add_special_tokens=True).ids if n != self.eod_id]
        self.vocab_size = max(ids.values()) + 1
        self._raw = raw
        self._raw.encode_special_tokens = True

    @classmethod
    def load(cls, directory: str | Path) -> Self:
        """The tokenizer in `directory/tokenizer.json`. The end of a document is <|endoftext|>, or the `eos_token` of
        tokenizer_config.json if the vocabulary does not have that.

        Raises:
            DataError: the file is missing, not a tokenizer, or a tokenizer that does not keep every byte.
        """
        path = Path(directory) / "tokenizer.json"
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise DataError(f"{path}: not there; run the tokenizer step") from None
        except OSError as error:
            raise unreadable(path, error) from None
        try:
            raw = RawTokenizer.from_buffer(data)
        except ValueError as error:
            raise DataError(f"{path}: not a tokenizer ({error}); download it or run the tokenizer step again") from None
        # Some are stored with the limits of whoever used them last. transformers ignores both too.
        raw.no_truncation()
        raw.no_padding()
        written = json.loads(data)
        is_bpe = written["model"].get("type", "BPE") == "BPE" and "ByteLevel" in str(written.get("decoder"))
        if not is_bpe or raw.get_vocab_size() == 0:
            raise DataError(
                f"{path}: not byte-level BPE, which keeps every byte of a text; use a model with such a tokenizer "
                "(GPT-2, Llama 3, Qwen and Nemotron have one)"
            )
        eod = EOD if raw.token_to_id(EOD) is not None else _eos_token(Path(directory) / "tokenizer_config.json")
        if eod is None or raw.token_to_id(eod) is None:
            raise DataError(
                f"{path}: has no token for the end of a document: neither {EOD} nor, in tokenizer_config.json beside "
                "it, an eos_token that it knows; add one of them"
            )
        return cls(raw, hashlib.sha256(data).hexdigest(), eod)

    @property
    def is_own(self) -> bool:
        """Whether it was trained here: it has our special tokens."""
        return self.ids().keys() >= set(SPECIAL_TOKENS)

    @property
    def added(self) -> set[str]:
        """The tokens that are not results of merges."""
        return {token.content for token in self._raw.get_added_tokens_decoder().values()}

    @property
    def markup(self) -> dict[str, int]:
        """The tokens that a chat template may write, and their ids. For a tokenizer that was trained here these are
        SPECIAL_TOKENS without the end of a document, which no text contains."""
        if self.is_own:
            ids = self.ids()
            return {token: ids[token] for token in SPECIAL_TOKENS if token != self.eod}
        return {token.content: n for n, token in self._raw.get_added_tokens_decoder().items() if token.special}

    def begun(self, ids: list[int]) -> list[int]:
        """The ids of a text, preceded by the prefix."""
        return ids if ids[: len(self.prefix)] == self.prefix else [*self.prefix, *ids]

    def document(self, ids: list[int]) -> list[int]:
        """The ids of a text as a document, with the prefix and the end of a document. May change `ids`."""
        ids = self.begun(ids)
        if ids[-1:] != [self.eod_id]:
            ids.append(self.eod_id)
        return ids

    def ids(self) -> dict[str, int]:
        """Every token as the vocabulary writes it, and its id."""
        ids: dict[str, int] = self._raw.get_vocab(with_added_tokens=True)
        return ids

    def encode(self, text: str, *, specials: bool = False) -> list[int]:
        """Ids of `text`, without an end of document. `specials`: special tokens written in the text count as such.

        Raises:
            DataError: the text has half of a surrogate pair, which a wrong byte on the command line becomes.
        """
        self._raw.encode_special_tokens = not specials
        try:
            return self._raw.encode(text, add_special_tokens=False).ids
        except TypeError:
            raise DataError(f"a text is not valid Unicode ({text[:40]!r}); write it in UTF-8") from None
        finally:
            self._raw.encode_special_tokens = True

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text."""
        return [encoding.ids for encoding in self._raw.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text, including special tokens; bytes that are not UTF-8 (a character cut in two) become U+FFFD."""
        return self._raw.decode(list(ids), skip_special_tokens=False)

    def decode_part(self, ids: Sequence[int]) -> str:
        """`decode` for a slice of ids: a partial character at either end is left out instead of becoming U+FFFD."""
        data = self.decode_bytes(ids)
        start = next((n for n, byte in enumerate(data[:3]) if byte & 0xC0 != 0x80), min(len(data), 3))
        return getincrementaldecoder("utf-8")("replace").decode(data[start:])

    def encode_bytes(self, data: bytes) -> list[int]:
        """Ids of any bytes; a byte outside any UTF-8 character gets its single-byte id."""
        text = data.decode("utf-8", "surrogateescape")
        ids: list[int] = []
        for stray, whole in re.findall("([\udc80-\udcff])|([^\udc80-\udcff]+)", text):
            ids += self.encode(whole) if whole else [self._byte_ids[ord(stray) - 0xDC00]]
        return ids

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The exact bytes of the ids; special tokens as written. Ids that pad a model's vocabulary have no bytes."""
        return b"".join(self._bytes[n] for n in ids if n < self.vocab_size)

    def byte_lengths(self) -> list[int]:
        """UTF-8 bytes of text per id; 0 for special and reserved tokens."""
        special = self._raw.get_added_tokens_decoder()
        return [0 if n in special else len(self._bytes[n]) for n in range(self.vocab_size)]

    def bpe(self) -> tuple[str, dict[bytes, int]]:
        """The data for another BPE engine: the pattern that splits text, and the id of each ordinary token by its
        bytes.

        Raises:
            ValueError: the tokenizer does more than cut by one pattern and merge bytes.
        """
        value = json.loads(self._raw.to_str())
        match value:
            case {
                "normalizer": None,
                "post_processor": None,
                "pre_tokenizer": {
                    "pretokenizers": [
                        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
                        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
                    ]
                },
            }:
                special = self._raw.get_added_tokens_decoder()
                return pattern, {self._bytes[n]: n for n in range(self.vocab_size) if n not in special}
        raise ValueError("the tokenizer does more than cut by one pattern and merge bytes")

    @cached_property
    def _bytes(self) -> list[bytes]:
        """The bytes of each id."""
        special = self._raw.get_added_tokens_decoder()
        texts = {n: text for text, n in self._raw.get_vocab().items()}
        tokens = [texts.get(n, "") for n in range(self.vocab_size)]  # some vocabularies have gaps
        known = BYTE_OF.keys()  # some vocabularies also have entries of other characters, which no merge makes
        exact = [n in special or not known >= set(text) for n, text in enumerate(tokens)]
        return [t.encode() if exact[n] else bytes(map(BYTE_OF.__getitem__, t)) for n, t in enumerate(tokens)]

    @cached_property
    def _byte_ids(self) -> list[int]:
        ids = self._raw.get_vocab()
        return [ids[character] for _, character in sorted((b, c) for c, b in BYTE_OF.items())]


def _eos_token(config: Path) -> str | None:
    try:
        token: Any = json.loads(config.read_bytes()).get("eos_token")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise unreadable(config, error) from None
    except (ValueError, AttributeError):
        raise DataError(f"{config}: not a JSON object; download it again") from None
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def train(texts: Iterable[str], vocab_size: int) -> RawTokenizer:
    """Train a tokenizer of exactly `vocab_size` ids; equal texts give an equal tokenizer.

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
    atomic_write(Path(directory) / "tokenizer.json", raw.to_str(pretty=True).encode())
    atomic_write(Path(directory) / "tokenizer_config.json", config_text(EOD))


def config_text(eod: str) -> bytes:
    """tokenizer_config.json of a tokenizer that has no other rules."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": eod,
        "pad_token": eod,
        "clean_up_tokenization_spaces": False,
    }
    return json.dumps(config, indent=1).encode() + b"\n"
