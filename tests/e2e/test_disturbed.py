"""Workers are deleted and killed while they train; the run ends as if undisturbed, and its records state what happened.

The oracle is the undisturbed run: the same steps, data and losses, to the last bit.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from kube import Namespace, Object, wait_for
from pipeline_run import RUN_TIMEOUT, PipelineRun
from prometheus_client.parser import text_string_to_metric_families

pytestmark = pytest.mark.e2e

# A rank is `python -u -m trainer train …`, its parent `python -m trainer.entrypoint train …`.
KILL_A_RANK = """
import os, pathlib, signal
for process in pathlib.Path("/proc").glob("[0-9]*"):
    try:
        arguments = (process / "cmdline").read_bytes()
    except OSError:  # it has ended meanwhile
        continue
    if b"\\0-m\\0trainer\\0" in arguments:
        os.kill(int(process.name), signal.SIGKILL)
"""
KILL_EVERYTHING = "import os, signal; os.kill(-1, signal.SIGKILL)"  # but the container's first process, which follows

# What rank 0 logs when it starts and when it continues from a checkpoint.
STARTED, RESUMED = r"mesh \(copies", "resuming from the checkpoint of step"
START_SECONDS = 90  # also the time that torchrun's own rendezvous waits


@dataclass(frozen=True)
class Recovery:
    """The cost of a disturbance: seconds until the next new step, and steps trained twice."""

    what: str
    seconds: float
    steps_lost: int


class Disturbed:
    """The run while it is being disturbed."""

    def __init__(self, run: PipelineRun) -> None:
        self.run, self.namespace = run, run.namespace

    def look(self) -> tuple[int, list[int]]:
        """The last step trained, and the step of the checkpoint from which each start continued, 0 without one.

        A single request, since a fast machine trains many of the run's few steps during several requests.
        """
        files = f"wc -l < metrics.jsonl || echo 0; grep -E '{STARTED}|{RESUMED}' rank-0.log"
        shown = self.namespace.execute("reader", "sh", "-c", f"cd {self.run.job.run_dir}/logs && {files}", check=False)
        lines, *starts = re.split(STARTED, shown)
        found = (re.search(rf"{RESUMED} ([0-9]+)", start) for start in starts)
        return int(lines.strip().partition("\n")[0] or 0), [int(match[1]) if match else 0 for match in found]

    def check_driver(self) -> None:
        """The launcher's pod must be alive, otherwise the run would never continue."""
        (driver,) = self.namespace.find("pods", "--field-selector", f"metadata.name={self.run.pod}")
        assert driver["status"]["phase"] in ("Pending", "Running"), self.namespace.kubectl("logs", self.run.pod)

    def reach(self, what: str, there: Callable[[int, list[int]], bool], timeout: float) -> list[int]:
        """Wait for a step; returns the steps from which each start continued."""

        def look() -> list[int] | None:
            step, starts = self.look()
            if there(step, starts):
                return starts
            self.check_driver()
            return None

        return wait_for(what, look, timeout, is_there=lambda found: found is not None, every=0.2) or []

    def disturb(self, what: str, act: Callable[[], object]) -> Recovery:
        before, starts = wait_for("the run's files", self.look, 60, is_there=lambda found: bool(found[1]))
        act()
        began = time.monotonic()
        shown: list[
            int
        ] = []  # since the new start; the first steps may repeat what the previous one trained but did not save

        def further(step: int, found: list[int]) -> bool:
            shown.extend([step] if len(found) > len(starts) else [])
            return bool(shown) and step != shown[0] and step > max(before, found[-1])

        resumed = self.reach(f"a new step after: {what}", further, 900)
        recovery = Recovery(what, time.monotonic() - began, max(0, before - resumed[-1]))
        print(f"{what} after step {before}: {recovery.seconds:.0f} s to a new step, {recovery.steps_lost} steps lost")
        return recovery

    def exported_restarts(self) -> dict[str, float]:
        """yaongi_restarts_total by reason, as rank 0 exports it now."""
        path = f"/api/v1/namespaces/{self.namespace.name}/pods/{self.run.workers[0]}:9400/proxy/metrics"
        page = self.namespace.kubectl("get", "--raw", path)
        families = {family.name: family for family in text_string_to_metric_families(page)}
        return {sample.labels["reason"]: sample.value for sample in families["yaongi_restarts"].samples}


def start_with_worker_1_queued(namespace: Namespace) -> PipelineRun:
    """A quota admits only the launcher and worker 0, for longer than a rendezvous waits for late workers."""

    def alive() -> list[Object]:
        return [pod for pod in namespace.find("pods") if pod["status"]["phase"] in ("Pending", "Running")]

    stay = {"reader", "prometheus"}
    wait_for(
        "pods of former tests to go, which would make room",
        lambda: {pod["metadata"]["name"] for pod in alive()} <= stay,
        300,
    )
    spec = {"hard": {"pods": str(len(alive()) + 2)}}
    namespace.apply({"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "one-worker"}, "spec": spec})
    try:
        wait_for("the quota", lambda: namespace.find("resourcequotas")[0].get("status", {}).get("hard"), 120)
        changes = ["train.checkpoint.every_steps=4", f"cluster.start_timeout_seconds={START_SECONDS}"]
        run = PipelineRun.start_training(namespace, "disturbed", *changes)
        zero, one = run.workers
        wait_for("worker 0", lambda: namespace.get("pod", zero), 300)
        namespace.running(zero)
        waiting = f"rendezvous host {one} has no address yet"
        wait_for("worker 0 to wait for worker 1", lambda: waiting in namespace.kubectl("logs", zero), 300)
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
    disturbed.reach("step 5", lambda step, _: step >= 5, RUN_TIMEOUT)
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
    # The loss of one worker does not count as a restart of the other. Only on a machine so slow that a worker sees its
    # peer end again while both start, there is a restart without another cause.
    once_more = max(books[node].total() for node in (zero, one)) - len(recoveries)
    told = Counter({reason: int(count) for reason, count in exported.items()})
    assert (told.pop("terminated"), told.pop("killed")) == (2, 2)
    assert told.total() <= once_more
    assert run.read_json("result.json")["restarts"] >= len(recoveries)
