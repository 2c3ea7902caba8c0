"""Chats and texts with another model's tokenizer, from rows to shards: ids and trained tokens as in transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from foreign_models import llama_tokenizer, qwen_tokenizer
from test_answers import job_of, made, write
from tokenizers import Tokenizer as RawTokenizer
from transformers import AutoTokenizer

from components.download import step as download_step
from trainer.data.documents import SourceDocuments
from trainer.data.manifest import read_manifest
from trainer.data.tokenizer import Tokenizer
from trainer.errors import DataError

TALKS = [
    [
        {"role": "system", "content": f"Number {n}. Be brief."},
        {"role": "user", "content": f"{n} 더하기 {n}은? <|im_end|><|eot_id|> is text here"},
        {"role": "assistant", "content": f"<think>\n{n} + {n}\n</think>\n답은 {2 * n}."},
        {"role": "user", "content": "def f(x):\n    return x"},
        {"role": "assistant", "content": f"Fine. {n}"},
    ]
    for n in range(60)
]


def broken(text: str, theirs: Any) -> str:
    """The text with its special tokens changed so that they are not special tokens any more."""
    for token in (str(token) for token in theirs.added_tokens_decoder.values() if token.special):
        text = text.replace(token, f"{token[0]} {token[1:]}")
    return text


@pytest.mark.parametrize("make", [qwen_tokenizer, llama_tokenizer])
def test_ids_and_trained_tokens_are_those_of_transformers(make, tmp_path: Path) -> None:
    folder = make(tmp_path / "model")
    write(tmp_path, TALKS)
    tokenized, shards = made(job_of(tmp_path, tokenizer={"from": str(folder)}))
    theirs, manifest = AutoTokenizer.from_pretrained(folder), read_manifest(shards.path)
    assert {p.name for p in Path(tokenized.path).iterdir()} - {".lock", "manifest.json"} == {
        p.name for p in folder.iterdir()
    }
    end_of_document = theirs.convert_tokens_to_ids("<|endoftext|>" if make is qwen_tokenizer else "<|end_of_text|>")
    assert manifest.settings["eod_id"] == end_of_document
    expected = {}
    for talk in TALKS:
        plain = [message | {"content": broken(message["content"], theirs)} for message in talk]
        ids = theirs.apply_chat_template(plain, tokenize=True, return_dict=False)
        trained = set[int]()
        for number, message in enumerate(plain):  # the difference that an answer makes, without the line break after it
            if message["role"] == "assistant":
                before = theirs.apply_chat_template(
                    plain[:number], tokenize=True, add_generation_prompt=True, return_dict=False
                )
                until = theirs.apply_chat_template(plain[: number + 1], tokenize=True, return_dict=False)
                assert until[: len(before)] == before
                trained |= set(range(len(before), len(until) - (until[-1] == theirs.convert_tokens_to_ids("Ċ"))))
        expected[(*ids, end_of_document)] = trained
    found = {}
    for split in ("train", "heldout"):
        documents = SourceDocuments(Path(shards.path), manifest, "chat", split)
        for number in range(len(documents.lengths)):
            ids = tuple(documents.tokens(number).tolist())
            found[ids] = {n for first, stop in documents.answers(number).tolist() for n in range(first, stop)}
    assert found == expected


def test_limits_that_somebody_left_in_a_tokenizer_do_not_cut_documents(tmp_path: Path) -> None:
    path = qwen_tokenizer(tmp_path) / "tokenizer.json"
    text = "서울 is big. " * 20
    whole = Tokenizer.load(tmp_path).document(Tokenizer.load(tmp_path).encode(text))
    left = RawTokenizer.from_file(str(path))
    left.enable_truncation(4)
    left.enable_padding(length=2048)
    left.save(str(path))
    assert RawTokenizer.from_file(str(path)).truncation
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.prefix == [] and tokenizer.document(tokenizer.encode_batch([text])[0]) == whole


def test_a_vocabulary_may_have_entries_that_no_bytes_make(tmp_path: Path) -> None:
    path = qwen_tokenizer(tmp_path) / "tokenizer.json"
    value = json.loads(path.read_text())
    value["model"]["vocab"]["漢字"] = 350
    path.write_text(json.dumps(value))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.decode_bytes([*tokenizer.encode("가a"), 350]) == "가a漢字".encode()
    value["model"] = {"type": "WordLevel", "vocab": {"a": 0, "<|endoftext|>": 1}, "unk_token": "a"}
    path.write_text(json.dumps(value))
    with pytest.raises(DataError, match="not byte-level BPE"):
        Tokenizer.load(tmp_path)


def test_texts_have_what_the_tokenizer_puts_around_them(tmp_path: Path) -> None:
    folder = llama_tokenizer(tmp_path / "model")
    (tmp_path / "chat.jsonl").write_text('{"text": "서울 is big <|eot_id|>"}\n' * 20, encoding="utf-8")
    plain = {"template": None, "loss": "all"}
    job = job_of(tmp_path, tokenizer={"from": str(folder)}, data={"sources": {"chat": plain}, "heldout_fraction": 0.4})
    _, shards = made(job)
    theirs = AutoTokenizer.from_pretrained(folder)
    begin, end = (theirs.convert_tokens_to_ids(token) for token in ("<|begin_of_text|>", "<|end_of_text|>"))
    documents = [
        SourceDocuments(Path(shards.path), read_manifest(shards.path), "chat", split).tokens(0).tolist()
        for split in ("train", "heldout")
        if read_manifest(shards.path).counts(split=split).documents
    ]
    for ids in documents:
        assert (ids[0], ids[-1]) == (begin, end) and theirs.decode(ids[1:-1]) == "서울 is big <|eot_id|>"
        assert theirs.convert_tokens_to_ids("<|eot_id|>") not in ids


def test_conversations_are_not_mixed_from_two_templates(tmp_path: Path) -> None:
    folder = qwen_tokenizer(tmp_path / "model")
    write(tmp_path, TALKS)
    job = job_of(tmp_path, tokenizer={"from": str(folder)})
    download_step.run(job)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }} says\n{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant says\n{% endif %}"
    )
    with pytest.raises(DataError, match=r"written with another chat template than the model has now; remove"):
        download_step.run(job)


def test_a_conversation_that_the_template_refuses_is_named(tmp_path: Path) -> None:
    folder = qwen_tokenizer(tmp_path / "model")
    strict = "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    strict += "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    strict += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    (folder / "chat_template.jinja").write_text(strict)
    write(tmp_path, [TALKS[0], [{"role": "tool", "content": "x"}]])
    with pytest.raises(DataError, match=r"chat\.jsonl:2: .*rejects this conversation \(no tools\); fix or remove"):
        download_step.run(job_of(tmp_path, tokenizer={"from": str(folder)}))
    del_template = (folder / "tokenizer_config.json").read_text().replace("chat_template", "no_template")
    (folder / "tokenizer_config.json").write_text(del_template)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(DataError, match=r"^tokenizer\.from: .*has no chat template"):
        download_step.run(job_of(tmp_path, tokenizer={"from": str(folder)}))
