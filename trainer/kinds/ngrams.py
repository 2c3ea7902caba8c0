"""Integer arithmetic of Engram's hash: token classes, multipliers, table sizes. Imports no torch.

numpy and tokenizers are imported where they are needed: whoever reads a job asks for the sizes of its tables.

Equal, value by value, to the authors' reference code (arXiv 2601.07372): the test vectors were made with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from trainer.errors import DataError

HASH_SEED = 0
LAYER_SEED_STEP = 10007
PAD_TOKEN = 0


def token_classes(tokenizer_json: str | Path) -> list[int]:
    """Class of each token id, numbered in order of first appearance.

    Tokens share a class when their decoded texts agree after NFKC → NFD → stripped accents → lower case → one space
    for each run of blanks, trimmed unless it is all that there is. A token that is no valid text by itself (part of a
    UTF-8 sequence) is classed by its raw string.

    Raises:
        DataError: the file is missing or no tokenizer.
        UnreadableError: its volume does not give it.
    """
    from tokenizers import Regex, Tokenizer, normalizers

    from trainer.files import unreadable

    try:
        tokenizer = Tokenizer.from_str(Path(tokenizer_json).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{tokenizer_json}: not there; run the tokenizer step") from None
    except OSError as error:
        raise unreadable(tokenizer_json, error) from None
    except Exception as error:  # the tokenizers library raises bare Exception for a malformed file
        raise DataError(f"{tokenizer_json}: not a readable tokenizer.json ({error})") from None
    blank = "\ue000"
    normalise = normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.NFD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"[ \t\r\n]+"), " "),
            normalizers.Replace(Regex(r"^ $"), blank),
            normalizers.Strip(),
            normalizers.Replace(blank, " "),
        ]
    )
    numbers: dict[str, int] = {}
    classes = []
    for token in range(tokenizer.get_vocab_size(with_added_tokens=True)):
        text = tokenizer.decode([token], skip_special_tokens=False)
        key = tokenizer.id_to_token(token) if "�" in text else None
        key = key or normalise.normalize_str(text) or text
        classes.append(numbers.setdefault(key, len(numbers)))
    return classes


def multipliers(layer: int, max_order: int, num_classes: int) -> list[int]:
    """Odd multipliers of a layer, one for each position of the longest n-gram; id · m never exceeds 2⁶³ - 1."""
    import numpy as np

    half = max(1, (2**63 - 1) // num_classes // 2)
    drawn = np.random.default_rng(HASH_SEED + LAYER_SEED_STEP * layer).integers(0, half, size=max_order, dtype=np.int64)
    return [2 * int(value) + 1 for value in drawn]


class Tables(Protocol):
    """How many tables a layer has, and how long they are at least."""

    @property
    def max_order(self) -> int: ...
    @property
    def rows_per_head(self) -> int: ...
    @property
    def num_heads(self) -> int: ...


def table_primes(engrams: Sequence[Tables]) -> list[list[int]]:
    """Rows of each table of each layer: order by order, head by head, the next prime from `rows_per_head` on.

    Layers that agree in orders, rows and heads draw from one sequence, so that no two of their tables share a prime.
    """
    taken: dict[tuple[int, int, int], set[int]] = {}
    primes_by_layer = []
    for spec in engrams:
        used = taken.setdefault((spec.max_order, spec.rows_per_head, spec.num_heads), set())
        primes: list[int] = []
        for _order in range(2, spec.max_order + 1):
            candidate = spec.rows_per_head
            for _head in range(spec.num_heads):
                while candidate in used or not _is_prime(candidate):
                    candidate += 1
                used.add(candidate)
                primes.append(candidate)
        primes_by_layer.append(primes)
    return primes_by_layer


def _is_prime(number: int) -> bool:
    return number >= 2 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))
