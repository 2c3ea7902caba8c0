"""Kubeflow Pipelines as the tests see it: kfp's own client, the API's answers, and kubectl for what runs beside it."""

from __future__ import annotations

import base64
import gzip
import json
import os
import subprocess
import sys
import time
import urllib.request
import uuid
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
HOST = os.environ.get("KFP_HOST", "")
NAMESPACE = os.environ.get("KFP_NAMESPACE", "kubeflow")
PIPELINE_IMAGE = os.environ.get("YAONGI_PIPELINE_IMAGE", "localhost/yaongi-pipeline:0.1.0")
TRAINER_IMAGE = os.environ.get("YAONGI_TRAINER_IMAGE", "localhost/yaongi-trainer:0.1.0")
MARK = uuid.uuid4().hex[:6]  # of this session's runs and pipeline
OF_THIS_SESSION = {"data": {"heldout_fraction": 0.02 + int(MARK, 16) / 2**30}}  # token files that none made before
ENDED = ("SUCCEEDED", "FAILED", "CANCELED", "SKIPPED")
# A run of seconds, in one pod that leaves room beside Kubeflow Pipelines on a node with two CPUs.
SMALL: dict[str, Any] = {
    "train": {
        "batch": {"tokens_per_step": 1024, "micro_batch_rows": 4},
        "checkpoint": {"every_steps": 4},
        "evaluate": {"max_tokens": 2000},
        "runtime": {"log_every_steps": 2},
    },
    "cluster": {"cpus_per_node": 0.4, "memory_gib_per_node": 2},
}


@dataclass(frozen=True)
class Run:
    """A run by its id."""

    id: str

    @property
    def state(self) -> str:
        return answer(f"/apis/v2beta1/runs/{self.id}").get("state", "PENDING")

    def ended(self, seconds: float) -> str:
        """The state in which it ended; fails the test if that takes longer."""
        wait_for(f"run {self.id} to end", lambda: self.state in ENDED, seconds)
        return self.state

    @property
    def nodes(self) -> list[dict[str, Any]]:
        """The nodes of the workflow, in the order of their start."""
        told = answer(f"/apis/v1beta1/runs/{self.id}")["pipeline_runtime"]["workflow_manifest"]
        status = json.loads(told)["status"]
        if packed := status.get("compressedNodes"):
            status["nodes"] = json.loads(gzip.decompress(base64.b64decode(packed)))
        return sorted(status["nodes"].values(), key=lambda node: node["startedAt"])

    @property
    def pods(self) -> list[dict[str, Any]]:
        return [node for node in self.nodes if node["type"] == "Pod"]

    @cached_property
    def logs(self) -> dict[str, str]:
        """The log of each step by the task's name, once the run has ended."""
        found: dict[str, str] = {}
        for node in self.pods:
            task = task_of(node)
            if task:
                path = f"/apis/v1alpha1/runs/{self.id}/nodes/{node['id']}/log"
                found[task] = found.get(task, "") + text(path)
        return found

    def terminate(self) -> None:
        urllib.request.urlopen(urllib.request.Request(f"{HOST}/apis/v2beta1/runs/{self.id}:terminate", method="POST"))

    def show(self) -> None:
        """Print the seconds of each pod, for docs/decisions.md."""
        begun = seconds(self.nodes[0]["startedAt"])
        for node in self.pods:
            start = seconds(node["startedAt"])
            end = seconds(node["finishedAt"]) if node.get("finishedAt") else start
            print(f"{start - begun:6.0f} s  {end - start:4.0f} s  {task_of(node) or node['displayName']}")


def task_of(node: dict[str, Any]) -> str:
    """The task whose step a pod is; "" for pods of Kubeflow Pipelines itself."""
    *path, last = node["name"].split(".")
    return path[-1].partition("(")[0] if last.startswith("executor") else ""


def seconds(stamp: str) -> float:
    return datetime.fromisoformat(stamp.replace("Z", "+00:00")).timestamp()


def text(path: str) -> str:
    """What the API answers; asked again where a busy backend has no answer (5xx)."""
    for pause in (2, 5, 10, 0):
        try:
            with urllib.request.urlopen(f"{HOST}{path}", timeout=60) as reply:
                return reply.read().decode(errors="replace")
        except OSError as error:
            if not pause or getattr(error, "code", 500) < 500:
                raise
            time.sleep(pause)
    raise AssertionError("the last attempt returns or raises")


def answer(path: str) -> dict[str, Any]:
    return json.loads(text(path))


def client() -> Any:
    from kfp import Client

    return Client(host=HOST)


def form(name: str, steps: int, overrides: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """What a person fills into the form."""
    merged = {**SMALL, "name": name, **overrides}
    for section in ("train", "cluster"):
        merged[section] = {**SMALL[section], **overrides.get(section, {})}
    images = {"image": PIPELINE_IMAGE, "trainer_image": TRAINER_IMAGE}
    return {"preset": "tiny", "steps": steps, "nodes": 1, "overrides": json.dumps(merged), **images, **fields}


def yaongi(*arguments: str, timeout: float = 900) -> subprocess.CompletedProcess[str]:
    """The command line, with the sources of this folder."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "160"}
    command = [sys.executable, "-m", "pipelines.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout)


def kubectl(*arguments: str) -> str:
    command = ["kubectl", "--namespace", NAMESPACE, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def jobs(name: str) -> list[dict[str, Any]]:
    """PyTorchJobs whose names begin so."""
    found = json.loads(kubectl("get", "pytorchjobs", "-o", "json"))["items"]
    return [job for job in found if job["metadata"]["name"].startswith(name)]


def workers(name: str) -> list[str]:
    """Training pods that have not ended, of jobs whose names begin so."""
    found = json.loads(kubectl("get", "pods", "-l", "app.kubernetes.io/name=yaongi-trainer", "-o", "json"))["items"]
    live = [pod for pod in found if pod["status"]["phase"] in ("Pending", "Running")]
    return [pod["metadata"]["name"] for pod in live if pod["metadata"]["name"].startswith(name)]


def wait_for(what: str, is_so: Any, most_seconds: float) -> None:
    deadline = time.monotonic() + most_seconds
    while not is_so():
        assert time.monotonic() < deadline, f"waited {most_seconds:.0f} s for {what}"
        time.sleep(2)
