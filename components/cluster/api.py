"""The few API calls that we make to a cluster; every error becomes one line that says how to fix it.

Objects are plain dicts, as rendered by `manifests`, so that a request and its response can be compared.
"""

from __future__ import annotations

import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any, NamedTuple, Self

import urllib3
import yaml

from components.cluster.kubeconfig import POD_VARIABLE, NoCluster, require_cluster
from components.quick import quick_imports
from manifests.kinds import DEVICE_CLAIMS, KINDS, PYTORCHJOB, TRAINJOB, JobKind, Object
from trainer.errors import LaunchError, in_words

with quick_imports():
    from kubernetes import client, config
    from kubernetes.client.exceptions import ApiException
    from kubernetes.client.rest import RESTClientObject

POD_NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
PAUSES_SECONDS = (0.5, 1.0, 2.0, 4.0)  # between attempts
PASSING = (429, 500, 502, 503, 504)  # temporary states of the API server: overload, a new leader, a restart
REQUEST_TIMEOUT_SECONDS = (5, 30)  # connect, read
# Besides its own error, the client raises these for a kubeconfig that is not YAML, not text or has another structure.
UNUSABLE = (config.ConfigException, OSError, yaml.YAMLError, ValueError, TypeError)
Unreachable = (urllib3.exceptions.HTTPError, OSError)
UNKNOWN_FIELD = re.compile(r'unknown field "([^"]+)"')  # each one that strict validation refuses
# Kind → group, version and plural, for the client's custom resource calls.
RESOURCES = {kind.kind: (kind.group, kind.version, kind.plural) for kind in KINDS.values()}
RESOURCES["NetworkPolicy"] = ("networking.k8s.io", "v1", "networkpolicies")
RESOURCES[DEVICE_CLAIMS.kind] = (DEVICE_CLAIMS.group, DEVICE_CLAIMS.version, DEVICE_CLAIMS.plural)
RESOURCES["TrainingRuntime"] = (TRAINJOB.group, TRAINJOB.version, "trainingruntimes")


class Refused(LaunchError):
    """The API server answered with an error; `status` is its HTTP status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class UnknownFields(Refused):
    """An object has `fields` that its kind lacks on this cluster."""

    def __init__(self, status: int, message: str, fields: list[str]) -> None:
        super().__init__(status, message)
        self.fields = fields


class ApiUnreachable(LaunchError):
    """No answer from the API server."""


class _Resource(NamedTuple):
    """The calls for one kind of object in one namespace; all take keyword arguments."""

    plural: str
    get: Callable[..., Any]
    create: Callable[..., Any]
    patch: Callable[..., Any]
    delete: Callable[..., Any]


class Cluster:
    """One namespace of one cluster."""

    def __init__(self, api_client: client.ApiClient, namespace: str) -> None:
        self.namespace = namespace
        self._client, self._renewing = api_client, threading.Lock()
        self.core = client.CoreV1Api(api_client)
        self.custom = client.CustomObjectsApi(api_client)
        self.server: str = api_client.configuration.host

    @classmethod
    def connect(cls, namespace: str | None = None) -> Self:
        """Use $KUBECONFIG if set, else the service account of the pod this runs in, else ~/.kube/config.

        Args:
            namespace: None for the pod's own or the kubeconfig context's.
        Raises:
            NoCluster: no configuration is usable.
        """
        settings, default = _settings()
        return cls(client.ApiClient(settings), namespace or default)

    def renew(self) -> None:
        """Read the credentials again: those refused with 401 may have expired and been replaced on disk.

        Does nothing if the configuration is not usable or names another server.
        """
        with suppress(LaunchError):
            settings, _ = _settings()
            with self._renewing:
                if settings.host == self.server:
                    self._client.configuration = settings
                    self._client.rest_client = RESTClientObject(settings)  # it holds the client certificate

    def call(self, doing: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Make one request; `doing` is the verb and resource for error messages ("create pytorchjobs").

        Idempotent requests are retried if the server does not answer or has an internal error.

        Raises:
            Refused, ApiUnreachable
        """
        for pause in () if doing.startswith("create") else PAUSES_SECONDS:
            try:
                return self._request(doing, function, *args, **kwargs)
            except Refused as error:
                if error.status not in PASSING:
                    raise
            except ApiUnreachable:
                pass  # retried below; the last attempt raises
            time.sleep(pause)
        return self._request(doing, function, *args, **kwargs)

    def _request(self, doing: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        def ask() -> Any:
            return function(*args, _request_timeout=REQUEST_TIMEOUT_SECONDS, **kwargs)

        try:
            try:
                return ask()
            except ApiException as error:
                if error.status != HTTPStatus.UNAUTHORIZED:
                    raise
                self.renew()
                return ask()
        except ApiException as error:
            raise self.refusal(doing, error) from None
        except Unreachable as error:
            raise ApiUnreachable(
                f"the API server {self.server} cannot be reached ({in_words(error)}); check KUBECONFIG and the network"
            ) from None

    def refusal(self, doing: str, error: ApiException) -> Refused:
        status, message = error.status or 0, status_message(error)
        if status == HTTPStatus.UNAUTHORIZED:
            text = f"{self.server} does not accept the credentials (401); renew the kubeconfig or the token"
        elif status == HTTPStatus.FORBIDDEN and (who := re.search(r'User "([^"]+)" cannot', message)):
            text = (
                f"no permission to {doing} in namespace '{self.namespace}' as {who[1]}; grant it with: "
                f"python -m manifests.generate rbac {self.namespace} | kubectl apply -f -"
            )
        elif status == HTTPStatus.BAD_REQUEST and (unknown := UNKNOWN_FIELD.findall(message)):
            text = (
                f"cannot {doing} in namespace '{self.namespace}': this cluster's release of Kubeflow Trainer does not "
                f"know {', '.join(unknown)}; install {TRAINJOB.operator} (yaongi doctor names what is there), or "
                "write cluster.job=pytorchjob"
            )
            return UnknownFields(status, text, unknown)
        elif status == HTTPStatus.NOT_FOUND and message.startswith("namespaces "):
            text = f"namespace '{self.namespace}' does not exist on {self.server}; create it or set cluster.namespace"
        elif (
            status == HTTPStatus.NOT_FOUND
            and "not found" not in message.replace("page not", "")
            and (kind := next((kind for kind in KINDS.values() if kind.plural in doing), None))
        ):
            other = "trainjob" if kind is PYTORCHJOB else "pytorchjob"
            text = (
                f"{self.server} knows no {kind.kind} ({kind.api_version}); install {kind.operator}, write "
                f"cluster.job={other}, or run on this machine with cluster.target=local"
            )
        else:
            text = f"cannot {doing} in namespace '{self.namespace}': {message} ({status})"
        return Refused(status, text)

    # objects of the kinds that make up a task

    def get(self, kind: str, name: str) -> Object | None:
        """The object; None if it is absent."""
        resource = self._resource(kind)
        try:
            return self.call(f"get {resource.plural}", resource.get, name=name)
        except Refused as error:
            if error.status == HTTPStatus.NOT_FOUND and "cannot get" in str(error):
                return None
            raise

    def create(self, body: Object) -> Object:
        resource = self._resource(body["kind"])
        return self.call(f"create {resource.plural}", resource.create, body=body)

    def jobs(self, kind: JobKind, selector: str = "") -> list[Object]:
        """The jobs whose labels match `selector`; all jobs without one."""
        place = (kind.group, kind.version, self.namespace, kind.plural)
        found = self.call(
            f"list {kind.plural}", self.custom.list_namespaced_custom_object, *place, label_selector=selector
        )
        return found["items"]

    def own(self, kind: str, name: str, owner: Object | None, labels: dict[str, str | None] | None = None) -> None:
        """Make `owner` the object's only owner, for garbage collection, and set labels (None removes either)."""
        resource = self._resource(kind)
        patch = {"metadata": {"ownerReferences": [owner] if owner else [], "labels": labels or {}}}
        self.call(f"patch {resource.plural}", resource.patch, name=name, body=patch)

    def unsuspend(self, job: Object) -> None:
        resource = self._resource(job["kind"])
        changed = {"suspend": False}
        body = {"spec": changed if "suspend" in job["spec"] else {"runPolicy": changed}}
        self.call(f"patch {resource.plural}", resource.patch, name=job["metadata"]["name"], body=body)

    def delete(self, kind: str, name: str) -> None:
        """Delete an object and all that it owns; a job's pods get their grace period. It may be absent."""
        resource = self._resource(kind)
        try:
            self.call(f"delete {resource.plural}", resource.delete, name=name, propagation_policy="Background")
        except Refused as error:
            if error.status != HTTPStatus.NOT_FOUND or "cannot delete" not in str(error):
                raise

    def delete_unchanged(self, job: Object) -> bool:
        """As `delete`, unless the job has changed since it was read; returns whether it is deleted."""
        metadata, resource = job["metadata"], self._resource(job["kind"])
        same = client.V1Preconditions(uid=metadata["uid"], resource_version=metadata["resourceVersion"])
        options = client.V1DeleteOptions(preconditions=same, propagation_policy="Background")
        try:
            self.call(f"delete {resource.plural}", resource.delete, name=metadata["name"], body=options)
        except Refused as error:
            if error.status not in (HTTPStatus.NOT_FOUND, HTTPStatus.CONFLICT):
                raise
            return False
        return True

    def _resource(self, kind: str) -> _Resource:
        if kind == "ConfigMap":
            core, space = self.core, {"namespace": self.namespace}
            return _Resource(
                "configmaps",
                partial(core.read_namespaced_config_map, **space),
                partial(core.create_namespaced_config_map, **space),
                partial(core.patch_namespaced_config_map, **space),
                partial(core.delete_namespaced_config_map, **space),
            )
        group, version, plural = RESOURCES[kind]
        place = {"group": group, "version": version, "namespace": self.namespace, "plural": plural}
        custom = self.custom
        # Releases of Trainer differ in their fields; without this, one that is not known would be dropped in silence.
        strict = {"field_validation": "Strict"} if group == TRAINJOB.group else {}
        return _Resource(
            plural,
            partial(custom.get_namespaced_custom_object, **place),
            partial(custom.create_namespaced_custom_object, **place, **strict),
            partial(custom.patch_namespaced_custom_object, **place),
            partial(custom.delete_namespaced_custom_object, **place),
        )

    # what a job needs and has

    def claim_exists(self, name: str) -> bool:
        try:
            read = self.core.read_namespaced_persistent_volume_claim
            self.call("get persistentvolumeclaims", read, name, self.namespace)
        except Refused as error:
            if error.status != HTTPStatus.NOT_FOUND:
                raise
            return False
        return True

    def pods(self, kind: JobKind, job_name: str) -> list[Object]:
        response = self.call(
            "list pods",
            self.core.list_namespaced_pod,
            self.namespace,
            label_selector=kind.selector(job_name),
            _preload_content=False,
        )
        return json.loads(response.data)["items"]

    def log_tail(self, pod: str, lines: int, **options: Any) -> list[str]:
        """The last lines of a pod's log; [] if it is no longer available.

        Args:
            options: those of the API: container, timestamps, previous.
        """
        read = self.core.read_namespaced_pod_log
        try:
            text = self.call("get pods/log", read, pod, self.namespace, tail_lines=lines, **options)
        except LaunchError:
            return []
        return text.splitlines()

    def own_pod(self) -> Object | None:
        """An ownerReference to the pod this process runs in; None outside a pod of this namespace.

        The UID comes from the API: the garbage collector deletes an object at once if its owner does not exist.
        """
        if not POD_NAMESPACE_FILE.exists() or POD_NAMESPACE_FILE.read_text().strip() != self.namespace:
            return None
        name = os.environ.get("POD_NAME") or socket.gethostname()
        try:
            pod = self.call("get pods", self.core.read_namespaced_pod, name, self.namespace)
        except Refused as error:
            if error.status == HTTPStatus.NOT_FOUND:
                return None
            raise
        return {"apiVersion": "v1", "kind": "Pod", "name": name, "uid": pod.metadata.uid}


def _settings() -> tuple[client.Configuration, str]:
    """The client configuration, read again, and the namespace that it names."""
    require_cluster()
    settings = client.Configuration()
    try:
        if not os.environ.get("KUBECONFIG") and POD_VARIABLE in os.environ:
            config.load_incluster_config(settings)
            namespace = POD_NAMESPACE_FILE.read_text().strip()
        else:
            file = os.environ.get("KUBECONFIG") or None  # the client read the variable at import
            config.load_kube_config(file, client_configuration=settings)
            context = config.list_kube_config_contexts(file)[1]
            namespace = context["context"].get("namespace", "default")
    except UNUSABLE as error:
        raise NoCluster(_one_line(error)) from None
    settings.retries = 0  # callers decide about retries
    return settings, namespace


def status_message(error: ApiException) -> str:
    """The message of the API server's Status object, or the raw body or reason without one."""
    try:
        return _one_line(json.loads(error.body)["message"])
    except (TypeError, ValueError, KeyError):
        return _one_line(error.body or error.reason)


def _one_line(value: object) -> str:
    return " ".join(str(value).split())
