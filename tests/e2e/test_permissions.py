"""The launcher's role has exactly the permissions that it needs: without any of them it fails with a clear message."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
from kube import Namespace, Object, wait_for
from kubernetes import client, config
from launching import Gate, Launcher, granted, jobs_of, tiny

from components.cleanup.step import cleanup
from components.cluster.api import Cluster
from manifests.kinds import DEVICE_CLAIMS
from manifests.rbac import RULES
from manifests.spec import JobSpec
from trainer.errors import LaunchError

pytestmark = pytest.mark.e2e

AT_ONCE = 6  # short jobs of one worker
PATIENCE = 60  # seconds that a worker runs without being adopted


@dataclass(frozen=True)
class Right:
    group: str
    resource: str
    verb: str

    @property
    def user(self) -> str:
        return f"without-{self.verb}-{self.resource.replace('/', '-')}"

    @property
    def cluster(self) -> Object:
        """What makes a job need this right. The cluster has no device class, but a launcher is refused before that."""
        kind = "trainjob" if self.group == "trainer.kubeflow.org" else "pytorchjob"
        return {"job": kind} | ({"devices": {"nic.example.com": 1}} if self.group == DEVICE_CLAIMS.group else {})


def rights() -> list[Right]:
    return [
        Right(group, resource, verb)
        for rule in RULES
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    ]


def bound(user: str, rules: list[Object]) -> list[Object]:
    """A role, and its binding to a user of the same name who exists nowhere else."""
    group = "rbac.authorization.k8s.io"
    role = {"apiVersion": f"{group}/v1", "kind": "Role", "metadata": {"name": user}, "rules": rules}
    subject = {"kind": "User", "name": user, "apiGroup": group}
    reference = {"apiGroup": group, "kind": "Role", "name": user}
    binding = {"apiVersion": f"{group}/v1", "kind": "RoleBinding", "metadata": {"name": user}}
    return [role, {**binding, "subjects": [subject], "roleRef": reference}]


def all_but(right: Right) -> list[Object]:
    rules = copy.deepcopy(RULES)
    for rule in rules:
        if right.group in rule["apiGroups"] and right.resource in rule["resources"]:
            rule["verbs"].remove(right.verb)
    return [rule for rule in rules if rule["verbs"]]


def as_user(namespace: Namespace, user: str) -> Cluster:
    """The cluster for the administrator impersonating `user`."""
    settings = client.Configuration()
    config.load_kube_config(client_configuration=settings)
    settings.retries = 0
    api = client.ApiClient(settings)
    api.set_default_header("Impersonate-User", user)
    return Cluster(api, namespace.name)


def complaints(lines: list[str]) -> list[str]:
    """Without what the cluster says of a worker, which may contain the word error and passes by itself."""
    return [line for line in lines if line.startswith("error: ") or "no permission" in line]


def life_of_a_launcher(namespace: Namespace, user: str, job: JobSpec) -> list[str]:
    """Create a job, adopt it, follow it to its end, run it again, clean up; returns the output and the errors."""
    launcher, adopted = Launcher(as_user(namespace, user)), Gate(namespace)
    launcher.acts["is there already; following it"] = adopted.open
    # The worker runs until it is adopted, which never happens if a permission is missing, so there is a limit.
    script = f"echo worked; i=0; until [ -e {adopted.file} ] || [ $i = {PATIENCE} ]; do i=$((i+1)); sleep 1; done"

    def attempt() -> None:
        try:
            launcher(job, script)
        except LaunchError as error:
            launcher.lines.append(f"error: {error}")

    first = threading.Thread(target=attempt)
    first.start()
    try:
        wait_for("the job", lambda: jobs_of(namespace, job) or not first.is_alive(), 300, every=0.3)
        if first.is_alive():
            attempt()
    finally:
        adopted.open()
        first.join()
    if not complaints(launcher.lines):
        attempt()
        try:
            cleanup(launcher.cluster, "none", job.cluster, launcher.write)
        except LaunchError as error:
            launcher.lines.append(f"error: {error}")
    return launcher.lines


@pytest.fixture(scope="module")
def lives(volumes: Namespace) -> dict[Right | str, list[str]]:
    """The output of launchers with all permissions (by kind of job), and with all except one."""
    jobs: dict[Right | str, JobSpec] = {
        key: tiny(volumes, cluster={"nodes": 1, **({"job": key} if isinstance(key, str) else key.cluster)})
        for key in ("pytorchjob", "trainjob", *rights())
    }
    users = {key: f"with-all-{key}" if isinstance(key, str) else key.user for key in jobs}
    rules = {key: RULES if isinstance(key, str) else all_but(key) for key in jobs}
    volumes.apply(*(made for key in jobs for made in bound(users[key], rules[key])))
    granted(volumes, users[[*jobs][-1]])
    with ThreadPoolExecutor(AT_ONCE) as pool:
        futures = {key: pool.submit(life_of_a_launcher, volumes, users[key], job) for key, job in jobs.items()}
        return {key: future.result() for key, future in futures.items()}


@pytest.mark.parametrize("kind", ["pytorchjob", "trainjob"])
def test_with_all_rights_all_works(lives: dict[Right | str, list[str]], kind: str) -> None:
    lines = lives[kind]
    assert not complaints(lines)
    assert [line for line in lines if "is there already; following it" in line], "it was adopted"
    assert [line for line in lines if "deleting the finished job" in line], "it was run again"
    assert lines.count("worked") == 3 and lines[-1] == "this run left no job running"


@pytest.mark.parametrize("right", rights(), ids=lambda right: right.user)
def test_without_one_right_the_verb_the_resource_and_the_remedy_are_named(
    namespace: Namespace, lives: dict[Right | str, list[str]], right: Right
) -> None:
    lines = complaints(lives[right])
    told = (
        f"no permission to {right.verb} {right.resource} in namespace '{namespace.name}' as {right.user}; "
        f"grant it with: python -m manifests.generate rbac {namespace.name} | kubectl apply -f -"
    )
    print("\n".join(lines))
    assert [line for line in lines if line.endswith(told)], lives[right]
    # The launcher that is refused removes the job, which the other one notices.
    others = [line for line in lines if told not in line and "by someone else" not in line]
    assert not others, others
