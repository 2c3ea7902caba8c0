"""More text for a longer run: in every stage existing data is unchanged, byte for byte, and new data is appended."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hub_worker import Hub
from raw_cases import contents, texts

from components.hygiene import step as hygiene_step
from components.plan.length import changed
from components.shards import step as shards_step
from components.shards.ranges import ranges
from components.tokenizer import step as tokenizer_step
from manifests.spec import JobSpec, load_job
from trainer.data.documents import SourceDocuments
from trainer.data.manifest import Manifest, StageResult, read_manifest, verify
from trainer.data.stages import open_stage
from trainer.errors import SpecError

NAMES = ("large", "little")


class Made(NamedTuple):
    raw: StageResult
    tokenizer: StageResult
    shards: StageResult

    def manifests(self) -> tuple[Manifest, ...]:
        return tuple(read_manifest(result.path) for result in self)


@pytest.fixture
def job(tmp_path: Path) -> Callable[..., JobSpec]:
    """(steps, folder of the data) -> a job of two sources on the Hub, of which one is soon exhausted."""

    def make(steps: int, folder: str = "data", **changes: Any) -> JobSpec:
        shared = {"domain": "en", "licence": "CC0-1.0", "weight": 0.5, "max_epochs": 100, "text_column": "text"}
        sources: dict[str, Any] = dict.fromkeys(["ko", "en", "code", "math"])
        origins = {
            name: {"kind": "hub", "dataset": "org/texts", "files": [f"{name}/*"]} for name in ("large", "little")
        }
        sources |= {name: shared | {"origin": origin} for name, origin in origins.items()}
        base = {
            "data": {"sources": sources, "heldout_fraction": 0.1},
            "hygiene": {"exact_duplicates": True},
            "tokenizer": {"vocab_size": 640, "sample_bytes": 8000},
            "train": {"steps": steps, "seq_len": 32, "model": {"vocab_size": 640}, "batch": {"tokens_per_step": 512}},
            "shards": {"unit_bytes": 4096, "max_shard_bytes": 65536, "workers": 1},
            "storage": {"datasets_dir": str(tmp_path / folder), "checkpoints_dir": str(tmp_path / "checkpoints")},
        }
        return load_job("tiny", base | changes)

    return make


@pytest.fixture
def hub(hub: Hub) -> Hub:
    rows = texts("en", 900)
    files = {f"large/{number}.jsonl": rows[number::3] for number in range(3)} | {"little/0.jsonl": texts("code", 40)}
    lines = {name: "".join(json.dumps({"text": text}) + "\n" for text in some) for name, some in files.items()}
    hub.server.files = {name: text.encode() for name, text in lines.items()}
    return hub


def made(hub: Hub, job: JobSpec) -> Made:
    raw, error = hub.run(job.model_dump(mode="json"))
    assert raw is not None, error
    result = hygiene_step.run(job, StageResult(**raw))
    tokenizer = tokenizer_step.run(job, result)
    return Made(StageResult(**raw), tokenizer, shards_step.run(job, result, tokenizer))


def test_what_was_there_stays_and_the_rest_is_appended(hub: Hub, job) -> None:
    short, longer = job(20), job(60)
    assert short.keys == longer.keys
    before, files = made(hub, short), contents(short.storage.datasets_dir)
    hub.server.requests.clear()
    after = made(hub, longer)
    assert hub.server.ranges_of("little/0.jsonl") == [], "what was whole is not fetched again"
    now = contents(longer.storage.datasets_dir)
    changed = {name for name, data in files.items() if now.get(name) != data}
    assert {Path(name).name for name in changed} == {"manifest.json", "journal.json"}

    assert after.tokenizer == before.tokenizer and "training" not in hub.said
    for was, result in zip(before, after, strict=True):
        manifest = read_manifest(result.path)
        verify(result.path, manifest)
        assert manifest.at(was.digest) == open_stage(was), "a step that knew only this finds it"
        assert manifest.at(was.digest).digest == was.digest
    raw, _, shards = after.manifests()
    assert [len(manifest.earlier) for manifest in (raw, shards)] == [1, 1]
    assert raw.counts("little") == open_stage(before.raw).counts("little")
    assert raw.counts("large").text_bytes >= longer.byte_budget("large") > short.byte_budget("large")
    documents = SourceDocuments(Path(after.shards.path), shards, "large", "train")
    first = SourceDocuments(Path(after.shards.path), open_stage(before.shards), "large", "train")
    assert documents.lengths.tolist()[: len(first.lengths)] == first.lengths.tolist()
    assert len(documents.lengths) > len(first.lengths) > 0
    report = Path(longer.stage_dir("hygiene")) / "report-1.json"
    assert json.loads(report.read_bytes())["left_out"]["all"]["large"]["of_documents"] == raw.counts("large").documents

    again = made(hub, longer)
    assert again == after and contents(longer.storage.datasets_dir) == now
    # A shorter job uses the existing data.
    assert made(hub, short) == after


@pytest.mark.parametrize("lost", ["all", "first", "last", "raw part"])
def test_what_is_lost_of_grown_data_is_made_again_as_it_was(hub: Hub, job, lost: str) -> None:
    longer = job(60)
    made(hub, job(20))
    after = made(hub, longer)
    shards, raw = Path(after.shards.path), Path(after.raw.path)
    whole = contents(shards), contents(raw), contents(longer.stage_dir("hygiene"))
    bins = [entry.path for entry in read_manifest(shards).select("large", "train") if entry.tokens]
    if lost == "all":
        shutil.rmtree(shards)
        shutil.rmtree(longer.stage_dir("hygiene"))
    elif lost == "raw part":
        (raw / "large" / "part-00000.jsonl").write_bytes(b"")
    else:
        (shards / bins[0 if lost == "first" else -1]).write_bytes(b"cut")
    assert made(hub, longer) == after
    assert (contents(shards), contents(raw), contents(longer.stage_dir("hygiene"))) == whole


def test_growth_may_be_spread_and_killed(hub: Hub, job, monkeypatch: pytest.MonkeyPatch) -> None:
    made(hub, job(20))
    longer = job(60)
    raw, _ = hub.run(longer.model_dump(mode="json"))
    assert raw is not None
    result = hygiene_step.run(longer, StageResult(**raw))
    tokenizer = tokenizer_step.run(longer, result)
    shards = Path(longer.stage_dir("shards"))
    before = read_manifest(shards)

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shards_step, "write_manifest", killed)
        with pytest.raises(KeyboardInterrupt):
            shards_step.run(longer, result, tokenizer)
    assert read_manifest(shards) == before, "a training that goes on beside it finds what it had"
    verify(shards, before)
    spread = longer.updated({"shards": {"pods": 3}})
    for each in ranges(spread, result, tokenizer):
        shards_step.encode_range(each)
    grown = shards_step.run(spread, result, tokenizer)
    fresh = job(60, folder="fresh")
    shutil.copytree(longer.stage_dir("raw"), fresh.stage_dir("raw"))
    moved = result.model_copy(update={"path": fresh.stage_dir("raw")})
    at_once = shards_step.run(fresh, hygiene_step.run(fresh, moved), tokenizer)
    assert at_once.digest == grown.digest, "shards follow from the raw text alone, however it was worked off"


def test_the_tokenizer_of_a_short_run_has_as_large_a_sample_as_that_of_a_long_one(job) -> None:
    assert job(1).byte_budget("large") == 4000
    assert job(20).byte_budget("large") == 20 * 512 * 0.5 * 7.2


def test_what_version_0_1_began_goes_on_under_its_key(hub: Hub, job) -> None:
    short, longer = job(20), job(60)
    former = Path(short.storage.datasets_dir, "raw", short.former_keys["raw"])
    former.mkdir(parents=True)
    before = made(hub, short)
    assert before.raw.path == str(former) and Path(before.shards.path).name == short.former_keys["shards"]
    after = made(hub, longer)
    assert Path(after.raw.path).resolve() == former.resolve() and after.tokenizer.digest == before.tokenizer.digest
    assert read_manifest(before.shards.path).at(before.shards.digest) is not None


def test_a_run_whose_limit_of_bytes_is_raised_keeps_its_name_and_gets_more(hub: Hub, job) -> None:
    begun = job(20).updated({"data": {"max_bytes_per_source": 6000}})
    before = made(hub, begun)
    (Path(begun.run_dir)).mkdir(parents=True)
    raised = changed(begun, {"train": {"steps": 60}, "data": {"max_bytes_per_source": 15000}}, begun.run_name)
    assert (raised.run_name, raised.keys) == (begun.run_name, begun.keys)
    after = made(hub, raised)
    assert after.tokenizer == before.tokenizer
    assert open_stage(before.shards).digest == before.shards.digest != after.shards.digest
    assert after.manifests()[0].counts("large").text_bytes >= 15000
    back = changed(raised, {"data": {"max_bytes_per_source": 6000}}, begun.run_name)
    assert back.data == begun.data
    another = begun.updated({"data": {"max_bytes_per_source": 15000}})
    assert another.keys != begun.keys, "a limit that a person names from the start makes data of its own"
    with pytest.raises(SpecError, match="this makes another run"):
        changed(job(20), {"data": {"max_bytes_per_source": 15000}}, job(20).run_name)
