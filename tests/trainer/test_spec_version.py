"""Stored specs state which version they need; what a later version wrote is refused or ignored with one line."""

from __future__ import annotations

import logging
from pathlib import Path

import micro
import pytest
import yaml

from trainer.errors import SpecError
from trainer.fields import SPEC_VERSION
from trainer.spec import TrainSpec
from trainer.specbase import parse, to_stored_yaml, to_yaml


@pytest.fixture
def spec(tmp_path: Path) -> TrainSpec:
    return micro.micro_spec(tmp_path / "data", tmp_path / "run")


def later(spec: TrainSpec, **changes: object) -> dict:
    return yaml.safe_load(to_yaml(spec)) | {"spec_version": SPEC_VERSION + 1} | changes


def test_a_file_names_the_lowest_version_that_knows_it(spec: TrainSpec):
    assert "spec_version" not in yaml.safe_load(to_yaml(spec)), "version 1 refuses the field"
    assert to_stored_yaml(spec).splitlines()[0].endswith(b", spec_version 1")
    longer: TrainSpec = spec.updated({"begun_with_steps": 7})
    assert yaml.safe_load(to_stored_yaml(longer))["spec_version"] == 2
    for one in (spec, longer):
        assert parse(TrainSpec, yaml.safe_load(to_stored_yaml(one))) == one


def test_unknown_field_of_a_later_version_is_left_out_where_no_number_depends_on_it(spec: TrainSpec, caplog):
    value = later(spec)
    value["runtime"]["quieter"] = True
    with caplog.at_level(logging.WARNING):
        assert parse(TrainSpec, value, "train.yaml") == spec
    assert [record.getMessage() for record in caplog.records] == [
        f"train.yaml: written by a later yaongi (spec_version {SPEC_VERSION + 1}, this one knows {SPEC_VERSION}): "
        "runtime.quieter unknown here and left out; no number depends on it"
    ]


def test_unknown_field_of_a_later_version_that_may_change_numbers_is_refused(spec: TrainSpec):
    value = later(spec, dropout=0.1)
    value["runtime"]["quieter"] = True
    with pytest.raises(SpecError, match=rf"spec_version {SPEC_VERSION + 1}.*dropout.*use that version") as error:
        parse(TrainSpec, value, "train.yaml")
    assert "\n" not in str(error.value)
    with pytest.raises(SpecError, match=r"dropout: unknown field"):
        parse(TrainSpec, value | {"spec_version": SPEC_VERSION})


@pytest.mark.parametrize("number", [0, "2", True, None])
def test_a_number_that_is_no_version_is_refused(spec: TrainSpec, number: object):
    with pytest.raises(SpecError, match="spec_version: expected a whole number"):
        parse(TrainSpec, later(spec, spec_version=number))
