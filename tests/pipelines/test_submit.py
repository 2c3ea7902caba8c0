"""`yaongi submit`, and the verbs on its runs, with a server that implements the part of Kubeflow Pipelines' API that
they need; its answers are shaped like the client's own models."""

import io
import json
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlparse

import pytest
from rich.console import Console

from components.plan.step import resolve
from manifests.spec import load_job
from pipelines import submit
from pipelines.runs import kfp
from trainer.errors import LaunchError
from trainer.specbase import SpecError

RUN = "0f6c2f8e-8a7b-4d43-9c55-3d1e6a0b7c21"
EXPERIMENT = {"experiment_id": "e1", "display_name": "yaongi"}
AWAY = {"state": "the backend is being replaced"}


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
        elif path.endswith(f"/runs/{RUN}"):
            states = self.server.states
            state = states.pop(0) if len(states) > 1 else states[0]
            self.answer({"run_id": RUN, "display_name": "tiny-1"} | state, 503 if state is AWAY else 200)
        elif path == "/k8s/pod/logs":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(f"log of {parse_qs(urlparse(self.path).query)['podname'][0]}\n".encode())
        else:
            self.answer({"message": path}, 404)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "{}")
        if urlparse(self.path).path.endswith(f"/runs/{RUN}:terminate"):
            self.server.states[:] = [{"state": "CANCELING"}, AWAY, {"state": "CANCELED"}]
            self.answer({})
        elif not urlparse(self.path).path.endswith("/runs"):
            self.answer(EXPERIMENT)
        elif self.server.refusing:
            self.answer({"message": "quota exceeded"}, 403)
        else:
            self.server.created = body
            self.answer({"run_id": RUN, "display_name": body["display_name"]})

    def log_message(self, *arguments) -> None:
        pass


def tasks(**states: str) -> dict:
    pods = {"child_tasks": [{"pod_name": "pod-of-it"}]}
    return {"task_details": [{"display_name": name, "state": state} | pods for name, state in states.items()]}


@pytest.fixture
def backend(monkeypatch):
    monkeypatch.setattr(kfp, "POLL_SECONDS", 0.01)
    made = Backend(
        [
            {"state": "RUNNING", "run_details": tasks(plan="SUCCEEDED", train="RUNNING")},
            AWAY,
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
        f"run {name}: {backend.url}/#/runs/details/{RUN}",
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


@pytest.fixture
def asked(monkeypatch, yaongi, backend):
    """The command line with the backend's address in the environment."""
    monkeypatch.setenv("KFP_HOST", backend.url)
    return yaongi


def test_status_shows_the_steps_of_a_run_and_what_failed(asked, backend):
    states = {"root": "RUNNING", "plan-driver": "SUCCEEDED", "plan": "SUCCEEDED", "train": "FAILED"}
    backend.states[:] = [{"state": "FAILED", "run_details": tasks(**states)}]
    code, said, _ = asked("status", RUN)
    assert code == 0 and said.startswith("tiny-1\nstate       failed: failed: train; see: yaongi logs")
    assert [line.split(maxsplit=1)[1] for line in said.splitlines() if line.startswith("step  ") and ":" in line] == [
        "plan: succeeded",
        "train: failed",
    ]
    assert f"page        {backend.url}/#/runs/details/{RUN}" in said


def test_logs_are_those_of_the_pods_of_a_step(asked, backend):
    backend.states[:] = [{"state": "RUNNING", "run_details": tasks(plan="SUCCEEDED", train="RUNNING")}]
    assert asked("logs", RUN, "--task", "train")[:2] == (0, "▶ train (running)\nlog of pod-of-it\n")
    assert asked("logs", RUN)[1].count("log of pod-of-it") == 2
    code, _, error = asked("logs", RUN, "--task", "nothing")
    assert code == 69 and error == f"error: run {RUN} has no step 'nothing'; it has: plan, train\n"


def test_stop_terminates_a_run_and_waits_for_its_end_across_an_outage(asked, backend):
    backend.states[:] = [{"state": "RUNNING"}]
    assert asked("stop", RUN)[:2] == (0, f"run {RUN} ended as canceled; submit its job again to continue\n")
    code, _, error = asked("stop", RUN)
    assert code == 69 and error == f"error: run {RUN} has ended already, as canceled\n"


def test_why_says_what_failed_and_resume_what_to_do_instead(asked, backend):
    backend.states[:] = [{"state": "FAILED", "run_details": tasks(plan="SUCCEEDED", train="FAILED")}]
    said = f"tiny-1, on {backend.url}, is failed: failed: train; see: yaongi logs {RUN} --task train\n"
    assert asked("why", RUN)[:2] == (0, said)
    code, said, error = asked("resume", RUN)
    assert (code, said, error.count("\n")) == (69, "", 1) and "submit its job again" in error


def test_a_run_that_the_backend_does_not_know_or_no_host_is_one_line(asked, backend, monkeypatch):
    other = RUN.replace("0f6c", "ffff")
    code, _, error = asked("status", other)
    assert code == 69 and error == f"error: {backend.url} refused run {other}: Not Found (404)\n"
    monkeypatch.delenv("KFP_HOST")
    assert asked("status", RUN)[2].startswith("error: --host is missing")


def test_a_host_is_refused_where_the_run_is_none_of_its_runs(yaongi, backend, monkeypatch):
    for verb in ("status", "logs", "stop", "resume", "why"):
        code, said, error = yaongi(verb, RUN[:8], "--host", backend.url)
        assert (code, said, error.count("\n")) == (2, "", 1)
        assert error.startswith(f"error: --host: a run on Kubeflow Pipelines is named by its whole id, and '{RUN[:8]}'")
    assert "whole id, and RUN is missing; give the id" in yaongi("status", "--host", backend.url)[2]
    monkeypatch.setenv("KUBECONFIG", os.devnull)
    monkeypatch.setenv("KFP_HOST", backend.url)
    assert yaongi("status", RUN[:8]) == (2, "", f"error: no run '{RUN[:8]}' in work; none is known\n")
    assert yaongi("status") == (0, "no runs in work\n", "")


def test_a_browser_is_opened_on_request_and_its_absence_costs_a_line(backend, monkeypatch):
    opened = []
    monkeypatch.setattr("webbrowser.open", lambda page: opened.append(page))  # None: no browser
    output = io.StringIO()
    console = Console(file=output, width=200)
    submit.submit("tiny", {}, host=backend.url, follow=False, console=console, browse=True)
    assert opened == [f"{backend.url}/#/runs/details/{RUN}"] and "no browser could be opened here" in output.getvalue()
