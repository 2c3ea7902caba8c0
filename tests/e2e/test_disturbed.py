"""Workers are deleted and killed while they train; the run ends as if nothing had happened, and its books say what has.

The oracle is the run that nothing disturbed: the same steps, data and losses, to the last bit.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from kube import Namespace, wait_for
from pipeline_run import RUN_TIMEOUT, PipelineRun
from prometheus_client.parser import text_string_to_metric_families

pytestmark = pytest.mark.e2e

# A rank is `python -u -m trainer train …`, its parent `python -m trainer.entrypoint train …`.
KILL_A_RANK = """
import os, pathlib, signal
for process in pathlib.Path("/proc").glob("[0-9]*"):
    if b"\\0-m\\0trainer\\0" in (process / "cmdline").read_bytes():
        os.kill(int(process.name), signal.SIGKILL)
"""
KILL_EVERYTHING = "import os, signal; os.kill(-1, signal.SIGKILL)"  # but the container's first process, which follows

START_SECONDS = 25  # also the time that torchrun's own rendezvous waits


@dataclass(frozen=True)
class Recovery:
    """What one disturbance cost: seconds until a step was trained that had not been, and steps trained twice."""

    what: str
    seconds: float
    steps_lost: int


class Disturbed:
    """The run while it is being disturbed."""

    def __init__(self, run: PipelineRun) -> None:
        self.run, self.namespace = run, run.namespace

    def step(self) -> int:
        """The last one trained. The launcher's pod has to be alive, else nobody would ever get further."""
        (driver,) = self.namespace.find("pods", "--field-selector", f"metadata.name={self.run.pod}")
        assert driver["status"]["phase"] in ("Pending", "Running"), self.namespace.kubectl("logs", self.run.pod)
        return len(self.run.read("logs/metrics.jsonl").splitlines())

    def resumed_from(self) -> list[int]:
        """The step of the checkpoint that each start has gone on from, 0 for those that found none."""
        starts = re.split(r"mesh \(copies", self.run.read("logs/rank-0.log"))[1:]
        found = (re.search(r"resuming from the checkpoint of step (\d+)", start) for start in starts)
        return [int(match[1]) if match else 0 for match in found]

    def disturb(self, what: str, act: Callable[[], object]) -> Recovery:
        before, starts = self.step(), len(self.resumed_from())
        act()
        began = time.monotonic()

        def further() -> bool:
            return len(self.resumed_from()) > starts and self.step() > max(before, self.resumed_from()[-1])

        wait_for(f"a new step after: {what}", further, 240)
        recovery = Recovery(what, time.monotonic() - began, max(0, before - self.resumed_from()[-1]))
        print(f"{what} after step {before}: {recovery.seconds:.0f} s to a new step, {recovery.steps_lost} steps lost")
        return recovery

    def exported_restarts(self) -> dict[str, float]:
        """yaongi_restarts_total by reason, as rank 0 exports it now."""
        path = f"/api/v1/namespaces/{self.namespace.name}/pods/{self.run.workers[0]}:9400/proxy/metrics"
        page = self.namespace.kubectl("get", "--raw", path)
        families = {family.name: family for family in text_string_to_metric_families(page)}
        return {sample.labels["reason"]: sample.value for sample in families["yaongi_restarts"].samples}


def start_with_worker_1_queued(namespace: Namespace) -> PipelineRun:
    """A quota leaves room for the launcher and worker 0 alone, for longer than a rendezvous waits for late workers."""
    alive = [pod for pod in namespace.find("pods") if pod["status"]["phase"] in ("Pending", "Running")]
    spec = {"hard": {"pods": str(len(alive) + 2)}}
    namespace.apply({"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "one-worker"}, "spec": spec})
    try:
        wait_for("the quota", lambda: namespace.find("resourcequotas")[0].get("status", {}).get("hard"), 20)
        changes = ["train.checkpoint.every_steps=4", f"cluster.start_timeout_seconds={START_SECONDS}"]
        run = PipelineRun.start_training(namespace, "disturbed", *changes)
        zero, one = run.workers
        wait_for("worker 0", lambda: namespace.get("pod", zero), 120)
        namespace.running(zero)
        waiting = f"rendezvous host {one} has no address yet"
        wait_for("worker 0 to wait for worker 1", lambda: waiting in namespace.kubectl("logs", zero), 60)
        time.sleep(START_SECONDS + 10)
    finally:
        namespace.kubectl("delete", "resourcequota", "one-worker")
    return run


def restarts(run: PipelineRun) -> dict[str, Counter[str]]:
    """Restarts by worker and reason."""
    return {node: Counter(record["reasons"]) for node, record in run.read_json("restarts.json")["nodes"].items()}


def test_lost_workers_change_neither_the_outcome_nor_the_losses(first: PipelineRun) -> None:
    assert first.code == 0, first.log
    namespace: Namespace = first.namespace
    disturbed = Disturbed(run := start_with_worker_1_queued(namespace))
    zero, one = run.workers
    wait_for("step 5", lambda: disturbed.step() >= 5, RUN_TIMEOUT, every=0.5)
    assert restarts(run) == {zero: Counter(), one: Counter()}, "to wait for a queued worker costs no restarts"
    recoveries = [
        disturbed.disturb("worker 1 deleted", lambda: namespace.kubectl("delete", "pod", one, "--wait=false")),
        disturbed.disturb("rank of worker 1 killed", lambda: namespace.execute(one, "python", "-c", KILL_A_RANK)),
        disturbed.disturb("worker 0 deleted", lambda: namespace.kubectl("delete", "pod", zero, "--wait=false")),
        disturbed.disturb(
            "all of worker 0 killed", lambda: namespace.execute(zero, "python", "-c", KILL_EVERYTHING, check=False)
        ),
    ]
    exported, books = disturbed.exported_restarts(), restarts(run)
    print("restarts by worker:", {node: dict(reasons) for node, reasons in books.items()}, "exported:", exported)
    run.finish()
    assert run.code == 0, run.log
    assert run.condition == "Succeeded"
    assert "exceeded quota: one-worker" in run.log
    assert run.losses == first.losses
    assert run.read_json("result.json")["loss_last"] == first.read_json("result.json")["loss_last"]
    by_stop, by_kill = recoveries[0::2], recoveries[1::2]
    assert [each.steps_lost for each in by_stop] == [0, 0], "a worker that is told to stop saves the step it is at"
    assert all(each.steps_lost <= 2 * 4 for each in by_kill), "the last checkpoint may not have been published yet"
    for node in (zero, one):
        assert (books[node]["terminated"], books[node]["killed"]) == (1, 1)
        assert set(books[node]) <= {"terminated", "killed", "communication", "peer_stopped"}
    # What one worker's loss costs the other is no restart of its own.
    assert {reason: count for reason, count in exported.items() if count} == {"terminated": 2, "killed": 2}
    assert run.read_json("result.json")["restarts"] >= len(recoveries)
