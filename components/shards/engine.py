"""Choose the engine that encodes the shards: tiktoken, several times faster, if it gives the ids of `tokenizers`.

`tokenizers` defines the ids: it merges by its list of merges. tiktoken merges the pair whose union has the lowest id.
The two agree if ids are in the order of the merges and both interpret the pattern alike. This is tested on hard texts,
on the vocabulary itself and on a sample of the data before anything is encoded.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

from trainer.data.tokenizer import Tokenizer
from trainer.data.vocabulary import SPECIAL_TOKENS

EngineName = Literal["tiktoken", "tokenizers"]
Encode = Callable[[Sequence[str]], list[list[int]]]

_PIECES = (
    *SPECIAL_TOKENS,
    *("<|reserved_0|>", "<|", "|>", " ", "  ", " " * 127, " " * 128, " " * 129, "\t", "\n", "\n" * 129, "\r", "\r\n"),
    *("\u00a0", "\u3000", "\u2028", "\u0085", "\u200b", "\x00", "\x1c", "\x7f", "\ufeff", "\uffff", "\U0010ffff"),
    *("가", "힣", "서울에서는", "ㄱ", "ㅏ", "ㅋㅋㅋ", "\u1100\u1161\u11a8", "\u1112", "ㆍ", "〮", "㈀", "㉠", "ﾡ"),
    *("a", "Z", "é", "e\u0301", "ß", "İ", "ǅ", "中文", "かな", "ไทย", "हिन्दी", "עברית", "العربية", "_", ".", "-", "#"),
    *("0", "12", "1234567", "٣", "½", "Ⅳ", "①", "🐈\u200d⬛", "👨\u200d👩\u200d👧", "🇰🇷", "#️⃣", "👍🏽", "→", "√", "₩"),
    *("'s", "'LL", "don't", "x=1;", "def f(x):\n    return", "\\frac{1}{2}", "http://a.b/c?d=e&f", "GPU를"),
)


def open_engine(name: EngineName, tokenizer: Tokenizer) -> Encode:
    """A function from texts to ids that treats special tokens in the texts as ordinary characters.

    Raises:
        ImportError: tiktoken is not installed.
        ValueError: tiktoken does not support this tokenizer.
    """
    if name == "tokenizers":
        return tokenizer.encode_batch
    import tiktoken

    pattern, ranks = tokenizer.bpe()
    encode = tiktoken.Encoding("yaongi", pat_str=pattern, mergeable_ranks=ranks, special_tokens={}).encode_ordinary
    return lambda texts: [encode(text) for text in texts]


def with_markup(encode: Encode, tokenizer: Tokenizer) -> Encode:
    """The same function, but it encodes markup tokens in the texts as single tokens."""
    specials = {token: [n] for token, n in tokenizer.markup.items()}
    markup = re.compile(f"({'|'.join(map(re.escape, specials))})")

    def encode_marked(texts: Sequence[str]) -> list[list[int]]:
        cut = [[piece for piece in markup.split(text) if piece] for text in texts]
        ordinary = iter(encode([piece for pieces in cut for piece in pieces if piece not in specials]))
        return [[n for piece in pieces for n in specials.get(piece) or next(ordinary)] for pieces in cut]

    return encode_marked


def choose_engine(tokenizer: Tokenizer, sample: Iterable[str]) -> tuple[EngineName, str]:
    """The fastest engine with correct ids, and the reason for the choice."""
    try:
        encode = open_engine("tiktoken", tokenizer)
    except (ImportError, ValueError) as error:
        return "tokenizers", str(error)
    tried = 0
    for texts in (list(hard_texts()), list(vocabulary_texts(tokenizer)), list(sample)):
        for text, right, fast in zip(texts, tokenizer.encode_batch(texts), encode(texts), strict=True):
            if right != fast:
                return "tokenizers", f"tiktoken gives other ids for {_excerpt(text)}"
        tried += len(texts)
    return "tiktoken", f"its ids are those of tokenizers on {tried:,} texts"


def hard_texts(count: int = 400) -> Iterator[str]:
    """All bytes, and random sequences of pieces and code points that are hard for tokenizers."""
    rng = random.Random(0)
    yield bytes(range(256)).decode("latin-1")
    yield from _PIECES
    for piece in ("a", " ", "가", "ab ", "\n", "^"):
        yield piece * 3000
    for _ in range(count):
        yield "".join(_any_character(rng) if rng.random() < 0.2 else rng.choice(_PIECES) for _ in range(20))


def vocabulary_texts(tokenizer: Tokenizer, at_once: int = 200) -> Iterator[str]:
    """Every token on its own line, then every token next to another one."""
    tokens = [tokenizer.decode([n]) for n in range(tokenizer.vocab_size)]
    others = random.Random(0).sample(tokens, len(tokens))
    for first in range(0, len(tokens), at_once):
        some = slice(first, first + at_once)
        yield "\n".join(tokens[some])
        yield "".join(a + b for a, b in zip(tokens[some], others[some], strict=True))


def _any_character(rng: random.Random) -> str:
    number = rng.randrange(0x110000 - 0x800)
    return chr(number if number < 0xD800 else number + 0x800)  # without surrogates, which are not text


def _excerpt(text: str, length: int = 40) -> str:
    return repr(text if len(text) <= length else text[:length] + "…")
