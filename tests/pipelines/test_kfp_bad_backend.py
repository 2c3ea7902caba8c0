"""A backend that is down, of another version, or wants a login: every verb says so in one line, with the fix."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from http import HTTPStatus
from pathlib import Path

import pytest
from kfp_backend import Backend, Recorded

from pipelines.runs.kfp import backend as asking
from pipelines.runs.kfp.backend import connect
from trainer.errors import LaunchError, SpecError

RUN = "0f6c2f8e-8a7b-4d43-9c55-3d1e6a0b7c21"
VERBS = ("submit", "status", "logs", "stop", "why", "resume")

Verb = Callable[..., tuple[int, str, str]]


@pytest.fixture
def backend() -> Iterator[Backend]:
    made = Backend()
    yield made
    made.shutdown()


@pytest.fixture
def refused(yaongi: Verb, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], str]:
    """The one line that a verb prints about a host, without `error: `."""
    for name in ("KFP_TOKEN", "KFP_COOKIE", "KFP_HOST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("KUBECONFIG", os.devnull)

    def ask(verb: str, host: str) -> str:
        what = ("tiny", "--host", host) if verb == "submit" else (RUN, "--host", host)
        code, said, error = yaongi(verb, *what)
        assert (code, said, error.count("\n")) == (69, "", 1) and error.startswith("error: "), error
        return error.removeprefix("error: ").rstrip("\n")

    return ask


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_says_in_one_line_what_is_wrong_with_the_backend(
    verb: str, refused: Callable[[str, str], str], backend: Backend
) -> None:
    """Before and after the first answer: behind some proxies the health of a backend needs no login."""
    backend.show(Recorded("failed-in-plan"))
    backend.page_of = "/apis/v2beta1/experiments" if verb == "submit" else "/apis/v2beta1/runs"
    assert " answers with a web page instead of an answer of the API" in refused(verb, backend.url)
    backend.page_of, backend.status = "", HTTPStatus.UNAUTHORIZED
    assert " wants a login (401); set KFP_TOKEN to a token for it (" in refused(verb, backend.url)


def wrong(backend: Backend) -> str:
    with pytest.raises(LaunchError) as raised:
        connect(backend.url)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_a_backend_that_is_down_or_being_replaced(backend: Backend) -> None:
    backend.away = range(1, 10)
    assert "the backend is being replaced (503); try again" in wrong(backend)
    backend.shutdown()
    backend.server_close()
    said = f"Kubeflow Pipelines does not answer at {backend.url} (Connection refused); check --host, and that it runs: "
    assert wrong(backend).startswith(said)


def test_a_login_page_is_told_and_a_redirect_to_it_not_followed(backend: Backend) -> None:
    """Following it would give the token to another server."""
    backend.page = True
    page = (
        f"{backend.url} answers with a web page instead of an answer of the API, as a login page does; set KFP_TOKEN to"
    )
    assert wrong(backend).startswith(page) and "KFP_COOKIE" in wrong(backend)
    backend.status = HTTPStatus.NOT_FOUND
    assert wrong(backend).startswith(page)
    backend.status = HTTPStatus.FOUND
    assert wrong(backend).startswith(f"{backend.url} leads to https://login.example/dex/auth instead of an answer")


def test_a_token_that_is_missing_or_has_expired(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KFP_TOKEN", raising=False)
    backend.status = HTTPStatus.UNAUTHORIZED
    assert wrong(backend).startswith(f"{backend.url} wants a login (401); set KFP_TOKEN to a token for it (")
    monkeypatch.setenv("KFP_TOKEN", "old")
    said = f"{backend.url} refused what KFP_TOKEN holds (401): it may have expired; set KFP_TOKEN to a token for it ("
    assert wrong(backend).startswith(said) and backend.headers["Authorization"] == "Bearer old"
    backend.status = HTTPStatus.FORBIDDEN
    assert "the token is not accepted (403); ask its owner for the right, or log in anew: set KFP_TOKEN" in wrong(
        backend
    )


def test_another_version_or_another_server(backend: Backend) -> None:
    other = f"{backend.url} does not answer for its state as Kubeflow Pipelines 2 does; check --host, and its version: "
    for answer in ({"apiServerReady": True}, ["x"], "ok"):
        backend.healthy = answer
        assert wrong(backend).startswith(other)
    backend.status = HTTPStatus.NOT_FOUND
    assert wrong(backend).startswith(other)


def test_a_run_that_the_backend_does_not_know_is_one_line(refused: Callable[[str, str], str], backend: Backend) -> None:
    assert refused("status", backend.url) == (
        f"{backend.url} knows no run {RUN} (404); give the id that its page's address ends in, and check --host"
    )


def test_a_workflow_of_another_version_is_one_line(
    refused: Callable[[str, str], str], backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = Recorded("failed-in-plan")
    recorded.id = recorded.run["run_id"] = RUN
    recorded.run_v1 = {"run": {"id": RUN}}
    backend.show(recorded)
    assert refused("status", backend.url).startswith(
        f"{backend.url} does not answer for the steps of a run as Kubeflow"
    )


def test_an_address_that_is_none_and_none_at_all(yaongi: Verb, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KFP_HOST", raising=False)
    assert yaongi("status", RUN)[2].startswith("error: --host is missing; give the address")
    for host in ("10.240.0.1:30888", "http://a b", "http://"):
        with pytest.raises(SpecError, match=rf"^--host: '{host}' is no address; write it with its protocol: http://10"):
            connect(host)
    for host in ("http://[x", "http://a.invalid"):
        with pytest.raises(LaunchError, match=r"^Kubeflow Pipelines does not answer at http"):
            connect(host)


def test_the_token_of_a_pod_and_a_cookie_are_sent(
    backend: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "token"
    file.write_text("of the pod\n")
    monkeypatch.setattr(asking, "TOKEN_FILE", str(file))
    monkeypatch.delenv("KFP_TOKEN", raising=False)
    monkeypatch.setenv("KFP_COOKIE", "authservice_session=1")
    connect(backend.url + "/#/runs")
    assert backend.headers["Authorization"] == "Bearer of the pod"
    assert backend.headers["Cookie"] == "authservice_session=1"


def test_a_host_is_refused_where_the_run_is_none_of_its_runs(
    yaongi: Verb, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    for verb in ("logs", "why"):
        code, said, error = yaongi(verb, RUN[:8], "--host", backend.url)
        assert (code, said, error.count("\n")) == (2, "", 1)
        assert error.startswith(f"error: --host: a run on Kubeflow Pipelines is named by its whole id, and '{RUN[:8]}'")
    assert "whole id, and RUN is missing; give the id" in yaongi("status", "--host", backend.url)[2]
    monkeypatch.setenv("KUBECONFIG", os.devnull)
    monkeypatch.setenv("KFP_HOST", backend.url)
    assert yaongi("status", RUN[:8]) == (2, "", f"error: no run '{RUN[:8]}' in work; none is known\n")
    assert yaongi("status") == (0, "no runs in work\n", "")
