"""Shards of raw text in which hygiene leaves documents out, or whose source is written in chat markup."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from raw_cases import small_job, texts, write_raw

from components.hygiene import step as hygiene_step
from components.shards import step
from components.shards.engine import open_engine, with_markup
from components.tokenizer import step as tokenizer_step
from manifests.spec import JobSpec
from trainer.data.format import Shard
from trainer.data.manifest import DataError, StageResult, read_manifest
from trainer.data.tokenizer import EOD, Tokenizer

CHAT = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n<|think_start|>\nHm.\n<|think_end|>\n\nHi<|im_end|>\n"
EVIL = f"A text with {EOD} in it"


def texts_of(result: StageResult, source: str) -> Counter[str]:
    tokenizer, found = Tokenizer.load(Path(result.path).parents[1] / "t"), Counter[str]()
    for entry in read_manifest(result.path).select(source):
        if entry.path.endswith(".bin"):
            shard = Shard(Path(result.path) / entry.path.removesuffix(".bin"))
            found.update(tokenizer.decode(shard.document(n).tolist()[:-1]) for n in range(len(shard)))
    return found


def prepared(directory: Path, changes: dict[str, Any]) -> tuple[JobSpec, StageResult, StageResult]:
    job = small_job(directory, changes)
    raw = write_raw(job, extra={"code": [CHAT, EVIL]})
    tokenizer = tokenizer_step.run(job, raw)
    (directory / "t").symlink_to(tokenizer.path)
    return job, raw, tokenizer


def test_what_hygiene_leaves_out_is_not_in_the_shards(tmp_path: Path) -> None:
    job, raw, tokenizer = prepared(tmp_path, {"hygiene": {"exact_duplicates": True}})
    with pytest.raises(DataError, match="run the step that makes this directory"):
        step.run(job, raw, tokenizer)
    result = step.run(job, hygiene_step.run(job, raw), tokenizer)
    found = texts_of(result, "ko")
    every = [text for part in range(2) for text in texts("ko", 150)[part::2]]
    first: dict[str, str] = {}
    for text in every:
        first.setdefault(" ".join(text.split()), text)
    assert len(first) < len(every) and found == Counter(first.values())
    assert read_manifest(result.path).inputs.keys() == {"raw", "tokenizer", "hygiene"}


def test_special_tokens_are_such_only_where_a_template_wrote_them(tmp_path: Path) -> None:
    plain, marked = {}, {"code": {"template": "{messages:chat}"}}
    for name, sources in {"plain": plain, "marked": marked}.items():
        job, raw, tokenizer = prepared(tmp_path / name, {"data": {"sources": sources}})
        result = step.run(job, raw, tokenizer)
        assert texts_of(result, "code")[CHAT] == texts_of(result, "code")[EVIL] == 1
        loaded, ids = Tokenizer.load(tokenizer.path), list[list[int]]()
        for entry in read_manifest(result.path).select("code"):
            if entry.path.endswith(".bin"):
                shard = Shard(Path(result.path) / entry.path.removesuffix(".bin"))
                ids += [shard.document(n).tolist()[:-1] for n in range(len(shard))]
        assert loaded.encode(CHAT, specials=name == "marked") in ids
        assert loaded.encode(CHAT, specials=name != "marked") not in ids
        assert loaded.encode(EVIL) in ids  # no text contains its own end, in any source


@pytest.mark.parametrize("engine", ["tiktoken", "tokenizers"])
def test_markup_gives_the_ids_of_the_tokenizer(tmp_path: Path, engine: Any) -> None:
    *_, tokenizer = prepared(tmp_path, {})
    loaded = Tokenizer.load(tokenizer.path)
    encode = with_markup(open_engine(engine, loaded), loaded)
    cases = [
        "",
        CHAT,
        CHAT * 3,
        "no markup",
        "<|im_end|>",
        "<|im_end|><|im_end|>",
        " <|im_start|> 한국어\n<|im_end",
        "<|x|>",
    ]
    assert encode(cases) == [loaded.encode(case, specials=True) for case in cases]
    assert encode([EVIL]) == [loaded.encode(EVIL)]
