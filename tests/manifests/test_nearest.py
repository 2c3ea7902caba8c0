"""What a run's report says of its preset, and how specs are compared."""

from __future__ import annotations

import json

import pytest

from manifests.nearest import nearest_preset, preset_file_text
from manifests.spec import load_job, preset_names
from trainer.differences import Difference, differences


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_is_nearest_to_itself(name):
    assert nearest_preset(load_job(name)) == {"preset": name, "differences": []}


def test_the_fields_that_a_job_changes_are_its_differences():
    changes = {
        "name": "mine",
        "data": {"sources": {"ko": {"weight": 0.35}, "math": None, "logs": None, "en": {"weight": 0.4}}},
        "train": {"steps": 20_000, "evaluate": {"prompts": ["가", "나"]}, "optimizer": {"spike_guard": None}},
        "cluster": {"gpus_per_node": 0, "memory_gib_per_node": 7},
    }
    found = nearest_preset(load_job("tiny", changes))
    assert found["preset"] == "tiny"
    rows = {row["field"]: (row["preset"], row["run"]) for row in found["differences"]}
    tiny = load_job("tiny")
    assert rows.pop("data.sources.math")[1] == "–", "a source that is left out is one row"
    assert rows == {
        "data.sources.ko.weight": (str(tiny.data.sources["ko"].weight), "0.35"),
        "data.sources.en.weight": (str(tiny.data.sources["en"].weight), "0.4"),
        "train.steps": (f"{tiny.train.steps}", "20000"),
        "train.evaluate.prompts": (rows["train.evaluate.prompts"][0], "[가, 나]"),
        "train.optimizer.spike_guard": ("{sigmas: 6.0, window: 128}", "null"),
        "cluster.memory_gib_per_node": (str(tiny.cluster.memory_gib_per_node), "7.0"),
    }
    assert json.loads(preset_file_text(load_job("tiny", changes))) == found


def test_another_machine_does_not_make_another_preset_nearer():
    job = load_job("h100-4b", {"cluster": {"nodes": 1, "namespace": "x"}, "train": {"runtime": {"max_restarts": 3}}})
    assert nearest_preset(job)["preset"] == "h100-4b"


def test_differences_of_several_specs():
    first = {"a": 1, "b": {"c": [1, 2], "d": True, "only": 1}}
    second = {"a": 1, "b": {"c": [1], "d": True}, "e": "text"}
    third = {"a": 1, "b": {"c": [1, 2], "d": False}}
    assert differences([first, second, third]) == [
        Difference("b.c", ("[1, 2]", "[1]", "[1, 2]")),
        Difference("b.d", ("true", "true", "false")),
        Difference("b.only", ("1", "–", "–")),
        Difference("e", ("–", "text", "–")),
    ]
    assert differences([first, first]) == []
