"""Byte-level BPE: lossless on any text, exact size, the same every time, readable by transformers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as RawTokenizer

from trainer.data.format import Shard, ShardWriter, token_dtype
from trainer.data.manifest import DataError
from trainer.data.tokenizer import EOD, SPECIAL_TOKENS, Tokenizer, save, train

TEXTS = [
    "대한민국의 수도는 서울이다. 서울에서는 한국어를 쓴다. 야옹이는 GPU를 샀다.",
    "def sum(values):\n    total = 0\n    for value in values:\n        total += value\n    return total\n",
    "The capital of South Korea is Seoul; its population was 9411441 in 2023.\r\n\r\nThe end of the text.\n",
] * 5


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    save(train(TEXTS, 600), path)
    return path


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Tokenizer:
    return Tokenizer.load(directory)


ODD_PIECES = [EOD, "<|reserved_0|>", "가", "각", "ㅋ", " ", "\t", "\r", "\n", "a", "12", "🐈\u200d⬛", "e\u0301", "\0"]


@settings(deadline=None)
@given(st.text() | st.lists(st.sampled_from(ODD_PIECES)).map("".join))
def test_any_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_batch([text, "a"]) == [ids, tokenizer.encode("a")]
    assert all(len(SPECIAL_TOKENS) <= i < tokenizer.vocab_size for i in ids)


@settings(deadline=None)
@given(st.binary())
def test_any_bytes_come_back(tokenizer: Tokenizer, data: bytes) -> None:
    ids = tokenizer.encode_bytes(data)
    assert tokenizer.decode_bytes(ids) == data
    assert all(len(SPECIAL_TOKENS) <= i < tokenizer.vocab_size for i in ids)
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return
    assert ids == tokenizer.encode(text)


def test_a_part_of_a_text_has_no_half_characters_at_its_ends(tokenizer: Tokenizer) -> None:
    text = "값 🐈 é 끝"
    ids = tokenizer.encode(text)
    assert len(ids) > len(text), "characters of several ids, or nothing is cut"
    for start in range(len(ids)):
        for stop in range(start, len(ids) + 1):
            part = tokenizer.decode_part(ids[start:stop])
            assert part in text and part == tokenizer.decode(ids[start:stop]).strip("\ufffd")
    stray = tokenizer.encode_bytes(b"a\xffb\xed\x95")
    assert tokenizer.decode_part(stray) == "a\ufffdb", "what the text itself has of them stays"


def test_each_byte_alone_and_within_text_comes_back(tokenizer: Tokenizer) -> None:
    for byte in range(256):
        for data in (bytes([byte]), b"ab" + bytes([byte]) + "가".encode(), "가".encode()[:2] + bytes([byte])):
            assert tokenizer.decode_bytes(tokenizer.encode_bytes(data)) == data
    assert tokenizer.decode_bytes([0, 1]) == b"<|endoftext|><|im_start|>"


def test_end_of_document_is_zero_and_no_text_can_write_it(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([0]) == EOD
    assert 0 not in tokenizer.encode(f"a{EOD}b")
    assert tokenizer.encode(f"{EOD}<|im_start|>a", specials=True)[:2] == [0, 1]
    assert 0 not in tokenizer.encode(EOD), "specials hold for one call only"


def test_half_a_surrogate_pair_is_refused(tokenizer: Tokenizer) -> None:
    """What Python makes of a wrong byte on the command line, and JSON of half an emoji."""
    with pytest.raises(DataError, match=r"not valid Unicode \('a\\udcff'\); write it in UTF-8"):
        tokenizer.encode("a\udcff")
    assert tokenizer.decode(tokenizer.encode("😀")) == "😀"


def test_pattern_cuts_words_digits_and_indentation(directory: Path) -> None:
    raw = RawTokenizer.from_file(str(directory / "tokenizer.json"))
    text = "GPU를 서울에서는 12345개\n\n        x.append(_y)"
    pieces = [text[a:b] for _, (a, b) in raw.pre_tokenizer.pre_tokenize_str(text)]
    assert "|".join(pieces) == "GPU|를| 서울에서는| |123|45|개|\n\n|       | x|.append|(_|y|)"


@pytest.mark.parametrize("vocab_size", [264, 300, 4096])
def test_size_is_exactly_what_was_asked_for(tmp_path: Path, vocab_size: int) -> None:
    save(train(TEXTS[:3], vocab_size), tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.vocab_size == vocab_size
    assert tokenizer.decode(tokenizer.encode(TEXTS[0])) == TEXTS[0]


def test_too_small_a_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.vocab_size 263 is too small; it must be at least 264"):
        train(TEXTS, 263)


@pytest.mark.parametrize("vocab_size", [65_535, 65_536, 65_537])
def test_largest_id_survives_the_token_files(tmp_path: Path, vocab_size: int) -> None:
    save(train(TEXTS, vocab_size), tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    ids = [*tokenizer.encode(TEXTS[0]), vocab_size - 1, 0]
    with ShardWriter(tmp_path / "a", token_dtype(tokenizer.vocab_size)) as writer:
        writer.append(np.array(ids, writer.dtype), np.array([len(ids)]))
    back = Shard(tmp_path / "a").document(0).tolist()
    assert back == ids
    assert tokenizer.decode(back).endswith(f"<|reserved_{vocab_size - 1 - _first_reserved(tokenizer)}|>{EOD}")


def _first_reserved(tokenizer: Tokenizer) -> int:
    return tokenizer.encode("<|reserved_0|>", specials=True)[0]


def test_training_does_not_depend_on_threads_or_hash_seeds(directory: Path) -> None:
    code = f"from trainer.data.tokenizer import *; print(train({TEXTS!r}, 600).to_str(pretty=True), end='')"
    for threads in ("1", "4"):
        environment = os.environ | {"RAYON_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "true"}
        made = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True).stdout
        assert made == (directory / "tokenizer.json").read_bytes()


def test_transformers_opens_it_and_gives_the_same_ids(directory: Path, tokenizer: Tokenizer) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(directory)
    for text in TEXTS[:3]:
        assert theirs(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text)
    assert theirs.eos_token_id == theirs.pad_token_id == tokenizer.eod_id
    assert len(theirs) == tokenizer.vocab_size
    assert theirs.decode(tokenizer.encode(TEXTS[1])) == TEXTS[1]


def test_what_is_no_tokenizer_is_refused(tmp_path: Path, directory: Path) -> None:
    with pytest.raises(DataError, match=r"tokenizer\.json: not there; run the tokenizer step"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer\.json: not a tokenizer"):
        Tokenizer.load(tmp_path)
    changed = (directory / "tokenizer.json").read_text().replace(EOD, "<|other|>")
    (tmp_path / "tokenizer.json").write_text(changed)
    with pytest.raises(DataError, match=r"no token for the end of a document"):
        Tokenizer.load(tmp_path)
