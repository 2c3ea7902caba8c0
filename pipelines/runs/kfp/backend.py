"""Requests to the API of Kubeflow Pipelines 2, without its client: every failure becomes one line with the fix.

The client takes a second to import, retries for half a minute before it says anything, follows a redirect to a login
page, and prints lines of its own. Runs are read by v1beta1 too: only that returns the workflow, whose nodes name the
pods and say why one does not start; the log of a pod is served by v1alpha1 alone.
"""

from __future__ import annotations

import base64
import gzip
import json
import os
import re
import ssl
import urllib.parse
import urllib.request
from dataclasses import dataclass
from http import HTTPStatus
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

from trainer.errors import LaunchError, SpecError, in_words

TIMEOUT_SECONDS, LOG_TIMEOUT_SECONDS = 10, 60  # a log is read from its node, or from the object store
TESTED = "2.17"
# Where a pod that may use Kubeflow Pipelines finds its token; the client of kfp uses the same variable and place.
TOKEN_FILE = os.environ.get("KF_PIPELINES_SA_TOKEN_PATH", "/var/run/secrets/kubeflow/pipelines/token")
LOGIN = (
    "set KFP_TOKEN to a token for it (kubectl create token SERVICEACCOUNT --audience pipelines.kubeflow.org), or "
    "KFP_COOKIE to the cookie of a browser that is logged in"
)
LONGEST_REASON_CHARACTERS = 300
ADDRESS = re.compile(r"https?://[^/#?\s]+[^\s]*$")


class Away(LaunchError):
    """The backend does not answer, or is being started: asking again may help."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect leads to a login page; following it would also give the token to another server."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


@dataclass(frozen=True)
class Backend:
    """The backend at `host`. Every request raises LaunchError; its class Away where trying again may help."""

    host: str
    multi_user: bool = False

    def get(self, path: str, doing: str) -> dict[str, Any]:
        """The JSON object that GET `path` answers; `doing` says for messages what is asked for."""
        return self._object(self._answer(path, doing), doing)

    def post(self, path: str, doing: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        return self._object(self._answer(path, doing, json.dumps(body or {}).encode()), doing)

    def run(self, run_id: str) -> dict[str, Any]:
        """The run as v2beta1 returns it: state, state_history, display_name, runtime_config."""
        return self.get(f"/apis/v2beta1/runs/{run_id}", f"run {run_id}")

    def workflow(self, run_id: str) -> tuple[str, dict[str, Any]]:
        """The run's pipeline as YAML, and its workflow; {} for a workflow that has not been created yet."""
        found = self.get(f"/apis/v1beta1/runs/{run_id}", f"the steps of run {run_id}")
        try:
            pipeline = found["run"]["pipeline_spec"]["pipeline_manifest"]
            workflow = json.loads(found.get("pipeline_runtime", {}).get("workflow_manifest") or "{}")
            status = workflow.get("status", {})
            if packed := status.pop("compressedNodes", ""):  # Argo packs the nodes of a large workflow
                status["nodes"] = json.loads(gzip.decompress(base64.b64decode(packed)))
            return pipeline, workflow
        except (KeyError, TypeError, AttributeError, ValueError, OSError):
            raise self._other_version("the steps of a run") from None

    def log(self, run_id: str, node: str) -> str | None:
        """The log of a node or pod of a run; None if there is none (yet, or any more)."""
        path = f"/apis/v1alpha1/runs/{run_id}/nodes/{urllib.parse.quote(node)}/log"
        text = self._answer(path, f"a log of run {run_id}", seconds=LOG_TIMEOUT_SECONDS).decode("utf-8", "replace")
        # With status 200: the server has sent its head before it looks for the log.
        return None if text.startswith('{"error_message"') else text

    def log_of_web(self, run_id: str, pod: str, namespace: str) -> str | None:
        """As `log`, from the web interface, if `host` is its address."""
        query = urllib.parse.urlencode({"podname": pod, "runid": run_id, "podnamespace": namespace})
        try:
            text = self._answer(f"/k8s/pod/logs?{query}", "a log", seconds=LOG_TIMEOUT_SECONDS)
        except LaunchError:  # no web interface, or it has no such log
            return None
        return text.decode("utf-8", "replace")

    def _answer(self, path: str, doing: str, body: bytes | None = None, seconds: float = TIMEOUT_SECONDS) -> bytes:
        try:
            request = urllib.request.Request(self.host + path, body, _headers())
            with urllib.request.build_opener(_NoRedirect).open(request, timeout=seconds) as answer:
                content: bytes = answer.read()
        except HTTPError as error:
            raise self._refusal(error, doing) from None
        except ssl.SSLError as error:
            raise LaunchError(f"{self.host}: no secure connection ({in_words(error)}); check --host") from None
        except (OSError, ValueError, HTTPException) as error:  # ValueError: an address that is none
            reason = getattr(error, "reason", error)
            if isinstance(reason, ssl.SSLError):
                fix = "check --host; for a certificate of your own, SSL_CERT_FILE names the file of its authority"
                raise LaunchError(f"{self.host}: no secure connection ({in_words(reason)}); {fix}") from None
            raise Away(
                f"Kubeflow Pipelines does not answer at {self.host} ({in_words(reason)}); check --host, and that it "
                "runs: kubectl get pods -n kubeflow -l app=ml-pipeline"
            ) from None
        if content.lstrip()[:1] == b"<":
            raise self._page()
        return content

    def _object(self, content: bytes, doing: str) -> dict[str, Any]:
        try:
            found = json.loads(content)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise self._other_version(doing)
        return found

    def _refusal(self, error: HTTPError, doing: str) -> LaunchError:
        text = error.read().decode("utf-8", "replace").strip() if error.fp else ""
        reason = f"{_message(text) or error.reason} ({error.code})"
        if 300 <= error.code < 400:
            return self._page(error.headers.get("Location", ""))
        if error.code == HTTPStatus.UNAUTHORIZED:
            given = next((name for name in ("KFP_TOKEN", "KFP_COOKIE") if os.environ.get(name)), "")
            if given:
                return LaunchError(f"{self.host} refused what {given} holds (401): it may have expired; {LOGIN}")
            return LaunchError(f"{self.host} wants a login (401); {LOGIN}")
        if error.code == HTTPStatus.FORBIDDEN:
            return LaunchError(
                f"{self.host} refused {doing}: {reason}; ask its owner for the right, or log in anew: {LOGIN}"
            )
        if error.code == HTTPStatus.NOT_FOUND and text.startswith("<"):
            return self._page()
        if error.code == HTTPStatus.NOT_FOUND and doing.startswith("run "):
            fix = "give the id that its page's address ends in"
            return LaunchError(f"{self.host} knows no {doing} (404); {fix}, and check --host")
        if error.code in (HTTPStatus.NOT_FOUND, HTTPStatus.NOT_IMPLEMENTED, HTTPStatus.METHOD_NOT_ALLOWED):
            return self._other_version(doing)
        if error.code >= 500 or error.code == HTTPStatus.TOO_MANY_REQUESTS:
            return Away(
                f"Kubeflow Pipelines at {self.host} failed at {doing}: {reason}; try again, its log says more: "
                "kubectl logs -n kubeflow deploy/ml-pipeline"
            )
        return LaunchError(f"{self.host} refused {doing}: {reason}")

    def _page(self, location: str = "") -> LaunchError:
        where = f"leads to {location.split('?')[0]}" if location else "answers with a web page"
        return LaunchError(
            f"{self.host} {where} instead of an answer of the API, as a login page does; {LOGIN}; or give "
            "as --host the address of the API itself"
        )

    def _other_version(self, doing: str) -> LaunchError:
        return LaunchError(
            f"{self.host} does not answer for {doing} as Kubeflow Pipelines 2 does; check --host, and its version: "
            f"yaongi is tested with {TESTED}"
        )


def connect(host: str) -> Backend:
    """The backend at `host`, which answers.

    Raises:
        SpecError: no host was given, or none that can be asked.
        LaunchError: it does not answer, or not as Kubeflow Pipelines 2.
    """
    if not host:
        raise SpecError("--host is missing; give the address of Kubeflow Pipelines, or set KFP_HOST")
    if not ADDRESS.match(host):
        raise SpecError(f"--host: '{host}' is no address; write it with its protocol: http://10.0.0.1:8888")
    backend = Backend(host.partition("#")[0].rstrip("/"))
    found = backend.get("/apis/v2beta1/healthz", "its state")
    if "multi_user" not in found:
        raise backend._other_version("its state")
    return Backend(backend.host, bool(found["multi_user"]))


def _headers() -> dict[str, str]:
    found = {"Accept": "application/json", "Content-Type": "application/json"}
    token, file = os.environ.get("KFP_TOKEN", "").strip(), Path(TOKEN_FILE)
    if not token and file.is_file():
        token = file.read_text(encoding="ascii").strip()
    if token:
        found["Authorization"] = f"Bearer {token}"
    if cookie := os.environ.get("KFP_COOKIE", "").strip():
        found["Cookie"] = cookie
    return found


def _message(text: str) -> str:
    """The reason in an error's body, on one line; "" if it has none."""
    try:
        found = json.loads(text)
        said = str(found.get("message") or found.get("error_message") or found.get("error") or "")
    except (ValueError, AttributeError):
        said = "" if text.startswith("<") else text
    return " ".join(said.split())[:LONGEST_REASON_CHARACTERS]
