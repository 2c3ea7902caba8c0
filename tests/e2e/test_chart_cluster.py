"""The Helm chart on a real cluster: installed, upgraded while a job runs, uninstalled."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from kube import Namespace, wait_for
from launching import Launcher, as_account, granted, jobs_of, pods_of, tiny
from tools import tool

from manifests import chart
from manifests.rbac import ROLE
from manifests.render import pvcs
from manifests.workerspec import HUB_SECRET

pytestmark = pytest.mark.e2e

RELEASE = "yaongi"
SMALL = ["--set", "storage.datasets.size=1Gi,storage.checkpoints.size=1Gi"]
# Pinned by the digest that go.sum would contain.
MONITORING = (
    "github.com/prometheus-operator/prometheus-operator",
    "v0.86.1",
    "h1:pHUuiRErcFb3nFDox7RxoxpEN0FyT24GtYOkr2GBu04=",
)
MONITORING_KINDS = ("podmonitors", "prometheusrules")


def helm(space: Namespace, *arguments: str) -> str:
    done = subprocess.run(
        [tool("helm"), "--namespace", space.name, *arguments], capture_output=True, text=True, timeout=600
    )
    print(f"--- helm {' '.join(arguments)}\n{done.stdout}{done.stderr}", flush=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def everything(space: Namespace) -> set[str]:
    """Each object of the namespace as `kind/name`, of every kind except events."""
    # It fails when an aggregated API (Kueue's visibility) does not answer, after it has printed all others.
    kinds = space.kubectl("api-resources", "--namespaced", "--verbs=list", "-o", "name", check=False).split()
    assert "pods" in kinds
    kinds = [kind for kind in kinds if not kind.startswith("events")]
    return set(space.kubectl("get", ",".join(kinds), "-o", "name", "--ignore-not-found").split())


def claims(space: Namespace) -> dict[str, str]:
    return {claim["metadata"]["name"]: claim["metadata"]["uid"] for claim in space.find("pvc")}


def test_a_job_survives_an_upgrade_and_uninstalling_leaves_only_what_is_kept(empty_namespace: Namespace) -> None:
    space = empty_namespace
    before = everything(space)
    notes = helm(space, "install", RELEASE, str(chart.CHART), *SMALL)
    assert f"kubectl create secret generic {HUB_SECRET} --namespace {space.name} --from-file=token=" in notes

    job = tiny(space)
    granted(space, f"system:serviceaccount:{space.name}:{ROLE}")
    launcher = Launcher(as_account(space, ROLE))
    with ThreadPoolExecutor(1) as pool:
        upgraded = f"/mnt/checkpoints/{job.run_name}-upgraded"
        launched = pool.submit(launcher, job, f'echo "worker $index"; until [ -e {upgraded} ]; do sleep 0.2; done')

        def workers() -> dict[str, str]:
            running = [pod for pod in pods_of(space, job) if pod["status"]["phase"] == "Running"]
            return {pod["metadata"]["name"]: pod["metadata"]["uid"] for pod in running}

        running = wait_for("both workers to run", workers, 300, is_there=lambda found: len(found) == 2)
        helm(
            space,
            "upgrade",
            RELEASE,
            str(chart.CHART),
            *SMALL,
            "--set",
            "launcher.accounts={runner},commonLabels.team=blue,networkPolicy.defaultDeny=true",
        )
        (binding,) = space.find("rolebindings")
        assert {subject["name"] for subject in binding["subjects"]} == {"runner", ROLE}
        assert {claim["metadata"]["labels"]["team"] for claim in space.find("pvc")} == {"blue"}
        assert workers() == running, "an upgrade does not touch running workers"
        space.execute(min(running), "touch", upgraded)
        launched.result(timeout=300)

    def left() -> dict[str, tuple[str, str]]:
        """An elastic job is done when any worker is; the operator then removes workers that it sees running
        (cleanPodPolicy Running), which may be the other one that is just about to end."""
        found = [(pod["metadata"], pod["status"]["phase"]) for pod in pods_of(space, job)]
        return {data["name"]: (data["uid"], phase) for data, phase in found if "deletionTimestamp" not in data}

    done = "Succeeded", "Failed"
    ended = wait_for(
        "the workers to end", left, 120, is_there=lambda found: all(phase in done for _, phase in found.values())
    )
    print(f"workers after the upgrade: {ended}")
    assert ended
    assert ended.items() <= {name: (uid, "Succeeded") for name, uid in running.items()}.items()
    (finished,) = jobs_of(space, job)
    assert any(each["type"] == "Succeeded" and each["status"] == "True" for each in finished["status"]["conditions"])

    space.kubectl("delete", "pytorchjob", job.run_name, "--timeout=300s")
    kept = claims(space)
    helm(space, "uninstall", RELEASE, "--wait")
    wanted = {f"persistentvolumeclaim/{claim['metadata']['name']}" for claim in pvcs(job)}
    left = wait_for(
        "the job's objects to go", lambda: everything(space) - before, 180, is_there=lambda found: found == wanted
    )
    print(f"left by uninstall: {sorted(left)}")

    unkept = ["--set", "storage.datasets.keep=false,storage.checkpoints.keep=false"]
    helm(space, "install", RELEASE, str(chart.CHART), *SMALL, *unkept)
    assert claims(space) == kept, "the next release of that name takes the kept claims over"
    helm(space, "uninstall", RELEASE, "--wait")
    wait_for("nothing to be left", lambda: everything(space) - before, 180, is_there=lambda found: not found)


@pytest.fixture(scope="module")
def prometheus_operator_crds() -> Iterator[None]:
    """The operator's own definitions, from the Go module proxy, unless the cluster has them."""
    names = [f"{kind}.monitoring.coreos.com" for kind in MONITORING_KINDS]
    if not os.environ.get("KUBECONFIG") or shutil.which("go") is None:
        pytest.skip("needs KUBECONFIG, and Go to fetch the Prometheus operator's definitions")
    if subprocess.run(["kubectl", "get", "crd", *names], capture_output=True).returncode == 0:
        yield
        return

    def discovered() -> bool:
        command = ["kubectl", "api-resources", "--api-group=monitoring.coreos.com", "-o", "name"]
        return set(names) <= set(subprocess.run(command, capture_output=True, text=True).stdout.split())

    module, version, digest = MONITORING
    done = subprocess.run(
        ["go", "mod", "download", "-json", f"{module}@{version}"],
        cwd="/tmp", env={**os.environ, "GOSUMDB": "off", "GOFLAGS": "-mod=mod"}, capture_output=True, text=True,
    )  # fmt: skip
    fetched = json.loads(done.stdout or "{}")
    if "Dir" not in fetched:
        pytest.skip(f"{module} {version} is not obtainable: {fetched.get('Error', done.stderr)}")
    assert fetched["Sum"] == digest, f"{module} {version} is not what it was"
    folder = Path(fetched["Dir"]) / "example" / "prometheus-operator-crd"
    files = [f"--filename={folder / f'monitoring.coreos.com_{kind}.yaml'}" for kind in MONITORING_KINDS]
    subprocess.run(["kubectl", "apply", "--server-side", *files], check=True)
    try:
        subprocess.run(["kubectl", "wait", "--for=condition=Established", "--timeout=120s", "crd", *names], check=True)
        wait_for("their discovery, which the chart asks", discovered, 120)
        yield
    finally:
        subprocess.run(["kubectl", "delete", "crd", *names, "--timeout=300s"], check=False)


@pytest.mark.usefixtures("prometheus_operator_crds")
def test_monitors_and_rules_are_what_the_prometheus_operator_takes(empty_namespace: Namespace) -> None:
    """`auto` detects the operator; its own definitions accept the chart's objects."""
    space = empty_namespace
    before = everything(space)
    helm(
        space,
        "install",
        RELEASE,
        str(chart.CHART),
        *SMALL,
        "--set",
        "storage.datasets.keep=false,storage.checkpoints.keep=false",
    )

    ours = [item for objects in chart.objects().values() for item in objects]
    wanted = {(item["kind"], item["metadata"]["name"]) for item in ours if "monitoring" in item["apiVersion"]}
    made = [item for kind in MONITORING_KINDS for item in space.find(f"{kind}.monitoring.coreos.com")]
    assert {(item["kind"], item["metadata"]["name"]) for item in made} == wanted != set()
    assert all(item["metadata"]["labels"]["release"] == "kube-prometheus-stack" for item in made)
    helm(space, "uninstall", RELEASE, "--wait")
    wait_for("nothing to be left", lambda: everything(space) - before, 180, is_there=lambda found: not found)
