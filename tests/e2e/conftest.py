"""A namespace as a cluster's owner would prepare it: restricted Pod Security, claims, the launcher's permissions."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from kube import PIPELINE_IMAGE, Namespace, Object, pod
from launching import Launcher, as_account, granted
from pipeline_run import SETS, TUNE, WORKERS, PipelineRun
from scrape import Prometheus
from xdist.scheduler import LoadScopeScheduling

from manifests.kinds import PYTORCHJOB
from manifests.names import job_name
from manifests.spec import load_job
from trainer.specbase import changes_from_sets

SCRAPED = ("first", "stopped")  # the runs that Prometheus knows
OPERATED = ("PodMonitor", "PrometheusRule")  # objects of the Prometheus operator, which a test cluster lacks
BASE = Path(__file__).parents[2] / "manifests" / "base"

# Files whose tests really train. One process runs them all: they share the run `first`, and two runs at once would
# request more than two CPUs.
TRAINING = (
    "test_pipeline",
    "test_disturbed",
    "test_trainjob",
    "test_aborts",
    "test_alerts",
    "test_dashboards",
    "test_serving",
    "test_queue",
    "test_megatron",
)


class Apart(LoadScopeScheduling):
    """Run the tests that train in one process, and the other files in the remaining processes."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "training" if Path(file).name.startswith(TRAINING) else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Apart:
    return Apart(config, log)


# A shell starts background jobs with SIGINT ignored; the launchers that tests interrupt would inherit that.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def namespace() -> Iterator[Namespace]:
    """Deleted afterwards, unless YAONGI_E2E_KEEP is set."""
    with restricted_namespace() as space:
        space.apply(*base_objects(space.name))
        granted(space, f"system:serviceaccount:{space.name}:yaongi-launcher")
        yield space


@contextmanager
def restricted_namespace() -> Iterator[Namespace]:
    """A new, empty namespace that admits only pods of the restricted standard."""
    if shutil.which("kubectl") is None or not os.environ.get("KUBECONFIG"):
        pytest.skip("needs kubectl and KUBECONFIG, a cluster with the training operator (make e2e)")
    name = f"yaongi-e2e-{uuid.uuid4().hex[:6]}"
    restricted: Object = {
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": {"name": name, "labels": {"pod-security.kubernetes.io/enforce": "restricted"}},
    }
    space = Namespace(name)
    space.apply(restricted)
    try:
        space.made()
        yield space
    finally:
        if os.environ.get("YAONGI_E2E_KEEP"):
            print(f"kept namespace {name}")
        else:
            subprocess.run(["kubectl", "delete", "namespace", name, "--timeout=120s"], check=False)


@pytest.fixture
def empty_namespace() -> Iterator[Namespace]:
    with restricted_namespace() as space:
        yield space


def base_objects(namespace: str) -> list[Object]:
    """manifests/base as shipped, in another namespace; monitors need an operator that a test cluster lacks."""
    found = []
    for path in sorted(BASE.glob("*.yaml")):
        text = path.read_text().replace("namespace: kubeflow", f"namespace: {namespace}")
        found += [item for item in yaml.safe_load_all(text) if item and item["kind"] not in OPERATED]
    assert {item["kind"] for item in found} >= {"PersistentVolumeClaim", "ServiceAccount", "Role", "RoleBinding"}
    return found


@pytest.fixture(scope="session")
def volumes(namespace: Namespace) -> Iterator[Namespace]:
    """A pod named `reader` with both volumes, to read the files of runs."""
    namespace.apply(pod("reader", PIPELINE_IMAGE, ["sleep", "infinity"]))
    namespace.running("reader")
    yield namespace
    namespace.kubectl("delete", "pod", "reader", "--grace-period=0", "--force", check=False)


@pytest.fixture(scope="session")
def prometheus(namespace: Namespace) -> Prometheus:
    jobs = {name: load_job("tiny", changes_from_sets([f"name={name}", *SETS])) for name in SCRAPED}
    workers = {
        job.run_name: [PYTORCHJOB.worker_name(job_name(job), index) for index in range(job.cluster.nodes)]
        for job in jobs.values()
    }
    server = Prometheus(namespace)
    server.start(workers, {name: job.run_name for name, job in jobs.items()})
    return server


@pytest.fixture(scope="session")
def first(volumes: Namespace, prometheus: Prometheus) -> PipelineRun:
    """An undisturbed run, scraped by Prometheus; its model is tuned at the end."""
    run = PipelineRun.start(volumes, "first", TUNE, *WORKERS)
    shown: list[str] = []

    def show_once_training() -> None:
        if not shown and volumes.find("pods", "-l", PYTORCHJOB.selector(job_name(run.job))):
            volumes.show("while it trains")
            shown.append("")

    return run.finish(meanwhile=show_once_training)


@pytest.fixture
def launcher(namespace: Namespace) -> Launcher:
    return Launcher(as_account(namespace, "yaongi-launcher"))


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        process.kill()
        process.wait()
