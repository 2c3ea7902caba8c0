"""Read any path of a cluster's API, without typed clients for kinds that may not be installed."""

from __future__ import annotations

from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Any

from kubernetes.client import ApiClient
from kubernetes.client.exceptions import ApiException

from components.cluster.api import REQUEST_TIMEOUT_SECONDS, ApiUnreachable, Cluster, Refused, Unreachable
from manifests.kinds import Object
from trainer.errors import in_words


class Look:
    """One namespace of one cluster."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.namespace = cluster.namespace
        self._client: ApiClient = cluster.core.api_client

    def get(self, path: str) -> Object | None:
        """The object at a path of the API; None if there is none.

        Raises:
            LaunchError: the account may not read it, or the server does not answer.
        """
        return self._ask("GET", path)[0]

    def items(self, path: str) -> list[Object]:
        """The objects of a list; [] where the cluster does not know their kind."""
        return (self.get(path) or {}).get("items", [])

    def in_namespace(self, resource: str, name: str) -> Object | None:
        """A core object of the namespace by its plural and name."""
        return self.get(f"/api/v1/namespaces/{self.namespace}/{resource}/{name}")

    def post(self, path: str, body: Object) -> Object:
        return self._ask("POST", path, body)[0] or {}

    def delete(self, path: str) -> None:
        """Delete an object and all that it owns; it may be absent."""
        self._ask("DELETE", path, {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": "Background"})

    def clock_skew_seconds(self) -> float | None:
        """Seconds by which this machine's clock is ahead of the API server's, ±1 s; None if it sends no date."""
        before = datetime.now(UTC)
        headers = self._ask("GET", "/version")[1]
        now = before + (datetime.now(UTC) - before) / 2
        sent = headers.get("Date")
        return (now - parsedate_to_datetime(sent)).total_seconds() - 0.5 if sent else None

    def _ask(self, method: str, path: str, body: Object | None = None) -> tuple[Object | None, Any]:
        try:
            data, _, headers = self._client.call_api(
                path,
                method,
                body=body,
                header_params={"Accept": "application/json", "Content-Type": "application/json"},
                response_type="object",
                auth_settings=["BearerToken"],
                _request_timeout=REQUEST_TIMEOUT_SECONDS,
            )
        except ApiException as error:
            if error.status == HTTPStatus.NOT_FOUND:
                return None, {}
            if error.status == HTTPStatus.FORBIDDEN:
                raise Refused(
                    error.status, f"this account may not {'read' if method == 'GET' else method.lower()} {path}"
                ) from None
            raise self.cluster.refusal(f"{method.lower()} {path}", error) from None
        except Unreachable as error:
            raise ApiUnreachable(
                f"the API server {self.cluster.server} cannot be reached ({in_words(error)})"
            ) from None
        return data, headers
