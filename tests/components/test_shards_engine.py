"""tiktoken and tokenizers give the same ids for texts that are known to be difficult, or tiktoken is not used."""

from __future__ import annotations

import builtins
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from raw_cases import texts
from tokenizers import Regex, pre_tokenizers

from components.shards.engine import Encode, choose_engine, hard_texts, open_engine, vocabulary_texts
from trainer.data.tokenizer import PATTERN, Tokenizer, save, train


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    # Difficult texts among the training texts, so that their runs of blanks, jamo and symbols become tokens.
    sample = [text for source in ("ko", "en", "code", "math") for text in texts(source, 100)]
    save(train(sample + list(hard_texts(100)) * 2, 4096), path)
    return path


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Tokenizer:
    return Tokenizer.load(directory)


def test_tiktoken_is_chosen_for_our_tokenizers(tokenizer: Tokenizer) -> None:
    engine, why = choose_engine(tokenizer, texts("ko", 50))
    assert engine == "tiktoken" and "its ids are those of tokenizers on" in why


@pytest.fixture(scope="module")
def fast(tokenizer: Tokenizer) -> Encode:
    return open_engine("tiktoken", tokenizer)


@settings(deadline=None)
@given(st.text() | st.text(st.characters(categories=["Zs", "Cc", "Lo", "Mn", "Nd", "So"])))
def test_ids_are_equal_on_any_text(tokenizer: Tokenizer, fast: Encode, text: str) -> None:
    assert fast([text]) == [tokenizer.encode(text)]


@pytest.mark.parametrize("run", [" ", "\n", "\t ", "\r\n", " \n", "a", "가", "-", "1", "\u3000", "  x"])
def test_long_runs_neither_break_nor_differ(tokenizer: Tokenizer, fast: Encode, run: str) -> None:
    """tiktoken's regular expressions overflow their stack if a look-ahead follows an unbounded run."""
    text = run * (200_000 // len(run)) + "b"
    assert fast([text]) == [tokenizer.encode(text)]


def _pieces_differ(code_points: range) -> bool:
    """Whether tiktoken splits text differently from `tokenizers`: if every expected piece is a token, ids show it."""
    import tiktoken

    characters = [chr(n) for n in code_points if not 0xD800 <= n < 0xE000]
    text = "|".join(f"a{c}a{c}{c}1{c} {c}  가{c}가-{c}-\n{c}" for c in characters)
    split = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    pieces = [text[a:b].encode() for _, (a, b) in split.pre_tokenize_str(text)]
    ranks = {bytes([n]): n for n in range(256)}
    for piece in pieces:
        ranks.setdefault(piece, len(ranks))
    engine = tiktoken.Encoding("cuts", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
    return engine.encode_ordinary(text) != [ranks[piece] for piece in pieces]


@pytest.mark.parametrize("first", [0x0000, 0x1000, 0x2000, 0x3000, 0xA000, 0xD000, 0xF000, 0x1F000])
def test_both_cut_text_alike_at_every_character(first: int) -> None:
    assert not _pieces_differ(range(first, first + 0x1000))


@pytest.mark.slow
@pytest.mark.proof
def test_both_cut_text_alike_at_every_code_point() -> None:
    assert not [hex(first) for first in range(0, 0x110000, 0x1000) if _pieces_differ(range(first, first + 0x1000))]


def _changed(directory: Path, to: Path, **model: object) -> Tokenizer:
    value = json.loads((directory / "tokenizer.json").read_text())
    value["model"] |= model
    (to / "tokenizer.json").write_text(json.dumps(value))
    return Tokenizer.load(to)


def test_other_ids_are_found_and_tokenizers_taken(directory: Path, tmp_path: Path) -> None:
    merges = json.loads((directory / "tokenizer.json").read_text())["model"]["merges"]
    engine, why = choose_engine(_changed(directory, tmp_path, merges=merges[::-1]), [])
    assert engine == "tokenizers" and why.startswith("tiktoken gives other ids for ")


def test_a_tokenizer_that_does_more_is_not_given_to_tiktoken(directory: Path, tmp_path: Path) -> None:
    value = json.loads((directory / "tokenizer.json").read_text()) | {"normalizer": {"type": "NFC"}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(value))
    engine, why = choose_engine(Tokenizer.load(tmp_path), [])
    assert (engine, why) == ("tokenizers", "the tokenizer does more than cut by one pattern and merge bytes")


def test_without_tiktoken_tokenizers_encodes(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: object, **more: object) -> object:
        if name == "tiktoken":
            raise ModuleNotFoundError("No module named 'tiktoken'")
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    assert choose_engine(tokenizer, []) == ("tokenizers", "No module named 'tiktoken'")


def test_every_token_is_tried(tokenizer: Tokenizer) -> None:
    tried = {n for text in vocabulary_texts(tokenizer) for n in tokenizer.encode(text)}
    whole = {n for n in range(tokenizer.vocab_size) if tokenizer.encode(tokenizer.decode([n])) == [n]}
    assert len(whole) > 1000 and len(whole - tried) < len(whole) / 20
