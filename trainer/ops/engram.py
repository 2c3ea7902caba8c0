"""Engram's memory of each token: n-grams hashed to rows of tables, and the rows that stand there (arXiv 2601.07372).

    idx[n, k] = (x_t·m_0 ⊕ x_{t-1}·m_1 ⊕ … ⊕ x_{t-n+1}·m_{n-1}) mod p[n, k]      n = 2..N, k = 1..K, all in int64

x are the classes of tokens; before the start of a document it is that of PAD_TOKEN. Products stay below 2⁶³ (see
`trainer.kinds.ngrams.multipliers`), so nothing overflows, nothing is negative, and every remainder is the same one.

Legend: B rows, T positions, N tokens of the longest n-gram, K heads, J = (N-1)·K tables, order by order, R rows of all
tables together, W row width, M = J·W, V tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.kinds.ngrams import PAD_TOKEN
from trainer.ops.documents import Documents


class Hash(NamedTuple):
    """The constants of a layer's hash, all int64."""

    class_V: Tensor  # of each token
    multiplier_N: Tensor
    prime_J: Tensor  # rows of each table
    offset_J: Tensor  # where each table begins in the joint one


def engram_reference(ids_BT: Tensor, documents: Documents, hash: Hash, table_RW: Tensor) -> Tensor:
    """The definition, one table after the other: [B, T, M].

    Args:
        ids_BT: int64.
        table_RW: all tables, one after the other; the result may have its dtype or that of matrix products.
    """
    class_V, multiplier_N, prime_J, offset_J = hash
    length, heads, found = ids_BT.shape[1], len(prime_J) // (len(multiplier_N) - 1), []
    for table in range(len(prime_J)):
        mixed_BT = torch.zeros_like(ids_BT)
        for back in range(table // heads + 2):
            token_BT = torch.full_like(ids_BT, PAD_TOKEN)
            for t in range(back, length):
                same_B = documents.seq_idx_BT[:, t] == documents.seq_idx_BT[:, t - back]
                token_BT[:, t] = torch.where(same_B, ids_BT[:, t - back], PAD_TOKEN)
            mixed_BT = mixed_BT.bitwise_xor(class_V[token_BT] * multiplier_N[back])
        found.append(table_RW[mixed_BT % prime_J[table] + offset_J[table]])
    return torch.cat(found, dim=-1)


def engram_torch(ids_BT: Tensor, documents: Documents, hash: Hash, table_RW: Tensor) -> Tensor:
    """See `engram_reference`; in the dtype of the table."""
    return F.embedding(hashed(ids_BT, documents, hash), table_RW).flatten(2)


def hashed(ids_BT: Tensor, documents: Documents, hash: Hash) -> Tensor:
    """[B, T, J] int64 rows in the joint table."""
    class_BT = hash.class_V[ids_BT]

    def earlier(back: int) -> Tensor:
        return torch.where(documents.same_BT(back), class_BT.roll(back, dims=1), hash.class_V[PAD_TOKEN])

    return rows(class_BT, earlier, hash)


def rows(class_BT: Tensor, earlier: Callable[[int], Tensor], hash: Hash) -> Tensor:
    """The same from classes: `earlier(n)` are those of the tokens n places before, [B, T]."""
    orders = hash.multiplier_N.shape[0]
    heads = hash.prime_J.shape[0] // (orders - 1)
    mix_BT = class_BT * hash.multiplier_N[0]
    columns = []
    for back in range(1, orders):
        earlier_BT = earlier(back)
        mix_BT = mix_BT ^ (earlier_BT * hash.multiplier_N[back])
        first = (back - 1) * heads
        columns.append(mix_BT[..., None] % hash.prime_J[first : first + heads])
    return torch.cat(columns, dim=-1) + hash.offset_J
