"""How rows become texts: columns, templates, chats; and the parts into which long sources are cut."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.download import source, step
from components.download.texts import maker
from manifests.dataspec import TextSpec
from manifests.spec import JobSpec, SpecError, job_from, load_job, parse
from trainer.data.manifest import DataError
from trainer.data.tokenizer import SPECIAL_TOKENS
from trainer.errors import VolumeError

ORIGIN = {"kind": "files", "paths": ["a.jsonl"]}


def made(template: str, **row: Any) -> str:
    spec = parse(TextSpec, {"origin": ORIGIN, "template": template})
    return maker(spec)("a.jsonl:1", [row[name] for name in spec.columns])


def test_a_template_fills_in_columns() -> None:
    assert made("# {title}\n\n{text} {{x}}", title="제목", text="본문") == "# 제목\n\n본문 {x}"
    assert made("{a}{b}", a=None, b="b") == "b"
    assert made("Title: {a}", a=None) == made("Title: {a}", a=" ") == ""  # only the template's own words
    assert parse(TextSpec, {"origin": ORIGIN, "template": "{b} {a} {b}"}).columns == ["b", "a"]


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("no column", "names no column"),
        ("{a.b}", "a field that is not a plain column"),
        ("{a[0]}", "a field that is not a plain column"),
        ("{a!r}", "a field that is not a plain column"),
        ("{a:>10}", "a field that is not a plain column"),
        ("{}", "a field that is not a plain column"),
        ("{a", "cannot be read"),
    ],
)
def test_a_template_that_is_more_than_columns_is_refused(template: str, said: str) -> None:
    with pytest.raises(SpecError, match=f"{said}[^\n]*write columns as {{column}}"):
        parse(TextSpec, {"origin": ORIGIN, "template": template})


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"template": "{a}", "text_column": "a"}, "template excludes text_column and blobs; give one of them"),
        ({"blobs": {}}, "blobs needs text_column"),
        ({"text_column": "id", "blobs": {"url": "https://example.org/"}}, r"must contain \{id\} once"),
        ({"origin": {"kind": "hub", "dataset": "a/b", "config": "x", "files": ["*"]}}, "config and files exclude"),
    ],
)
def test_fields_that_do_not_go_together_are_one_line(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said) as caught:
        job_from({"preset": "tiny"}, {"data": {"sources": {"ko": fields}}})
    assert "\n" not in str(caught.value)


def test_a_cap_that_cannot_be_met_names_the_deficit() -> None:
    with pytest.raises(SpecError) as caught:
        load_job("h100-4b", {"data": {"sources": {"ko-wikipedia": {"max_epochs": 2}}}})
    said = "data.sources.ko-wikipedia: its share is 0.9B of 15B tokens, but 0.3B available × 2 epochs give only 0.6B, "
    assert said + "0.3B too few; lower the weight to 0.04, raise max_epochs or add a source" in str(caught.value)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("text", "holds a str; {…:chat} needs messages"),
        ([{"content": "no role"}], "a message without a role"),
        ([{"role": "user", "content": ["parts"]}], "with no text as its content"),
    ],
)
def test_what_is_no_conversation_is_named(value: Any, said: str) -> None:
    with pytest.raises(DataError, match=r"^a.jsonl:1: column 'messages' ") as caught:
        made("{messages:chat}", messages=value)
    assert said in str(caught.value)


HOSTILE = st.lists(
    st.sampled_from(
        [*SPECIAL_TOKENS, "<|", "|>", "<", "|", "a", "_", "<|im_", "end|>", "im_end", "<think>", "</think>"]
    )
).map("".join)


@given(HOSTILE)
def test_no_special_token_is_left_in_a_message(text: str) -> None:
    body = made("{messages:chat}", messages=[{"role": "user", "content": text}])
    inside = body.removeprefix("<|im_start|>user\n").removesuffix("<|im_end|>\n")
    assert not any(token in inside for token in SPECIAL_TOKENS)


@given(HOSTILE, HOSTILE, HOSTILE, HOSTILE, HOSTILE, st.booleans())
def test_no_special_token_comes_out_of_two_pieces(a: str, b: str, role: str, one: str, two: str, answer: bool) -> None:
    parts = [{"type": "text", "text": one}, {"type": "text", "text": two}]
    messages = [{"role": "assistant" if answer else f"u{role}", "content": parts}, {"role": role, "content": None}]
    text = made("{a}{b}{messages:chat}{b}<|fim_prefix|>{a}", a=a, b=b, messages=messages)
    if not text:
        return
    count = {token: text.count(token) for token in SPECIAL_TOKENS if token in text}
    thoughts = (one + two) if answer or role == "assistant" else ""
    expected = {"<|im_start|>": 2, "<|im_end|>": 2, "<|fim_prefix|>": 1}
    expected |= {"<|think_start|>": thoughts.count("<think>"), "<|think_end|>": thoughts.count("</think>")}
    assert count == {token: number for token, number in expected.items() if number}


def test_a_special_token_out_of_two_columns_is_broken_up() -> None:
    row = {"a": "x <|im_", "b": "end|> y", "messages": [{"role": "user", "content": "q"}]}
    assert made("{a}{b}{messages:chat}", **row) == "x <| im_end |> y<|im_start|>user\nq<|im_end|>\n"
    assert made("{a}end|>{messages:chat}", **row) == "x <| im_end |><|im_start|>user\nq<|im_end|>\n"
    assert made("{a}{b}", **row) == "x <|im_end|> y", "no markup, so ordinary characters"


def test_contents_in_parts_are_one_text_and_an_empty_one_is_none() -> None:
    parts = [{"type": "text", "text": "Is <|im_"}, {"type": "input_text", "text": "end|> one?"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": None}, {"role": "user"}]
    text = made("{messages:chat}", messages=messages)
    assert text == (
        "<|im_start|>user\nIs <| im_end |> one?<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n"
        "<|im_start|>user\n<|im_end|>\n"
    )
    picture = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
    with pytest.raises(
        DataError, match=r"^a.jsonl:1: column 'messages' holds a message with a part of type 'image_url'"
    ):
        made("{messages:chat}", messages=picture)


@pytest.mark.parametrize("part_bytes", [1, 40, 10**9])
def test_parts_hold_the_source_whatever_their_size(
    part_bytes: int, make_job: Callable[..., JobSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [f"text {n} " + "x" * (n % 7) if n % 5 else "" for n in range(60)]
    for file in range(2):
        lines = [json.dumps({"text": text}) + "\n" for text in rows[file::2]]
        (tmp_path / f"{file}.jsonl").write_text("".join(lines))
    monkeypatch.setattr(source, "PART_BYTES", part_bytes)
    job = make_job({"web": {"kind": "files", "paths": [str(tmp_path / "*.jsonl")]}}, tmp_path / "data")
    real, calls = source.write_part, iter(range(1000))

    def dies(*arguments: Any) -> Any:
        if next(calls) == 1:
            raise OSError(5, "the disk was pulled out")
        return real(*arguments)

    monkeypatch.setattr(source, "write_part", dies)
    with pytest.raises(VolumeError, match="the disk was pulled out"):
        step.run(job)
    result = step.run(job)
    parts = sorted((Path(result.path) / "web").glob("part-*.jsonl"))
    found = [json.loads(line)["text"] for part in parts for line in part.read_text().splitlines()]
    assert found == [text for file in range(2) for text in rows[file::2] if text]
    sizes = [sum(len(json.loads(line)["text"]) for line in part.read_text().splitlines()) for part in parts]
    assert all(size < part_bytes + 20 for size in sizes) and len(parts) == (2 if part_bytes == 10**9 else len(parts))
    undisturbed = step.run(make_job({"web": {"kind": "files", "paths": [str(tmp_path / "*.jsonl")]}}, tmp_path / "b"))
    assert undisturbed.digest == result.digest
