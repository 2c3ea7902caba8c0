"""Digests and names of jobs are the same in every version, so that data on the volumes is found again."""

from __future__ import annotations

import inspect
import json

import pytest
import yaml
from former import FIXTURES
from pydantic import BaseModel, create_model

from manifests import dataspec
from manifests import spec as jobspec
from manifests.spec import JobTrainSpec, job_from, load_job, preset_names
from trainer import modelspec
from trainer import spec as trainspec
from trainer.fields import FIELDS_1, LATER, RAW_DEFAULTS_1, Later, stored, version_of
from trainer.modelspec import ModelSpec
from trainer.spec import MuonSpec, TokensSpec, TrainSpec
from trainer.specbase import Spec, to_yaml

JOBS = json.loads((FIXTURES / "v0.1" / "identities.json").read_text())
JOBS |= json.loads((FIXTURES / "later_identities.json").read_text())  # of presets added after 0.1
MODULES = (modelspec, trainspec, dataspec, jobspec)
SPECS = {
    name: value for module in MODULES for name, value in vars(module).items() if isinstance(value, type)
    and issubclass(value, Spec) and value is not Spec
}  # fmt: skip


@pytest.mark.parametrize("name", JOBS)
def test_keys_and_names_are_those_of_version_0_1(name: str):
    expected = {key: value for key, value in JOBS[name].items() if key != "job"}
    job = job_from(JOBS[name]["job"])
    former = {"tokenizer" if stage == "tokenizers" else stage: key for stage, key in job.former_keys.items()}
    assert former | {"run": job.run_name} == expected
    of_length = job.data.max_bytes_per_source is None
    by_length = of_length and any(source.origin.kind == "hub" for source in job.data.sources.values())
    assert (job.keys != job.former_keys) == by_length, "the length of the run is no part of a key any more"


def test_every_preset_is_among_them():
    assert set(preset_names()) <= set(JOBS)


def test_a_run_that_was_made_longer_keeps_its_name_and_its_data():
    short, other = load_job("h100-4b"), load_job("h100-4b", {"train": {"steps": 35762}})
    longer = load_job("h100-4b", {"train": {"steps": 35762, "begun_with_steps": 28610}})
    assert longer.run_name == short.run_name != other.run_name
    assert longer.keys == short.keys == other.keys
    assert longer.former_keys == short.former_keys != other.former_keys
    assert longer.train_spec().begun_with_steps == 28610


def test_the_loss_of_a_source_is_part_of_the_shards_key_alone():
    chat = {"template": "{messages:chat}", "text_column": None}
    plain = load_job("tiny", {"data": {"sources": {"ko": chat}}})
    job = plain.updated({"data": {"sources": {"ko": {"loss": "answers"}}}})
    assert {stage for stage, key in job.keys.items() if key != plain.keys[stage]} == {"shards"}
    assert job.run_name != plain.run_name and (version_of(plain), version_of(job)) == (1, 5)
    assert "loss" not in stored(plain)["data"]["sources"]["ko"]


def test_stored_is_what_version_0_1_wrote():
    job = load_job("h100-4b")
    assert stored(job) == without_later(job.model_dump(mode="json"), job)
    assert version_of(job) == 1
    longer = load_job("h100-4b", {"train": {"steps": 35762, "begun_with_steps": 28610}})
    assert version_of(longer) == version_of(longer.train_spec()) == 2


def without_later(dump, spec: BaseModel):
    """The dump of pydantic without the fields that version 1 does not have."""
    if isinstance(spec, BaseModel):
        names = FIELDS_1[type(spec).__name__]
        return {name: without_later(value, getattr(spec, name)) for name, value in dump.items() if name in names}
    if isinstance(spec, dict):
        return {name: without_later(value, spec[name]) for name, value in dump.items()}
    if isinstance(spec, list | tuple):
        return [without_later(value, inner) for value, inner in zip(dump, spec, strict=True)]
    return dump


def test_new_optional_field_changes_nothing_at_its_default_and_a_changed_default_does(monkeypatch):
    grown = create_model("MuonSpec", __base__=MuonSpec, ripples=(int, 0))
    assert stored(grown()) == stored(MuonSpec()) and version_of(grown()) == 1
    assert stored(grown(ripples=3)) == stored(MuonSpec()) | {"ripples": 3}
    assert version_of(grown(ripples=3)) > 1
    changed = create_model("MuonSpec", __base__=MuonSpec, momentum=(float, 0.9))
    assert stored(changed()) != stored(MuonSpec())
    monkeypatch.setitem(LATER, "MuonSpec", {"ripples": Later(2, 0)})
    later = create_model("MuonSpec", __base__=MuonSpec, ripples=(int, 5))
    assert stored(later()) == stored(MuonSpec()) | {"ripples": 5}, "of a later field, too"


def test_changed_default_of_a_source_changes_the_key_of_its_text(monkeypatch):
    job = job_from(JOBS["hub"]["job"])
    monkeypatch.setitem(RAW_DEFAULTS_1, "HubSource", RAW_DEFAULTS_1["HubSource"] | {"split": "validation"})
    assert job.former_keys["raw"] != JOBS["hub"]["raw"]


@pytest.mark.parametrize("name", SPECS)
def test_every_field_is_of_a_version(name: str):
    of_1, later = FIELDS_1.get(name, frozenset()), LATER.get(name, {}).keys()
    if name not in FIELDS_1:
        pytest.skip("a spec that is newer than version 1 as a whole")
    kinds = {section for section in ModelSpec.section_names.values() if SPECS[name] is ModelSpec}  # say it themselves
    unknown = SPECS[name].model_fields.keys() - of_1 - later - kinds
    assert not unknown, f"enter {unknown} in LATER of trainer/fields.py, with the value at which nothing changes"
    assert not (of_1 | later) - SPECS[name].model_fields.keys(), "a field of an earlier version is gone"


def test_what_a_job_and_its_training_have_in_common_is_declared_once():
    assert not inspect.get_annotations(JobTrainSpec), "all its fields are of the trainer's specs"
    assert not inspect.get_annotations(TrainSpec).keys() & JobTrainSpec.model_fields.keys()
    assert not inspect.get_annotations(TokensSpec).keys() & JobTrainSpec.model_fields.keys()


def test_files_begin_with_the_fields_that_they_always_began_with():
    job = job_from({"preset": "tiny"})
    assert [*yaml.safe_load(to_yaml(job.train_spec()))][:6] == ["run", "run_dir", "steps", "seed", "model", "tokens"]
    assert [*yaml.safe_load(to_yaml(job))["train"]][:3] == ["steps", "seq_len", "seed"]
