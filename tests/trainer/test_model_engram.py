"""Engram: golden hash indices, token classes, and gate and convolution against formulas written out independently."""

import math

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn

from trainer.errors import DataError
from trainer.kinds.engram import EngramSpec
from trainer.kinds.ngrams import multipliers, table_primes, token_classes
from trainer.model.engram import Engram, NgramHash
from trainer.model.hybrid import build_model
from trainer.modelspec import ModelSpec
from trainer.ops import OPS, Documents

LAYER_2 = EngramSpec(layer=2, max_order=3, rows_per_head=200_000, width_per_order=512, compress_tokens=False)
LAYER_26 = EngramSpec(layer=26, max_order=4, rows_per_head=500_000, width_per_order=512, compress_tokens=False)
IDS = [5, 17, 32767, 42, 9]


def hash_of(spec: EngramSpec, primes: list[int], vocab_size: int = 32768) -> NgramHash:
    ngram_hash = NgramHash(spec, vocab_size, primes)
    ngram_hash.set_constants(None)
    return ngram_hash


# Values made with the authors' reference code (multipliers, primes and indices of the two layers of h100-4b).
@pytest.mark.parametrize(
    ("layer", "max_order", "expected"),
    [
        (2, 3, [231362249466941, 112185538308017, 68486777617871]),
        (26, 4, [58657619064619, 6383182041937, 68372515320043, 264836426115551]),
    ],
)
def test_multipliers_are_golden(layer, max_order, expected):
    assert multipliers(layer, max_order, 32768) == expected


def test_primes_are_golden_and_exclude_each_other():
    first, second = table_primes([LAYER_2, LAYER_26])
    assert (first[0], first[7], first[8], first[15]) == (200003, 200063, 200087, 200183)
    assert (second[16], second[23]) == (500209, 500287)
    assert len(set(first)) == 16 and len(set(second)) == 24


def test_layers_of_equal_tables_share_no_prime_and_others_do_not_care():
    twin = LAYER_2.updated({"layer": 8})
    first, second, other = table_primes([LAYER_2, twin, LAYER_26])
    assert not set(first) & set(second)
    assert other == table_primes([LAYER_26])[0]


@pytest.mark.parametrize(
    ("spec", "column", "expected"),
    [
        (LAYER_2, 0, [26274, 191611, 152979, 92344, 53838]),
        (LAYER_2, 15, [69376, 94434, 88539, 141332, 132988]),
        (LAYER_26, 16, [122359, 168137, 62058, 122771, 262667]),
        (LAYER_26, 23, [32352, 271396, 338098, 79278, 447786]),
    ],
)
def test_indices_are_golden(spec, column, expected):
    primes = table_primes([spec])[0]
    rows_BTJ = hash_of(spec, primes)(torch.tensor([IDS]), Documents.one_per_row(1, 5))
    assert (rows_BTJ[0, :, column] - sum(primes[:column])).tolist() == expected
    assert rows_BTJ.max() < sum(primes)


def test_ngrams_stop_at_the_start_of_their_document():
    primes = table_primes([LAYER_26])[0]
    ngram_hash = hash_of(LAYER_26, primes)
    alone_TJ = ngram_hash(torch.tensor([IDS]), Documents.one_per_row(1, 5))[0]
    packed = torch.tensor([[7, 8, 11, *IDS, 3]])
    packed_TJ = ngram_hash(packed, Documents(torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 2]])))[0]
    assert torch.equal(packed_TJ[3:8], alone_TJ)


def byte_level(text: str) -> str:
    """A text as stored by byte-level BPE: one printable character per UTF-8 byte."""
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text)
    return "".join(piece for piece, _span in pieces)


@pytest.fixture
def tokenizer_json(tmp_path):
    texts = ["<eod>", "The", "the", "THE", " the", "Thé", " ", "\n\t", "가", "cat", "ﬁ", "fi"]
    tokens = [*map(byte_level, texts), byte_level("é")[0], byte_level("가")[0]]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=tokens[0]))
    tokenizer.decoder = decoders.ByteLevel()
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def test_token_classes_join_case_accents_and_spaces(tokenizer_json):
    eod, the, lower, upper, spaced, accented, *others = token_classes(tokenizer_json)
    space, newline, korean, cat, ligature, letters, byte_of_accent, byte_of_korean = others
    assert (eod, the) == (0, 1)
    assert the == lower == upper == spaced == accented
    assert space == newline == 2  # blanks alone stay one blank
    assert ligature == letters  # compatibility forms
    # Bytes that are no text by themselves are told apart by their raw token.
    assert (korean, cat, ligature, byte_of_accent, byte_of_korean) == (3, 4, 5, 6, 7)


def test_token_classes_of_a_file_that_is_none(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text("{")
    with pytest.raises(DataError, match=r"tokenizer\.json: not a readable tokenizer\.json"):
        token_classes(path)


def test_compression_is_used_and_must_be_given():
    spec = ModelSpec(
        vocab_size=32,
        hidden=16,
        layers=["N"],
        engram=[{"layer": 0, "rows_per_head": 50, "width_per_order": 8, "num_heads": 2}],
    )
    with pytest.raises(ValueError, match="compress_tokens needs the token classes"):
        build_model(spec, seed=0)
    with pytest.raises(ValueError, match="vocab_size 32 is smaller than the tokenizer's 33"):
        build_model(spec, seed=0, token_classes=[0] * 33)
    model = build_model(spec, seed=0, token_classes=[0, 1, 1, 2, *range(3, 28)])
    seq_idx_BT = torch.zeros(1, 4, dtype=torch.int32)
    ngram_hash = model.layers[0][0].mixer.hash
    same = [ngram_hash(torch.tensor([ids]), Documents(seq_idx_BT)) for ids in ([3, 1, 2, 1], [3, 2, 1, 2])]
    assert torch.equal(*same)
    other = ngram_hash(torch.tensor([[3, 1, 2, 4]]), Documents(seq_idx_BT))
    assert not torch.equal(other, same[0])


def test_gate_value_and_convolution_equal_the_formula():
    """One document, computed position by position in numpy fp64 from the paper's text and the reference code."""
    torch.manual_seed(0)
    spec = EngramSpec(layer=1, max_order=3, rows_per_head=20, width_per_order=8, num_heads=2, compress_tokens=False)
    hidden, length = 12, 14
    model = ModelSpec(vocab_size=40, hidden=hidden, layers=["M", "N"], mamba={"num_heads": 1}, engram=[spec])
    engram = Engram(model, spec, {name: OPS[name].backends["torch"].function for name in ("conv", "engram")})
    with torch.no_grad():
        for parameter in engram.parameters():
            parameter.normal_(0, 1)
    engram.hash.set_constants(None)
    ids_BT, h_BTD = torch.randint(0, 40, (1, length)), torch.randn(1, length, hidden)
    h_BTD[0, 3] = 0  # g = 0: the gate is one half
    documents = Documents.one_per_row(1, length)
    found = engram(h_BTD, nn.Identity(), ids_BT, documents).y_BTD[0].detach().numpy()

    weights = {name: parameter.detach().double().numpy() for name, parameter in engram.named_parameters()}
    rows = engram.hash(ids_BT, documents)[0].numpy()

    def rms(x, weight, eps):
        return x / np.sqrt((x**2).mean() + eps) * weight

    u = []
    for t in range(length):
        memory = np.concatenate([weights["tables.weight"][row] for row in rows[t]])
        eps = np.finfo(np.float32).eps
        key = rms(weights["key_proj.weight"] @ memory, weights["key_norm.weight"], eps)
        query = rms(h_BTD[0, t].double().numpy(), weights["query_norm.weight"], eps)
        g = key @ query / math.sqrt(hidden)
        gate = 1 / (1 + math.exp(-np.sign(g) * math.sqrt(max(abs(g), 1e-6))))
        if t == 3:
            assert gate == 0.5
        u.append(gate * (weights["value_proj.weight"] @ memory))
    for t in range(length):
        mixed = np.zeros(hidden)
        for tap in range(4):
            source = t - (3 - tap) * 3
            if source >= 0:
                mixed += weights["conv.weight"][:, tap] * rms(u[source], weights["conv_norm.weight"], 1e-5)
        np.testing.assert_allclose(found[t], u[t] + mixed / (1 + np.exp(-mixed)), rtol=1e-4, atol=1e-5)


def test_at_the_start_the_convolution_adds_nothing():
    spec = ModelSpec(
        vocab_size=32,
        hidden=16,
        layers=["N"],
        engram=[{"layer": 0, "rows_per_head": 50, "width_per_order": 8, "num_heads": 2, "compress_tokens": False}],
    )
    engram = build_model(spec, seed=0).layers[0][0].mixer
    assert engram.conv.weight.eq(0).all()
    ids_BT, h_BTD, documents = torch.randint(0, 32, (1, 6)), torch.randn(1, 6, 16), Documents.one_per_row(1, 6)
    engram.recall(h_BTD, ids_BT, documents).square().sum().backward()
    assert engram.conv.weight.grad.ne(0).any()  # and can leave zero
