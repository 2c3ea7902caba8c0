"""Progress posted to a local server with its own CA, which answers as the status API of Kubeflow Trainer 2.3 did."""

from __future__ import annotations

import ipaddress
import json
import logging
import ssl
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import micro
import pytest
import torch
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from waiting import wait_until

from trainer.distributed import World
from trainer.recording.recorder import Recorder, StepRecord
from trainer.recording.trainerstatus import CA_CERT, TOKEN, URL, Progress, TrainerStatus
from trainer.spec import BackendsSpec

PATH = "/apis/trainer.kubeflow.org/v1alpha1/namespaces/team/trainjobs/run/status"
INVALID = (
    'TrainJob.trainer.kubeflow.org "run" is invalid: status.trainerStatus.progressPercentage: Invalid value: 101: '
    "trainerStatus.progressPercentage in body should be less than or equal to 100"
)


def certified(folder: Path) -> tuple[Path, Path]:
    """Files with a CA's certificate, and with the key and certificate of 127.0.0.1 that it has signed."""
    now = datetime.now(UTC)

    def made(name: str, key: Any, issuer: str, by: Any, *extensions: x509.ExtensionType) -> x509.Certificate:
        def named(text: str) -> x509.Name:
            return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

        builder = x509.CertificateBuilder().subject_name(named(name)).issuer_name(named(issuer))
        builder = builder.public_key(key.public_key()).serial_number(x509.random_serial_number())
        builder = builder.not_valid_before(now - timedelta(hours=1)).not_valid_after(now + timedelta(hours=1))
        for extension in extensions:
            builder = builder.add_extension(extension, critical=False)
        return builder.sign(by, hashes.SHA256())

    authority, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    here = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    ca = made("ca", authority, "ca", authority, x509.BasicConstraints(ca=True, path_length=None))
    leaf = made("server", key, "ca", authority, here)
    pem = serialization.Encoding.PEM
    plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    (folder / "ca.crt").write_bytes(ca.public_bytes(pem))
    (folder / "server.pem").write_bytes(key.private_bytes(pem, *plain) + leaf.public_bytes(pem))
    return folder / "ca.crt", folder / "server.pem"


class Api(ThreadingHTTPServer):
    """Takes progress with the right token, and keeps it; `answer` is what it answers instead, if set."""

    def __init__(self, certificate: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        self.socket = context.wrap_socket(self.socket, server_side=True)
        self.taken: list[dict[str, Any]] = []
        self.answer: tuple[int, str] | None = None
        self.refused = 0


class Handler(BaseHTTPRequestHandler):
    server: Api

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        code, message = self.server.answer or (200, "")
        if self.headers["Authorization"] != "Bearer the-token":
            code, message = 403, "Forbidden"
        if self.path != PATH:
            code, message = 404, "Not found"
        if code == 200:
            self.server.taken.append(body["trainerStatus"])
        else:
            self.server.refused += 1
        self.send_response(code)
        if code == 302:
            self.send_header("Location", message)
        self.end_headers()
        self.wfile.write(json.dumps(body if code == 200 else {"status": "Failure", "message": message}).encode())

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return certified(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
def api(files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Api]:
    monkeypatch.setattr("trainer.recording.trainerstatus.TIMEOUT_SECONDS", 60)  # a busy machine answers slowly
    server = Api(files[1])
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def environment(api: Api, files: tuple[Path, Path], tmp_path: Path) -> dict[str, str]:
    """What Trainer gives a pod."""
    (tmp_path / "token").write_text("the-token")
    url = f"https://127.0.0.1:{api.server_port}{PATH}"
    return {URL: url, CA_CERT: str(files[0]), TOKEN: str(tmp_path / "token")}


@pytest.fixture
def status(environment: dict[str, str]) -> Iterator[TrainerStatus]:
    made = TrainerStatus(environment[URL], Path(environment[CA_CERT]), Path(environment[TOKEN]), pause=0.05)
    yield made
    made.close()


def test_without_the_variables_nothing_is_posted(environment: dict[str, str]) -> None:
    for missing in environment:
        assert TrainerStatus.from_environment({**environment, missing: ""}) is None


def test_progress_has_the_form_that_a_trainjobs_status_takes(api: Api, status: TrainerStatus) -> None:
    """The body of this form was taken by Trainer 2.3 on a cluster."""
    status.update(Progress(7, 40, 12.3, {"loss": 3.25, "tokens_per_second": 1234.5678}, seen=1767268800.9))
    wait_until(lambda: api.taken)
    assert api.taken == [
        {
            "progressPercentage": 17,
            "estimatedRemainingSeconds": 13,
            "metrics": [{"name": "loss", "value": "3.25"}, {"name": "tokens_per_second", "value": "1234.57"}],
            "lastUpdatedTime": "2026-01-01T12:00:00Z",
        }
    ]


@pytest.mark.parametrize(
    ("progress", "percentage", "left"),
    [
        (Progress(0, 3), 0, None),
        (Progress(2, 3, -1.0), 66, 0),
        (Progress(999_999, 1_000_000, 0.1), 99, 1),
        (Progress(3, 3, 0.0), 100, 0),
        (Progress(4, 3, 1e30), 100, 2**31 - 1),
    ],
)
def test_numbers_stay_within_the_schema(progress: Progress, percentage: int, left: int | None) -> None:
    body = progress.body()["trainerStatus"]
    assert (body["progressPercentage"], body.get("estimatedRemainingSeconds")) == (percentage, left)


def test_names_and_numbers_of_metrics_stay_within_the_schema() -> None:
    many = {f"{'m' * 70}{number}": float("nan") for number in range(300)}
    metrics = Progress(1, 2, metrics=many).body()["trainerStatus"]["metrics"]
    assert len(metrics) == 256
    assert {(len(metric["name"]), metric["value"]) for metric in metrics} == {(64, "nan")}


def test_only_the_newest_is_posted_and_the_last_one_always(api: Api, environment: dict[str, str]) -> None:
    status = TrainerStatus(environment[URL], Path(environment[CA_CERT]), Path(environment[TOKEN]), pause=60)
    status.update(Progress(1, 100))
    wait_until(lambda: api.taken)
    for step in range(2, 101):
        status.update(Progress(step, 100))
    status.close()
    assert not status.is_alive()
    assert [body["progressPercentage"] for body in api.taken] == [1, 100]


@pytest.mark.parametrize("answer", [(422, INVALID), (403, "Forbidden"), (500, "Internal error")])
def test_a_refusal_is_told_once_and_its_end_too(
    api: Api, status: TrainerStatus, caplog: pytest.LogCaptureFixture, answer: tuple[int, str]
) -> None:
    caplog.set_level(logging.INFO)
    api.answer = answer
    for refusals in (1, 2):
        status.update(Progress(1, 2))
        wait_until(lambda number=refusals: api.refused >= number)
    api.answer = None
    status.update(Progress(2, 2))
    wait_until(lambda: len(caplog.records) == 2)
    warned, mended = (record.getMessage() for record in caplog.records)
    assert warned.endswith(f"{PATH}: {answer[0]} {answer[1]}") and "takes the progress again" in mended


def test_a_renewed_token_is_read_again(api: Api, environment: dict[str, str], status: TrainerStatus) -> None:
    Path(environment[TOKEN]).write_text("an older one")
    status.update(Progress(1, 2))
    wait_until(lambda: api.refused)
    Path(environment[TOKEN]).write_text("the-token\n")
    status.update(Progress(2, 2))
    wait_until(lambda: api.taken)


def test_the_token_goes_to_no_other_server(api: Api, status: TrainerStatus, caplog: pytest.LogCaptureFixture) -> None:
    api.answer = 302, f"https://127.0.0.1:{api.server_port}/elsewhere"
    status.update(Progress(1, 2))
    wait_until(lambda: caplog.records)
    assert "302" in caplog.records[0].getMessage() and api.refused == 1


@pytest.mark.parametrize("broken", ["ca", "url", "token"])
def test_what_cannot_be_reached_or_trusted_is_one_line_and_is_not_waited_for(
    environment: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture, broken: str
) -> None:
    if broken == "ca":
        other, _ = certified(tmp_path)
        environment[CA_CERT] = str(other)
    elif broken == "url":
        environment[URL] = "https://127.0.0.1:9/"
    else:
        environment[TOKEN] = str(tmp_path / "absent")
    status = TrainerStatus.from_environment(environment)
    assert status is not None
    status.update(Progress(1, 2))
    wait_until(lambda: caplog.records)
    said = caplog.records[0].getMessage()
    assert {"ca": "certificate verify failed", "url": "refused", "token": "No such file"}[broken] in said
    began = time.monotonic()
    status.close()
    assert time.monotonic() - began < 1


def test_the_first_rank_posts_steps_and_scores(
    api: Api, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, micro_data: Path, tmp_path: Path
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    spec = micro.micro_spec(micro_data, tmp_path / "run", steps=4, runtime={"metrics_port": 0})
    (tmp_path / "run").mkdir()
    recorder = Recorder(spec, World(0, 1, 0, 1, torch.device("cpu"), None, None), time.time())
    recorder.begin(None, dict.fromkeys(("device", "mesh", "precision", *BackendsSpec.model_fields), "x"))
    wait_until(lambda: api.taken)
    assert api.taken[0]["progressPercentage"] == 0 and api.taken[0]["metrics"] == []
    record = StepRecord(3, 2.5, {}, 0.5, 1e-3, 96, 64.0, 1.0, False, None, 1.0, 0.0, {})
    recorder.step(record, {}, 16)
    recorder.close()
    last = api.taken[-1]
    assert last["progressPercentage"] == 75
    assert last["estimatedRemainingSeconds"] == -(-spec.batch.tokens_per_step // 64)
    posted = {metric["name"]: metric["value"] for metric in last["metrics"]}
    assert posted == {
        "step": "3", "tokens": "96", "loss": "2.5", "grad_norm": "0.5", "learning_rate": "0.001",
        "tokens_per_second": "64",
    }  # fmt: skip
