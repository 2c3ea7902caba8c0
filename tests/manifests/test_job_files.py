"""What a job file and --set may change in a preset: another origin, fewer sources; mistakes are one-line errors."""

from pathlib import Path

import pytest
import yaml

from components.plan.step import arguments_for, resolve
from manifests.spec import changes_of, load_job
from trainer.specbase import SpecError, changes_from_sets, deep_merge

OWN = {"domain": "ko", "weight": 1, "licence": "CC0-1.0", "origin": {"kind": "files", "paths": ["mine.jsonl"]}}


@pytest.fixture
def job_file(tmp_path):
    def write(**fields) -> str:
        path = tmp_path / "mine.yaml"
        path.write_text(yaml.safe_dump({"preset": "tiny", **fields}))
        return str(path)

    return write


def test_an_origin_of_another_kind_replaces_the_presets(job_file):
    hub = {"kind": "hub", "dataset": "a/b", "revision": "0123abc"}
    origin = load_job(job_file(data={"sources": {"ko": {"origin": hub}}})).data.sources["ko"].origin
    assert origin.model_dump() == hub | {"config": None, "split": "train", "files": []}
    by_sets = changes_from_sets([f"data.sources.ko.origin.{field}={value}" for field, value in hub.items()])
    assert load_job("tiny", by_sets).data.sources["ko"].origin == origin


def test_an_origin_of_the_same_kind_is_changed_field_by_field():
    change = {"data": {"sources": {"ko-wikipedia": {"origin": {"kind": "hub", "split": "x"}}}}}
    origin = load_job("h100-4b", change).data.sources["ko-wikipedia"].origin
    assert (origin.dataset, origin.split) == ("wikimedia/wikipedia", "x")


def test_null_removes_a_presets_source(job_file):
    path = job_file(data={"sources": {"mine": OWN, **dict.fromkeys(["ko", "en", "code", "math"])}})
    job = load_job(path)
    assert list(job.data.sources) == ["mine"] and list(job.train_spec().tokens.mix) == ["mine"]
    # The same through the arguments of the pipeline, where the changes travel as JSON.
    assert resolve(**arguments_for(*changes_of(path))) == job


def test_null_on_the_command_line_removes_a_source():
    sets = [*(f"data.sources.{name}=null" for name in ("en", "code", "math")), "data.sources.ko.weight=1"]
    assert list(load_job("tiny", changes_from_sets(sets)).data.sources) == ["ko"]


def test_the_weights_that_are_left_must_still_be_whole():
    with pytest.raises(SpecError, match=r"weights of sources sum to 0\.8; they must sum to 1"):
        load_job("tiny", changes_from_sets(["data.sources.en=null"]))


def test_not_every_source_can_be_removed(job_file):
    with pytest.raises(SpecError, match=r"data\.sources"):
        load_job(job_file(data={"sources": dict.fromkeys(["ko", "en", "code", "math"])}))


def test_a_merge_changes_neither_side():
    base, changes = {"a": {"kind": "x", "b": 1}}, {"a": {"kind": "y"}}
    assert deep_merge(base, changes) == {"a": {"kind": "y"}}
    assert (base, changes) == ({"a": {"kind": "x", "b": 1}}, {"a": {"kind": "y"}})


@pytest.mark.parametrize("assignment", ["train={", "train.steps=[1", "name='a"])
def test_a_value_that_is_not_yaml_is_one_line(assignment):
    with pytest.raises(SpecError) as error:
        changes_from_sets([assignment])
    assert str(error.value).startswith(f"--set {assignment}: the value is not valid YAML (")
    assert len(str(error.value).splitlines()) == 1


def test_weights_that_are_not_whole_are_listed_with_how_to_remove_one():
    sets = changes_from_sets(["data.sources.en.weight=0.5"])
    with pytest.raises(SpecError) as error:
        load_job("tiny", sets)
    said = str(error.value)
    assert "must sum to 1: ko 0.4, en 0.5, code 0.25, math 0.15;" in said and said.endswith("data.sources.ko: null")


def test_relative_paths_start_where_the_job_file_is_and_change_no_name(job_file, monkeypatch):
    path = Path(job_file(data={"sources": {"mine": OWN, **dict.fromkeys(["ko", "en", "code", "math"])}}))
    monkeypatch.chdir(path.parent)
    here = load_job(path.name)
    monkeypatch.chdir("/")
    there = load_job(str(path))
    assert here == there and here.storage.sources_dir == str(path.parent)
    assert load_job("tiny").storage.sources_dir is None
    without = here.updated({"storage": {"sources_dir": None}})
    assert (without.run_name, without.shards_key, without.hygiene_key) == (
        here.run_name,
        here.shards_key,
        here.hygiene_key,
    )
    assert without.train_spec() == here.train_spec()
    assert resolve(**arguments_for(*changes_of(str(path)))) == here
