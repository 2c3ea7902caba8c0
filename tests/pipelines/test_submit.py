"""`yaongi submit` against a server that speaks as much of the API of Kubeflow Pipelines as a run needs."""

import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlparse

import pytest
from rich.console import Console

from components.launch import LaunchError
from components.plan.step import resolve
from manifests.spec import load_job
from pipelines import submit
from trainer.specbase import SpecError

EXPERIMENT = {"experiment_id": "e1", "display_name": "yaongi"}


class Backend(ThreadingHTTPServer):
    """`states` are the answers to the polls of the run, one after another; `created` is the run that was asked for."""

    def __init__(self, states: list[dict]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.states, self.created, self.refusing = states, None, False
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def answer(self, value: dict, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        path = urlparse(self.path).path
        if path.endswith("/healthz"):
            self.answer({"multi_user": False})
        elif path.endswith("/experiments"):
            self.answer({"experiments": [EXPERIMENT]})
        elif path.endswith("/runs/r1"):
            states = self.server.states
            self.answer({"run_id": "r1"} | (states.pop(0) if len(states) > 1 else states[0]))
        else:
            self.answer({"message": path}, 404)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not urlparse(self.path).path.endswith("/runs"):
            self.answer(EXPERIMENT)
        elif self.server.refusing:
            self.answer({"message": "quota exceeded"}, 403)
        else:
            self.server.created = body
            self.answer({"run_id": "r1", "display_name": body["display_name"]})

    def log_message(self, *arguments) -> None:
        pass


def tasks(**states: str) -> dict:
    return {"task_details": [{"display_name": name, "state": state} for name, state in states.items()]}


@pytest.fixture
def backend(monkeypatch):
    monkeypatch.setattr(submit, "POLL_SECONDS", 0.01)
    made = Backend(
        [
            {"state": "RUNNING", "run_details": tasks(plan="SUCCEEDED", train="RUNNING")},
            {"state": "SUCCEEDED", "run_details": tasks(plan="SUCCEEDED", train="SUCCEEDED")},
        ]
    )
    yield made
    made.shutdown()


def run(backend: Backend, changes: dict, *, follow: bool = True, image: str = "") -> str:
    output = io.StringIO()
    console = Console(file=output, width=200)
    submit.submit("tiny", changes, host=backend.url, image=image, follow=follow, console=console)
    return output.getvalue()


def test_a_run_is_created_from_the_compiled_pipeline_and_followed_to_its_end(backend):
    changes = {"train": {"steps": 9, "seed": 3}}
    output = run(backend, changes)
    name = load_job("tiny", changes).run_name
    assert backend.created["display_name"] == name
    assert backend.created["experiment_id"] == "e1"
    assert backend.created["pipeline_spec"]["pipeline_spec"]["pipelineInfo"]["name"] == "yaongi-pretrain"
    parameters = backend.created["runtime_config"]["parameters"]
    assert parameters == {"preset": "tiny", "steps": 9, "overrides": '{"train": {"seed": 3}}'}
    assert resolve(**parameters).run_name == name
    assert output.splitlines() == [
        f"run {name}: {backend.url}/#/runs/details/r1",
        "plan: succeeded",
        "train: running",
        "train: succeeded",
    ]


def test_images_of_the_steps_and_of_the_trainer_are_the_runs_parameters(backend):
    run(backend, {"cluster": {"image": "registry/trainer:2"}}, image="registry/pipeline:2")
    parameters = backend.created["runtime_config"]["parameters"]
    assert parameters["image"] == "registry/pipeline:2" and parameters["trainer_image"] == "registry/trainer:2"
    declared = backend.created["pipeline_spec"]["pipeline_spec"]["root"]["inputDefinitions"]["parameters"]
    assert parameters.keys() <= declared.keys()


def test_a_run_that_fails_names_the_step(backend):
    backend.states[:] = [{"state": "FAILED", "run_details": tasks(plan="SUCCEEDED", train="FAILED")}]
    with pytest.raises(LaunchError, match=r"^the run ended as failed; failed: train;"):
        run(backend, {})


def test_without_following_the_run_is_only_created(backend):
    backend.states[:] = [{"state": "FAILED"}]
    assert len(run(backend, {}, follow=False).splitlines()) == 1


def test_a_refusal_is_told_with_its_reason(backend):
    backend.refusing = True
    with pytest.raises(LaunchError, match=r"refused the run: Forbidden \(403\)"):
        run(backend, {})


def test_a_submitted_run_does_not_train_on_this_machine(backend):
    with pytest.raises(SpecError, match=r"^cluster\.target: "):
        run(backend, {"cluster": {"target": "local"}})
