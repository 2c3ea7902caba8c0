"""`yaongi submit`: what it sends to Kubeflow Pipelines, and how it follows the run. The server answers as recorded."""

import io
from collections.abc import Iterator

import pytest
from kfp_backend import EXPERIMENT, Backend, Recorded
from rich.console import Console

from components.plan.step import resolve
from manifests.spec import load_job
from pipelines import submit
from pipelines.runs.kfp import look
from trainer.errors import LaunchError
from trainer.specbase import SpecError

STEPS = ["plan", "download", "hygiene", "tokenizer", "encode", "shards", "train", "evaluate", "export", "tune"]


@pytest.fixture
def whole() -> Recorded:
    return Recorded("succeeded")


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch, whole: Recorded) -> Iterator[Backend]:
    """A run that is there for five minutes, and ends well."""
    monkeypatch.setattr(look, "POLL_SECONDS", 0.01)
    monkeypatch.setenv("KUBECONFIG", "/nowhere/config")
    made = Backend()
    made.show(*(whole.at(f"2026-11-30T{time}Z") for time in ("21:57:00", "21:58:10", "22:02:00", "22:05:00")), whole)
    yield made
    made.shutdown()


def run(backend: Backend, changes: dict, *, follow: bool = True, image: str = "") -> str:
    output = io.StringIO()
    console = Console(file=output, width=200)
    submit.submit("tiny", changes, host=backend.url, image=image, follow=follow, console=console)
    return output.getvalue()


def test_a_run_is_created_from_the_compiled_pipeline_and_followed_to_its_end(backend, whole):
    changes = {"train": {"steps": 9, "seed": 3}}
    output = run(backend, changes)
    name = load_job("tiny", changes).run_name
    assert backend.created[-1]["display_name"] == name
    assert backend.created[-1]["experiment_id"] == EXPERIMENT["experiment_id"]
    assert backend.created[-1]["pipeline_spec"]["pipeline_spec"]["pipelineInfo"]["name"] == "yaongi-pretrain"
    parameters = backend.created[-1]["runtime_config"]["parameters"]
    assert parameters == {"preset": "tiny", "steps": 9, "overrides": '{"train": {"seed": 3}}'}
    assert resolve(**parameters).run_name == name
    told = output.splitlines()
    assert told[0] == f"run {name}: {backend.url}/#/runs/details/{whole.id}"
    assert told[1] == "plan: succeeded in 0:00:07: run runs1-13d48da6: 60 steps of 2048 tokens"
    assert "train: running" in told and "train: succeeded in 0:02:51: done: 60 steps" in "\n".join(told)
    steps = [line.partition(":")[0] for line in told[1:]]
    assert list(dict.fromkeys(steps)) == [*STEPS, "summary", "cleanup"] and len(told) < 20


def test_images_of_the_steps_and_of_the_trainer_are_the_runs_parameters(backend):
    run(backend, {"cluster": {"image": "registry/trainer:2"}}, image="registry/pipeline:2")
    parameters = backend.created[-1]["runtime_config"]["parameters"]
    assert parameters["image"] == "registry/pipeline:2" and parameters["trainer_image"] == "registry/trainer:2"
    declared = backend.created[-1]["pipeline_spec"]["pipeline_spec"]["root"]["inputDefinitions"]["parameters"]
    assert parameters.keys() <= declared.keys()


def test_a_run_that_fails_tells_the_reason_of_its_step(backend):
    backend.looks.clear()
    backend.show(Recorded("failed-in-plan"))
    with pytest.raises(LaunchError, match=r"^the run ended as failed: plan: error: tiny: train.stpes: unknown field;"):
        run(backend, {})
    backend.looks.clear()
    backend.show(Recorded("stopped"))
    with pytest.raises(LaunchError, match=r"^the run was stopped; submit its job again to continue$"):
        run(backend, {})


def test_a_step_that_cannot_start_is_told_while_the_run_is_followed(backend, whole):
    stuck = Recorded("absent-claim")
    ended = Recorded("failed-in-plan")
    stuck.run["run_id"] = stuck.id = ended.id
    backend.looks.clear()
    backend.show(stuck, stuck, ended)
    output = io.StringIO()
    with pytest.raises(LaunchError):
        submit.submit("tiny", {}, host=backend.url, follow=True, console=Console(file=output, width=80))
    told = [line for line in output.getvalue().splitlines() if line.startswith("plan: starting: cannot be scheduled: ")]
    assert len(told) == 1 and "'no-such-claim'" in told[0]


def test_a_backend_that_restarts_is_waited_for(backend):
    backend.away = range(5, 12)
    assert run(backend, {}).splitlines()[-1].startswith("cleanup: succeeded in 0:00:07")


def test_without_following_the_run_is_only_created(backend):
    assert len(run(backend, {}, follow=False).splitlines()) == 1


def test_the_experiment_is_created_once(backend):
    backend.experiments.clear()
    run(backend, {}, follow=False)
    run(backend, {}, follow=False)
    assert backend.experiments == [EXPERIMENT]


def test_users_with_a_namespace_each_run_in_that_of_the_job(backend):
    backend.healthy = backend.healthy | {"multi_user": True}
    with pytest.raises(SpecError, match=r"^cluster\.namespace is missing: http://.* is shared by users"):
        run(backend, {}, follow=False)
    backend.experiments.clear()
    run(backend, {"cluster": {"namespace": "mine"}}, follow=False)
    assert backend.experiments == [EXPERIMENT | {"namespace": "mine"}]


def test_a_submitted_run_does_not_train_on_this_machine(backend):
    with pytest.raises(SpecError, match=r"^cluster\.target: "):
        run(backend, {"cluster": {"target": "local"}})


def test_a_browser_is_opened_on_request_and_its_absence_costs_a_line(backend, whole, monkeypatch):
    opened = []
    monkeypatch.setattr("webbrowser.open", lambda page: opened.append(page))  # None: no browser
    output = io.StringIO()
    console = Console(file=output, width=200)
    submit.submit("tiny", {}, host=backend.url, follow=False, console=console, browse=True)
    assert (
        opened == [f"{backend.url}/#/runs/details/{whole.id}"]
        and "no browser could be opened here" in output.getvalue()
    )
