"""The verbs on runs of Kubeflow Pipelines, with answers that were recorded from a real backend."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
from kfp_backend import Backend, Recorded

from pipelines.runs.kfp import look, stopping
from pipelines.runs.kfp.steppods import StepPods
from pipelines.runs.kfp.watched import Watched
from trainer.errors import LaunchError

STEPS = ["plan", "download", "hygiene", "tokenizer", "encode", "shards", "train", "evaluate", "export"]
WHILE_TRAINING = "2026-11-30T22:02:00Z"  # in the case `succeeded`

Verb = Callable[..., tuple[int, str, str]]


@pytest.fixture
def backend() -> Iterator[Backend]:
    made = Backend()
    yield made
    made.shutdown()


@pytest.fixture
def asked(yaongi: Verb, backend: Backend, monkeypatch: pytest.MonkeyPatch) -> Verb:
    """The command line with the backend's address in the environment, and no cluster."""
    monkeypatch.setenv("KFP_HOST", backend.url)
    monkeypatch.setenv("KUBECONFIG", os.devnull)
    for module in (look, stopping):
        monkeypatch.setattr(module, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(stopping, "EXTRA_SECONDS", -110)  # of the 120 s of grace
    return yaongi


def rows(said: str) -> dict[str, str]:
    """The lines of `status` by their first word."""
    return {words[0]: words[1] for line in said.splitlines() if len(words := line.split(maxsplit=1)) == 2}


def test_status_shows_our_steps_only_in_order_with_time_and_last_line(asked: Verb, backend: Backend) -> None:
    run = backend.show(Recorded("succeeded"))
    code, said, error = asked("status", run)
    shown = rows(said)
    assert (code, error) == (0, "")
    names = [line.split()[0] for line in said.splitlines()]
    assert names == [
        *("runs1-13d48da6", "state", "where", "step", "loss", "speed", "checkpoint", "restarts", "run"),
        *(*STEPS, "tune", "summary", "cleanup", "page"),
    ]
    assert shown["state"] == "succeeded" and shown["page"] == f"{backend.url}/#/runs/details/{run}"
    assert shown["step"] == "60/60" and shown["loss"].startswith("6.0855") and shown["checkpoint"] == "step 60"
    assert shown["train"].startswith("succeeded  0:02:51  done: 60 steps, 122,880 tokens, loss 8.3269")
    assert shown["cleanup"] == "succeeded  0:00:07  this run left no job running"


def test_while_it_trains_the_step_runs_and_later_ones_wait(asked: Verb, backend: Backend) -> None:
    backend.web = True  # the only source for a running pod without a cluster
    run = backend.show(Recorded("succeeded").at(WHILE_TRAINING))
    shown = rows(asked("status", run)[1])
    assert shown["state"] == "running" and shown["step"] == "60/60"  # its log was recorded at the end
    assert shown["train"].startswith("running ") and shown["evaluate"] == shown["cleanup"] == "waiting"
    assert shown["shards"].startswith("succeeded")


def test_a_workflow_so_large_that_argo_packs_it_shows_the_same(asked: Verb, backend: Backend) -> None:
    backend.web = True
    run = backend.show(Recorded("succeeded"))
    plain = asked("status", run)[1]
    backend.packed = True
    assert asked("status", run)[1] == plain and "train       succeeded" in plain


def test_steps_of_a_loop_over_nothing_and_of_a_condition_that_does_not_hold_are_not_run(
    asked: Verb, backend: Backend
) -> None:
    """Also while later steps run: then they do not wait."""
    whole = Recorded("nothing-to-do")
    (begun,) = [node["startedAt"] for node in whole.nodes.values() if node["name"].endswith(".export(0).executor(0)")]
    for run in (whole, whole.at(begun)):
        shown = rows(asked("status", backend.show(run))[1])
        backend.now.clear()
        assert shown["data"].startswith("succeeded ") and shown["encode"] == shown["shards"] == "not run"
    assert shown["export"].startswith("running ") and shown["cleanup"] == "waiting"


@pytest.mark.parametrize(
    ("case", "why"),
    [
        ("failed-in-plan", "failed: plan: error: tiny: train.stpes: unknown field; did you mean 'steps'?"),
        # The log of the launcher was gone when this was recorded: only its exit code is left.
        ("failed-in-launcher", "failed: train: error: "),
        (
            "absent-claim",
            "running: plan cannot be scheduled: 0/1 nodes are available: persistentvolumeclaim "
            "\"no-such-claim\" not found; create the claim 'no-such-claim' or name one that exists "
            "(storage.datasets_pvc, storage.checkpoints_pvc)",
        ),
        (
            "absent-step-image",
            "running: plan image 'localhost/absent-pipeline:9.9.9' cannot be pulled (ImagePullBackOff: ",
        ),
    ],
)
def test_a_run_that_failed_or_does_not_get_on_says_why(asked: Verb, backend: Backend, case: str, why: str) -> None:
    recorded = Recorded(case)
    run = backend.show(recorded)
    assert rows(asked("status", run)[1])["state"].startswith(why)
    said = asked("why", run)[1]
    assert said.startswith(f"{recorded.run['display_name']}, on {backend.url}, is {why}") and said.count("\n") == 1
    if case == "absent-step-image":
        assert "check --image (in the form: image): a localhost/ image is served by no registry" in said


def test_tasks_of_one_component_have_the_names_that_the_pipeline_gives_them(asked: Verb, backend: Backend) -> None:
    """launch, launch-2 and launch-3 of one component."""
    shown = rows(asked("status", backend.show(Recorded("failed-in-launcher")))[1])
    assert [name for name in shown if name in STEPS] == STEPS and "launch" not in shown
    assert shown["train"].startswith("failed ") and shown["evaluate"] == shown["export"] == "not run"
    assert "no permission to list pytorchjobs in namespace 'other'" in shown["cleanup"]


def test_a_stopped_run_reads_stopped_although_the_backend_calls_it_failed(asked: Verb, backend: Backend) -> None:
    recorded = Recorded("stopped")
    assert recorded.run["state"] == "FAILED"
    shown = rows(asked("status", backend.show(recorded))[1])
    assert shown["state"] == "stopped: submit its job again to continue"
    assert shown["train"].startswith("stopped ") and shown["cleanup"].startswith("succeeded ")
    assert shown["evaluate"] == "not run"


def test_a_step_whose_driver_failed_is_the_one_that_failed(asked: Verb, backend: Backend) -> None:
    """As when the backend's own services do not answer; the task itself is then omitted."""
    run = Recorded("succeeded")
    for name, node in list(run.nodes.items()):
        if ".launch-2(0)" in node["name"]:
            del run.nodes[name]
        elif node["name"].endswith(".launch-2"):
            node |= {"phase": "Omitted", "message": "omitted: depends condition not met"}
        elif ".launch-2-driver" in node["name"]:
            node |= {"phase": "Failed", "message": "main: Error (exit code 1)"}
    run.logs = {name: text for name, text in run.logs.items() if name in run.nodes}
    run.run["state"] = "FAILED"
    state = rows(asked("status", backend.show(run))[1])
    assert state["state"].startswith("failed: evaluate: error: ") and state["evaluate"].startswith("failed")


SCHEDULING = '0/1 nodes are available: persistentvolumeclaim "no-such-claim" not found. not found'
PULL = 'Failed to pull image "localhost/absent-pipeline:9.9.9": failed to pull and unpack image: connection refused'


@pytest.mark.parametrize(
    ("events", "said"),
    [
        ([("FailedScheduling", SCHEDULING)], "cannot be scheduled: 0/1 nodes are available: persistentvolumeclaim"),
        (
            [("Failed", PULL), ("Failed", "Error: ErrImagePull"), ("Failed", "Error: ImagePullBackOff")],
            "image 'localhost/absent-pipeline:9.9.9' cannot be pulled (ErrImagePull: Failed to pull image",
        ),
        ([("FailedMount", "a message of a kind that says nothing about the start")], ""),
    ],
)
def test_why_a_step_did_not_start_is_told_after_the_run_has_ended(
    asked: Verb, backend: Backend, monkeypatch: pytest.MonkeyPatch, events: list[tuple[str, str]], said: str
) -> None:
    """The backend forgets it: the node then says `Step exceeded its deadline`. The cluster has it as events."""
    ended = Recorded("absent-claim")
    ended.run |= {
        "state": "FAILED",
        "state_history": [{"state": "RUNNING"}, {"state": "CANCELING"}, {"state": "FAILED"}],
    }
    for node in ended.nodes.values():
        if node["phase"] in ("Running", "Pending"):
            node |= {"phase": "Failed", "message": "Step exceeded its deadline"}
    items = [
        {"reason": reason, "message": message, "lastTimestamp": f"2026-11-30T21:58:0{at}Z"}
        for at, (reason, message) in enumerate(events)
    ]

    class Cluster:
        core = SimpleNamespace(list_namespaced_event=None, read_namespaced_pod_log=None)

        def call(self, doing: str, *_: object, **options: object) -> SimpleNamespace:
            if doing == "get pods/log":
                raise LaunchError("no such pod")
            assert "yaongi-pretrain-rgbnc-" in str(options["field_selector"])
            return SimpleNamespace(data=json.dumps({"items": items}).encode())

    monkeypatch.setattr(StepPods, "cluster", Cluster())
    why = rows(asked("status", backend.show(ended))[1])["state"]
    if said:
        assert why.startswith(f"stopped: plan: did not start: {said}")
    assert why.endswith("submit its job again to continue") and "deadline" not in why


def test_logs_are_the_steps_own_lines_one_step_after_another(asked: Verb, backend: Backend) -> None:
    run = backend.show(Recorded("succeeded"))
    code, said, _ = asked("logs", run)
    begun = [line for line in said.splitlines() if line.startswith("▶ ")]
    assert code == 0 and begun == [
        f"▶ {'encode 1/1' if name == 'encode' else name}" for name in (*STEPS, "tune", "summary", "cleanup")
    ]
    assert "KFP Executor" not in said and "launcher_v2.go" not in said and "executorInput" not in said
    train = asked("logs", run, "--task", "train")[1]
    assert train in said and train.startswith("▶ train\n") and "step 60/60  loss 6.0855" in train
    assert train.splitlines()[-1].startswith("✓ train (")
    assert asked("logs", run, "--rank", "0")[1] == train
    assert asked("logs", run, "--rank", "1")[2].startswith("error: --rank 1: Kubeflow Pipelines has the log of rank 0")


def test_the_log_of_a_failed_step_ends_with_its_reason(asked: Verb, backend: Backend) -> None:
    run = backend.show(Recorded("failed-in-plan"))
    assert asked("logs", run, "--task", "plan")[1] == (
        "▶ plan\nerror: plan: tiny: train.stpes: unknown field; did you mean 'steps'?\n"
    )
    code, said, error = asked("logs", run, "--task", "train")
    assert (code, said, error) == (69, "", "error: step train has no log: it is not run\n")
    code, _, error = asked("logs", run, "--task", "nothing")
    assert code == 69 and error.startswith(f"error: run {run} has no step 'nothing'; it has: plan, download, hygiene")


def test_a_log_that_nobody_serves_is_one_line_with_the_fix(asked: Verb, backend: Backend) -> None:
    run = backend.show(Recorded("succeeded").at(WHILE_TRAINING))
    code, _, error = asked("logs", run, "--task", "train")
    fix = f"{backend.url} does not serve the log of train; set KUBECONFIG to its cluster, or give "
    assert code == 69 and error.startswith(f"error: {fix}")
    said = asked("logs", run)[1]
    assert said.splitlines()[-1].startswith(fix) and "▶ shards" in said and "▶ train" not in said
    backend.web = True
    assert asked("logs", run, "--task", "train")[1].startswith("▶ train\n")


def test_logs_follow_a_run_to_its_end_across_an_outage_and_print_each_line_once(asked: Verb, backend: Backend) -> None:
    whole = Recorded("succeeded")
    backend.web = True
    backend.show(*(whole.at(f"2026-11-30T22:0{minute}:00Z") for minute in range(6)), whole)
    backend.away = range(20, 24)
    code, said, _ = asked("logs", whole.id, "--follow")
    assert code == 0 and len(backend.asked) > 24
    backend.show(whole)
    assert sorted(said.splitlines()) == sorted(asked("logs", whole.id)[1].splitlines())


def test_following_one_step_ends_with_it(asked: Verb, backend: Backend) -> None:
    run = backend.show(Recorded("succeeded").at(WHILE_TRAINING))
    code, said, _ = asked("logs", run, "--task", "shards", "--follow")
    assert code == 0 and said.splitlines()[0] == "▶ shards"


def test_stop_returns_when_nothing_is_left_and_says_so(asked: Verb, backend: Backend) -> None:
    whole = Recorded("stopped")
    times = [each["update_time"] for each in whole.run["state_history"]]
    before, canceling = whole.at(times[1]), whole.at(times[2])
    backend.stopped = [canceling, canceling, whole]
    run = backend.show(before)
    code, said, error = asked("stop", run)
    assert (code, error) == (0, "") and f"POST /apis/v2beta1/runs/{run}:terminate" in backend.asked
    assert said.splitlines()[-1].startswith(f"run {run} is stopped; nothing of it runs any more (")
    assert said.endswith("; submit its job again to continue\n")
    code, _, error = asked("stop", run)
    assert code == 69 and error == f"error: run {run} has ended already, as stopped\n"


def test_stop_waits_for_a_cleanup_that_the_backend_has_given_up(
    asked: Verb, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its node is marked as failed while its pod starts; the pod goes on and cleans up after the run has ended."""
    done = Recorded("stopped")
    (node,) = [name for name, each in done.nodes.items() if ".cleanup(0).executor(0)" in each["name"]]
    for each in done.nodes.values():
        if ".cleanup(0)" in each["name"] or each["name"].endswith(".cleanup"):
            each |= {"phase": "Failed", "message": "Step exceeded its deadline"}
    silent = done.at("9")  # nothing is later
    silent.run, silent.logs = done.run, {name: text for name, text in done.logs.items() if name != node}
    before = Recorded("stopped").at(done.run["state_history"][1]["update_time"])
    backend.show(before)
    backend.stopped = [silent, silent, silent, done]
    code, said, _ = asked("stop", done.id)
    assert code == 0 and "stopping: cleanup is running, after the end of the run\n" in said
    assert "nothing of it runs any more" in said and "did not run" not in said
    backend.show(before)
    backend.stopped = [silent]
    backend.now.clear()
    monkeypatch.setattr(stopping, "LEASE_SECONDS", 0.2)
    assert "; cleanup did not run, the workers ended without it; submit" in asked("stop", done.id)[1]


def test_stop_waits_for_the_workers_on_the_cluster_where_the_image_of_cleanup_is_gone(
    asked: Verb, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They end by their lease; cleanup never runs, and the backend would wait for its image for half an hour."""
    stuck = Recorded("stopped")
    before = stuck.at(stuck.run["state_history"][1]["update_time"])
    (node,) = [each for each in stuck.nodes.values() if ".cleanup(0).executor(0)" in each["name"]]
    stuck = stuck.at(node["startedAt"])
    assert stuck.run["state"] == "CANCELING"
    stuck.nodes[node["id"]] |= {"phase": "Pending", "message": 'ErrImagePull: failed to pull "x/y:1": not found'}
    del stuck.logs[node["id"]]
    left = [["w-0", "w-1"], ["w-0", "w-1"], ["w-0"], []]
    monkeypatch.setattr(Watched, "sees", True)
    monkeypatch.setattr(Watched, "workers", lambda self: left.pop(0))
    monkeypatch.setattr(Watched, "steps", lambda self: ([], ["image 'x/y:1' cannot be pulled (not found)"]))
    monkeypatch.setattr(Watched, "log", lambda self: ["checkpoint of step 7 published after 0.1 s"])
    backend.stopped = [stuck]
    code, said, error = asked("stop", backend.show(before))
    assert (code, error, left) == (0, "", [])
    assert said.splitlines()[:2] == [
        f"stopping: the training saves a checkpoint and ends (pods left: {n})" for n in (2, 1)
    ]
    assert said.splitlines()[2].endswith(
        "; the newest checkpoint is of step 7; cleanup did not run (image 'x/y:1' cannot be pulled (not found)), the "
        "workers ended without it; submit its job again to continue"
    )


def test_resume_says_what_to_do_instead(asked: Verb, backend: Backend) -> None:
    code, said, error = asked("resume", backend.show(Recorded("failed-in-plan")))
    assert (code, said, error.count("\n")) == (69, "", 1) and "is failed; " in error and "submit its job again" in error
