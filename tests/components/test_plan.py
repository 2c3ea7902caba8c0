import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.plan import step
from components.plan.step import arguments_for, placement, resolve, runnable_here
from manifests.spec import job_from, load_job
from trainer.specbase import SpecError


def test_untouched_fields_leave_the_preset_as_it_is():
    nothing = {"steps": 0, "nodes": 0, "gpus_per_node": -1, "datasets_pvc": "", "checkpoints_pvc": ""}
    assert resolve("tiny", **nothing, trainer_image="") == load_job("tiny")


def test_the_hubs_secret_of_the_form_is_the_jobs():
    assert resolve("tiny", hub_secret="hf-token").cluster.hub_secret == "hf-token"
    assert arguments_for("tiny", {"cluster": {"hub_secret": "hf-token"}})["hub_secret"] == "hf-token"


def test_where_jobs_are_is_known_without_the_plain_fields():
    """A fabric needs GPUs, whose number may be a plain field."""
    asked = {"cluster": {"namespace": "team", "fabric": "roce", "resources": {"rdma/hca": 1}}}
    found = placement("tiny", json.dumps(asked))
    assert found is not None and found.namespace == "team"
    assert resolve("h100-4b", json.dumps(asked), gpus_per_node=8, nodes=2).cluster.fabric == "roce"
    assert placement("tiny", '{"cluster": {"nodes": 0}}') is None


def test_whole_numbers_may_arrive_as_floats():
    job = resolve("tiny", steps=8.0, nodes=1.0, gpus_per_node=0.0)
    assert (job.train.steps, job.cluster.nodes, job.cluster.gpus_per_node) == (8, 1, 0)
    assert isinstance(job.train.steps, int)


def test_a_fraction_of_a_step_is_refused():
    with pytest.raises(SpecError, match=r"^steps: expected a whole number, got 1\.5$"):
        resolve("tiny", steps=1.5)


def test_zero_gpus_differ_from_the_presets_number():
    assert resolve("h100-4b", gpus_per_node=0).cluster.gpus_per_node == 0
    assert resolve("h100-4b", gpus_per_node=-1).cluster.gpus_per_node == 1


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        ({"train": {"steps": 5}}, "steps"),
        ({"cluster": {"image": "other:1"}}, "trainer_image"),
        ({"storage": {"datasets_pvc": "mine"}}, "datasets_pvc"),
    ],
)
def test_overrides_may_not_repeat_a_plain_field(overrides, field):
    with pytest.raises(SpecError) as error:
        resolve("tiny", json.dumps(overrides), steps=7)
    assert f"repeats the field '{field}'" in str(error.value)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("text", ['{"train": ', "[1]", '"train"'])
def test_overrides_that_are_no_json_object_are_refused(text):
    with pytest.raises(SpecError, match=r"^overrides: "):
        resolve("tiny", text)


def test_an_unknown_field_is_answered_with_the_nearest_name():
    with pytest.raises(SpecError, match=r"train\.sed: unknown field; did you mean 'train\.seed'\?"):
        resolve("tiny", '{"train": {"sed": 1}}')


def test_a_whole_job_needs_no_preset():
    whole = load_job("tiny").model_dump(mode="json")
    assert resolve(**arguments_for("", whole)) == load_job("tiny")


@settings(max_examples=20, deadline=None)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "name": st.sampled_from(["one", "two"]),
            "train": st.fixed_dictionaries({}, optional={"steps": st.integers(1, 10**9), "seed": st.integers(0, 9)}),
            "cluster": st.fixed_dictionaries(
                {},
                optional={
                    "nodes": st.sampled_from([1, 2]),
                    "gpus_per_node": st.just(0),
                    "image": st.sampled_from(["a:1", "b:2"]),
                    "queue": st.sampled_from(["q", None]),
                },
            ),
            "storage": st.fixed_dictionaries(
                {}, optional={"datasets_pvc": st.just("mine"), "datasets_dir": st.just("/data")}
            ),
        },
    )
)
def test_a_job_files_changes_survive_the_way_through_the_pipelines_arguments(changes):
    arguments = arguments_for("tiny", changes)
    assert resolve(**arguments) == job_from({"preset": "tiny"}, changes)
    assert all(isinstance(value, str | int) for value in arguments.values())


@pytest.fixture
def mounted(tmp_path):
    """Overrides of storage whose two folders exist, as in a pod that mounts both claims."""
    places = {f"{name}_dir": str(tmp_path / name) for name in ("datasets", "checkpoints")}
    for place in places.values():
        (tmp_path / place).mkdir()
    return places


def test_a_run_whose_volumes_are_mounted_may_start(mounted):
    job = resolve("tiny", json.dumps({"storage": mounted}))
    assert runnable_here(job) is job


@pytest.mark.parametrize("name", ["datasets", "checkpoints"])
def test_a_folder_that_is_no_mount_is_refused_before_any_work(mounted, tmp_path, name):
    elsewhere = mounted | {f"{name}_dir": str(tmp_path / "elsewhere")}
    with pytest.raises(SpecError) as error:
        runnable_here(resolve("tiny", json.dumps({"storage": elsewhere})))
    assert str(error.value).startswith(f"storage.{name}_dir: {tmp_path}/elsewhere is not a folder here; ")
    assert f"claim 'llm-{name}-pvc'" in str(error.value) and len(str(error.value).splitlines()) == 1
    assert not (tmp_path / "elsewhere").exists()


def test_training_in_place_needs_pytorch_there(monkeypatch):
    job = resolve("tiny", '{"cluster": {"target": "local"}}')
    assert runnable_here(job) is job
    monkeypatch.setattr(step, "find_spec", lambda name: None)
    with pytest.raises(SpecError, match=r"^cluster\.target: local trains in this very place, which has no PyTorch"):
        runnable_here(job)


def test_files_of_benchmarks_must_be_on_a_volume_of_the_cluster(mounted):
    volume = mounted["checkpoints_dir"]

    def job(questions: str, target: str = "kubernetes"):
        judge = {"url": "http://judge/v1", "model": "m", "questions": questions}
        fields = {"storage": mounted, "cluster": {"target": target}, "train": {"evaluate": {"judge": judge}}}
        return resolve("tiny", json.dumps(fields))

    with pytest.raises(SpecError, match=r"train\.evaluate\.judge\.questions: /home/q\.jsonl is not on a volume"):
        runnable_here(job("/home/q.jsonl"))
    with pytest.raises(SpecError, match=r"q\.jsonl is not there; copy it to the volume"):
        runnable_here(job(f"{volume}/q.jsonl"))
    Path(volume, "q.jsonl").touch()
    for fine in (job(f"{volume}/q.jsonl"), job("https://h/q.jsonl"), job("/home/q.jsonl", "local")):
        assert runnable_here(fine) is fine
