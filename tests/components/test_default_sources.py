"""The sources of the large presets, from a Hub and a bucket on this machine that contain a few rows of each."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from default_sources import CODE, GONE, TEXTS, blob, objects
from hub_worker import Hub

from components.download import blobs, retry
from components.download.blobs import _text
from components.download.source import Task, prepare
from manifests.dataspec import BlobsSpec, TextSpec
from manifests.spec import load_job
from trainer.data.manifest import DataError, read_manifest, verify
from trainer.data.tokenizer import SPECIAL_TOKENS
from trainer.errors import LaunchError

PRESETS = ["h100-4b", "h100-4b-interleaved"]


@pytest.fixture
def hub(hub: Hub) -> Hub:
    for source in load_job("h100-4b").data.sources.values():
        if source.origin.revision != "main":
            hub.server.commits[source.origin.dataset] = source.origin.revision
    hub.server.objects = objects()
    return hub


def job(hub: Hub, folder: Path, preset: str = "h100-4b", only: str | None = None) -> dict[str, Any]:
    """The preset's job; contents come from this machine's bucket."""
    url = hub.server.url + "/content/{id}"
    sources: dict[str, Any] = {"code-stack-edu": {"blobs": {"url": url}}}
    if only:
        chosen = sources.get(only, {}) | {"weight": 1.0, "available_tokens": None}
        sources = dict.fromkeys(load_job(preset).data.sources) | {only: chosen}
    return load_job(preset, {"data": {"sources": sources}, "storage": {"datasets_dir": str(folder)}}).model_dump(
        mode="json"
    )


def raw_texts(directory: str, name: str) -> list[str]:
    parts = sorted((Path(directory) / name).glob("part-*.jsonl"))
    return [json.loads(line)["text"] for part in parts for line in part.read_bytes().splitlines()]


@pytest.mark.parametrize("preset", PRESETS)
def test_the_download_step_reads_every_default_source(hub: Hub, tmp_path: Path, preset: str) -> None:
    result, error = hub.run(job(hub, tmp_path, preset))
    assert error is None and result is not None
    assert {name: raw_texts(result["path"], name) for name in TEXTS} == TEXTS
    manifest = read_manifest(result["path"], "raw")
    verify(result["path"], manifest)
    assert manifest.sources.keys() == TEXTS.keys() and all(source.licence for source in manifest.sources.values())
    sources = load_job(preset).data.sources
    for name, source in sources.items():
        if source.origin.revision != "main":
            assert manifest.sources[name].revision == source.origin.revision
    assert result["summary"]["code-stack-edu_missing"] == 1
    assert "1 of 4 contents are missing" in hub.said
    hub.server.requests.clear()
    assert hub.run(job(hub, tmp_path, preset)) == (result, None)
    assert hub.server.requests == []


@pytest.mark.parametrize("preset", PRESETS)
def test_the_mix_is_what_the_request_says_and_can_be_filled(preset: str) -> None:
    loaded = load_job(preset)
    shares: dict[str, float] = {}
    for source in loaded.data.sources.values():
        shares[source.domain] = shares.get(source.domain, 0) + source.weight
    assert shares == pytest.approx({"ko": 0.4, "en": 0.2, "code": 0.25, "math": 0.15})
    tokens = loaded.train.steps * loaded.train.batch.tokens_per_step
    assert tokens == pytest.approx(15e9, rel=1e-3)
    for source in loaded.data.sources.values():
        assert source.available_tokens and source.weight * tokens <= source.available_tokens * source.max_epochs
    assert loaded.data.synthetic_share(tokens) == pytest.approx(0.21)


def test_chat_markup_consists_of_the_tokenizers_special_tokens() -> None:
    used = {f"<|{name}|>" for name in ("im_start", "im_end", "think_start", "think_end")}
    (chat,) = TEXTS["code-dolci-think"]
    assert used <= set(SPECIAL_TOKENS) and all(token in chat for token in used)
    sources = load_job("h100-4b").data.sources
    assert [name for name, source in sources.items() if source.has_markup] == ["code-dolci-think"]


def test_contents_come_in_order_through_faults(hub: Hub, tmp_path: Path) -> None:
    names = [blob(text, encoding)[0] for encoding, text in CODE.items()]
    hub.server.faults = {names[0]: ["503", "reset", "429+0"], names[2]: ["500"]}
    result, error = hub.run(job(hub, tmp_path, only="code-stack-edu"))
    assert error is None and result is not None
    assert raw_texts(result["path"], "code-stack-edu") == list(CODE.values())
    told = [line for line in hub.said.splitlines() if "trying again in" in line]
    assert sum("(it answered 503); attempt 1 of 9" in line for line in told) == 1
    assert sum("attempt 3 of 9" in line for line in told) == 1 and all("/content/: no answer" in line for line in told)


def test_without_a_network_it_is_said_what_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(blobs, "BACKOFF_SECONDS", 0.01)
    monkeypatch.setattr("components.download.retry.TOLD_ONCE_SECONDS", 60.0)  # one thread may be far behind another
    name = blob(CODE["utf-8"], "utf-8")[0]
    spec = BlobsSpec(url="http://127.0.0.1:9/content/{id}", encoding_column=None, workers=8)
    with pytest.raises(LaunchError, match=r"cannot be read [^\[]*refused.*; check the network and run again"):
        list(blobs.contents(iter([("row", [name])] * 8), spec))
    told = capsys.readouterr().out.splitlines()
    assert [f"attempt {n} of 9" in line for n, line in enumerate(told, start=1)] == [True] * 8, told
    assert all("contents of http://127.0.0.1:9/content/: no answer" in line and "refused" in line for line in told)


def test_a_pause_that_the_bucket_asks_for_is_kept(hub: Hub, tmp_path: Path) -> None:
    name = blob(CODE["utf-8"], "utf-8")[0]
    hub.server.faults = {name: ["429+1"]}
    result, error = hub.run(job(hub, tmp_path, only="code-stack-edu"))
    assert error is None and result is not None
    first, second = (at for at, path in hub.server.times if path.endswith(name))
    assert second - first >= 1.0


@pytest.mark.parametrize(
    ("content", "encoding", "text"),
    [
        (b"+2AA- a", "utf-7", "\ufffd a"),  # a lone surrogate, which UTF-8 cannot represent
        (b"abc", "hex", "abc"),
        (b"abc", "a\0b", "abc"),
        (b"abc", 5, "abc"),
        ("\u00e9".encode("latin-1"), "latin-1", "\u00e9"),
    ],
)
def test_any_encoding_that_a_row_names_gives_a_text_that_can_be_written(
    content: bytes, encoding: object, text: str
) -> None:
    name = hashlib.sha1(content).hexdigest()
    given = _text(name, gzip.compress(content), encoding)
    assert given == text and given.encode()


@pytest.mark.parametrize("pause", ["5", "Tue, 01 Jan 2999 00:00:00 GMT"])
def test_a_bucket_cannot_ask_for_a_pause_without_end(hub: Hub, monkeypatch: pytest.MonkeyPatch, pause: str) -> None:
    slept: list[float] = []
    monkeypatch.setattr(retry, "LONGEST_PAUSE_SECONDS", 3)
    monkeypatch.setattr("tenacity.nap.time.sleep", slept.append)
    name = blob(CODE["utf-8"], "utf-8")[0]
    hub.server.faults = {name: [f"429+{pause}"]}
    spec = BlobsSpec(url=hub.server.url + "/content/{id}", encoding_column=None, workers=1)
    assert list(blobs.contents(iter([("row", [name])]), spec)) == [CODE["utf-8"]]
    assert slept == [3]


def test_other_braces_of_the_address_stand_for_themselves(hub: Hub) -> None:
    name = blob(CODE["utf-8"], "utf-8")[0]
    spec = BlobsSpec(url=hub.server.url + "/content/{id}?of={x}", encoding_column=None, workers=1)
    assert list(blobs.contents(iter([("row", [name])]), spec)) == [CODE["utf-8"]]


def test_a_damaged_content_is_not_kept(hub: Hub, tmp_path: Path) -> None:
    name = blob(CODE["latin-1"], "latin-1")[0]
    hub.server.faults = {name: ["wrong"]}
    result, error = hub.run(job(hub, tmp_path, only="code-stack-edu"))
    assert error is None and result is not None
    assert raw_texts(result["path"], "code-stack-edu") == [CODE["utf-8"], CODE["no-such-encoding"]]
    assert result["summary"]["code-stack-edu_missing"] == 2


def test_a_bucket_without_the_contents_is_one_line(hub: Hub, tmp_path: Path) -> None:
    there = hub.server.objects
    left = dict([next(iter(there.items()))])
    for objects_left, missing in ((left, 3), (left, 3), ({}, 4)):  # the next run refuses it again
        hub.server.objects = objects_left
        result, error = hub.run(job(hub, tmp_path, only="code-stack-edu"))
        assert result is None and error is not None and "\n" not in error
        assert error.startswith(f"source 'code-stack-edu': {missing} of 4 contents are not at http://127.0.0.1")
        assert GONE not in error and not list(tmp_path.rglob("manifest.json"))
    hub.server.objects = there
    result, error = hub.run(job(hub, tmp_path, only="code-stack-edu"))
    assert error is None and result is not None
    assert raw_texts(result["path"], "code-stack-edu") == list(CODE.values())


def test_a_bucket_without_the_contents_is_not_asked_for_all_of_them(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [json.dumps({"id": hashlib.sha1(b"%d" % n).hexdigest()}) for n in range(400)]
    (tmp_path / "ids.jsonl").write_text("\n".join(rows))
    found = BlobsSpec(url=hub.server.url + "/content/{id}", encoding_column=None, workers=2)
    origin = {"kind": "files", "paths": [str(tmp_path / "ids.jsonl")]}
    monkeypatch.setattr("components.download.source.JUDGED_FROM", 20)
    hub.server.requests.clear()
    with pytest.raises(DataError, match=r"^20 of 20 contents are not at http://127[^\n]*; check blobs.url"):
        prepare(Task("code", TextSpec(origin=origin, text_column="id", blobs=found), tmp_path / "raw" / "code", None))
    assert len(hub.server.requests) < 100


def test_contents_cut_into_parts_continue_where_they_stopped(hub: Hub, tmp_path: Path) -> None:
    whole, error = hub.run(job(hub, tmp_path / "whole", only="code-stack-edu"))
    assert error is None and whole is not None
    names = [blob(text, encoding)[0] for encoding, text in CODE.items()]
    hub.server.faults = {names[2]: ["418"]}  # servers should not answer so: the run ends
    first = job(hub, tmp_path / "cut", only="code-stack-edu") | {"part_bytes": 10}
    result, error = hub.run(first)
    assert result is None and error is not None and "answered 418; check blobs.url" in error
    hub.server.requests.clear()
    result, error = hub.run(first)
    assert error is None and result is not None
    assert raw_texts(result["path"], "code-stack-edu") == raw_texts(whole["path"], "code-stack-edu")
    assert len(list(Path(result["path"]).rglob("part-*.jsonl"))) == 3
    asked = [path.removeprefix("/content/") for _, path, _ in hub.server.requests if path.startswith("/content/")]
    assert names[0] not in asked and set(asked) == {names[2], GONE} | ({names[1]} & set(asked))
