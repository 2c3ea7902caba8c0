"""Trackers: what their own clients send to local servers, and that none of them is ever in the way of a training."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import micro
import pytest
from langfuse import Langfuse as LangfuseClient
from made_run import make_run
from mlflow_server import mlflow_serving
from ports import free_port
from tracker_servers import PROJECT, Server, basic, serving
from waiting import wait_until
from wandb_files import records
from wandb_server import ENTITY, wandb_serving

from trainer import evaluate
from trainer.errors import SpecError
from trainer.exitcodes import ExitCode
from trainer.recording.trackers import remote, sender, state
from trainer.recording.trackers.keys import problems, scrubbed, wanted
from trainer.recording.trackers.remote import Remote
from trainer.report import write_report
from trainer.spec import TrainSpec
from trainer.trackerspec import KEYS, LANGFUSE_HOST, TrackersSpec, variables_of

PUBLIC, SECRET = "pk-lf-public", "sk-lf-do-not-show-me"
WANDB_KEY = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in KEYS:
        for variable in variables_of(name):
            monkeypatch.delenv(variable, raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)


@pytest.fixture
def langfuse(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("LANGFUSE_PUBLIC_KEY", PUBLIC)
    monkeypatch.setenv("LANGFUSE_SECRET_KEY", SECRET)
    with serving(basic(PUBLIC, SECRET)) as server:
        yield server


def told(server: Server, name: str) -> list[dict[str, str]]:
    """Metadata, level and status message of the events of a name."""
    found = []
    for event in server.events:
        if event["name"] == name:
            parts = {key.removeprefix("langfuse.observation."): value for key, value in event["attributes"].items()}
            found.append({key.removeprefix("metadata."): value.strip('"') for key, value in parts.items()})
    return found


def files_with(text: str, folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


def train(spec: TrainSpec) -> tuple[int, str]:
    """Exit code and output of the entrypoint on a spec."""
    process = micro.start(spec)
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


def test_a_run_is_told_to_langfuse_and_kept_for_wandb(micro_data: Path, tmp_path: Path, langfuse: Server) -> None:
    trackers = {"langfuse": {"host": langfuse.address}, "wandb": {"project": "tests"}}
    run = tmp_path / "run"
    spec = micro.micro_spec(micro_data, run, trackers=trackers, evaluate={"every_steps": 6})
    code, output = train(spec)
    assert code == 0, output
    trace = LangfuseClient.create_trace_id(seed="micro")
    assert {event["trace"] for event in langfuse.events} == {trace}
    assert [event["name"] for event in langfuse.events] == ["start", "end"]
    (end,) = told(langfuse, "end")
    assert (end["state"], end["step"], end["level"]) == ("finished", "12", "DEFAULT")
    page = f"{langfuse.address}/project/{PROJECT}/traces/{trace}"
    assert state.links(run) == {"Langfuse": page} and f"Langfuse: {page}" in output
    assert state.read(run).told
    assert output.count("recorded offline") == 1 and "set WANDB_API_KEY" in output
    (first,) = (run / "wandb").glob("offline-run-*/run-*.wandb")
    kept = list(records(first))
    (begun,) = [each.run for each in kept if each.WhichOneof("record_type") == "run"][:1]
    assert (begun.run_id, begun.project, begun.display_name) == ("micro", "tests", "micro")
    settings = {item.key: json.loads(item.value_json) for item in begun.config.update}
    assert settings["model"]["hidden"] == 32 and settings["tokens"]["seq_len"] == 32
    losses = history(kept, "train/loss")
    lines = [json.loads(line) for line in (run / "logs" / "metrics.jsonl").read_text().splitlines()]
    assert losses == {line["step"]: line["loss"] for line in lines} and len(losses) == 12
    assert set(history(kept, "validation/bits_per_byte/en")) == {6, 12}
    assert not files_with(SECRET, run) and SECRET not in output


def test_a_run_and_its_restart_are_one_run_of_wandb(
    micro_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", WANDB_KEY)
    run = tmp_path / "run"
    with wandb_serving(WANDB_KEY) as server:
        spec = micro.micro_spec(micro_data, run, trackers={"wandb": {"project": "p", "host": server.address}})
        for first, name in ((1, "start"), (5, "restart")):  # steps 5 to 8 are trained twice
            one = Remote(spec, trains=True)
            one.event(name, {"step": first - 1, "reason": "killed" if first > 1 else None})
            for step in range(first, first + 8):
                one.add(step, {"train/loss": 5.0 - step / 8})
            if first > 1:
                one.summary({"loss": 3.5, "report": "report.html"})
                one.event("end", {"state": "finished", "step": 12})
            one.close()
            (there,) = server.runs.values()
            assert there["exit"] == (1 if first == 1 else 0), "without a word about its end it has failed"
        remote.tell(spec, {"evaluation": {"step": 12}}, {"evaluation": {"heldout": {"ko": 1.5}}})
        assert there["exit"] == 0 and there["summary"]["evaluation.heldout.ko"] == 1.5
    assert list(server.runs) == ["micro"] and not server.unknown
    assert there["config"]["model"]["value"]["hidden"] == 32
    lines = [line for line in there["history"] if "train/loss" in line]
    assert [line["step"] for line in lines] == [*range(1, 9), *range(5, 13)]
    assert [line["_step"] for line in there["history"]] == list(range(len(there["history"]))), "nothing is dropped"
    assert all(line["train/loss"] == 5.0 - line["step"] / 8 for line in lines)
    assert there["summary"]["loss"] == 3.5 and there["summary"]["event/restart"] == "killed"
    assert state.links(run) == {"Weights & Biases": f"{server.address}/{ENTITY}/p/runs/micro"}
    assert not files_with(WANDB_KEY, run) and WANDB_KEY not in caplog.text
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_a_run_and_its_restart_are_one_run_of_mlflow(
    micro_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As tests/peers with MLflow's own server, and with a key."""
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", SECRET)
    run = tmp_path / "run"
    with mlflow_serving(f"Bearer {SECRET}") as server:
        spec = micro.micro_spec(micro_data, run, trackers={"mlflow": {"tracking_uri": server.address}})
        for first, name in ((1, "start"), (5, "restart")):
            one = Remote(spec, trains=True)
            one.event(name, {"step": first - 1, "reason": "killed"})
            for step in range(first, first + 8):
                one.add(step, {"train/loss": 5.0 - step / 8, "train/odd:na,me": 1.0})
            one.close()
        remote.tell(spec, {"evaluation": {"step": 12}}, {"evaluation": {"heldout": {"ko": 1.5}, "report": "x.html"}})
        (there,) = server.runs.values()
        assert there["status"] == "RUNNING", "an evaluation does not end a training"
        remote.tell(spec, {"error": {"code": 137, "reason": "rank 0: ended by SIGKILL"}})
        assert there["status"] == "FAILED" and "ended by SIGKILL" in there["tags"]["yaongi.error"]
        assert not server.unknown and there["params"]["model.hidden"] == "32"
        losses = [(step, value) for key, step, value in there["metrics"] if key == "train/loss"]
        assert sorted(losses) == sorted((step, 5.0 - step / 8) for step in (*range(1, 9), *range(5, 13)))
        assert ("train/odd:na_me", 1, 1.0) in there["metrics"]
        assert ("summary/evaluation.heldout.ko", 0, 1.5) in there["metrics"]
        assert there["tags"]["yaongi.evaluation.report"] == "x.html"
        (place,) = state.links(run).values()
        assert place.startswith(f"{server.address}/#/experiments/1/runs/") and server.experiments == {"yaongi": "1"}
        assert not [record for record in caplog.records if record.levelname == "WARNING"]
        assert not files_with(SECRET, run) and SECRET not in caplog.text
        monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "wrong")
        remote.tell(spec, {"evaluation": {}})
        (line,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert "refuses the key" in line and "set MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME and" in line


def test_a_run_that_wandb_refuses_is_kept_and_sent_later(
    micro_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", WANDB_KEY)
    run, right = tmp_path / "run", WANDB_KEY[::-1]
    with wandb_serving(right) as server:
        spec = micro.micro_spec(micro_data, run, trackers={"wandb": {"project": "p", "host": server.address}})
        one = Remote(spec, trains=True)
        one.event("start", {"step": 0})
        one.add(1, {"train/loss": 4.5})
        one.event("end", {"state": "finished", "step": 1})
        one.close()
        (line,) = [record.getMessage() for record in caplog.records]
        assert "refuses the key; the run is recorded offline in" in line and "WANDB_API_KEY" in line
        assert not server.runs and state.links(run) == {}
        monkeypatch.setenv("WANDB_API_KEY", right)
        monkeypatch.setenv("WANDB_BASE_URL", server.address)
        (kept,) = (run / "wandb").glob("offline-run-*")
        sync = subprocess.run(
            [Path(sys.executable).with_name("wandb"), "sync", str(kept)],
            capture_output=True,
            text=True,
            timeout=120,
            cwd=tmp_path,
        )
        assert sync.returncode == 0, sync.stdout + sync.stderr
        assert [line["train/loss"] for line in server.runs["micro"]["history"] if "train/loss" in line] == [4.5]


def history(kept: list[Any], name: str) -> dict[int, float]:
    """A value of W&B's history by the run's own step."""
    found = {}
    for record in kept:
        if record.WhichOneof("record_type") == "history":
            values = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            if name in values:
                found[values["step"]] = values[name]
    return found


def test_a_run_that_was_killed_is_reported_by_the_entrypoint(
    micro_data: Path, tmp_path: Path, langfuse: Server
) -> None:
    spec = micro.micro_spec(micro_data, tmp_path / "run", trackers={"langfuse": {"host": langfuse.address}}, steps=1900)
    process = micro.start(spec)
    log = tmp_path / "run" / "logs" / "metrics.jsonl"
    wait_until(lambda: (log.exists() and log.read_text().count("\n") > 1) or process.poll() is not None)
    wait_until(lambda: bool(told(langfuse, "start")))
    assert process.poll() is None, process.communicate()[0]
    os.kill(rank_of(process.pid), signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode == ExitCode.KILLED
    (error,) = told(langfuse, "error")
    assert (error["level"], error["code"]) == ("ERROR", "137")
    assert error["status_message"] == error["reason"] == "rank 0: ended by SIGKILL"
    again = micro.start(spec)
    wait_until(lambda: bool(told(langfuse, "restart")) or again.poll() is not None)
    again.send_signal(signal.SIGTERM)
    again.communicate(timeout=120)
    assert told(langfuse, "restart")[0]["reason"] == "killed"
    (end,) = told(langfuse, "end")
    assert end["state"] == "stopped" and len(told(langfuse, "error")) == 1


def rank_of(entrypoint: int) -> int:
    """The training process among the entrypoint's children."""
    for listed in Path(f"/proc/{entrypoint}/task").glob("*/children"):
        for pid in listed.read_text().split():
            command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if b"trainer" in command:
                return int(pid)
    raise AssertionError("no rank")


def test_an_error_before_the_first_step_is_told_too(micro_data: Path, tmp_path: Path, langfuse: Server) -> None:
    spec = micro.micro_spec(micro_data, tmp_path / "run", trackers={"langfuse": {"host": langfuse.address}})
    (damaged := tmp_path / "shards").mkdir()
    code, output = train(spec.updated({"tokens": {"shards": str(damaged)}}))
    assert code == ExitCode.DATA, output
    (error,) = told(langfuse, "error")
    assert str(damaged) in error["reason"] and not told(langfuse, "start")


def test_trackers_that_hang_or_are_down_cost_a_line_each_and_no_time(
    micro_data: Path, tmp_path: Path, langfuse: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    langfuse.answers.clear()  # it takes connections and never answers
    monkeypatch.setenv("WANDB_API_KEY", WANDB_KEY)
    trackers = {
        "langfuse": {"host": langfuse.address},
        "wandb": {"project": "p", "host": langfuse.address},
        "mlflow": {"tracking_uri": f"http://127.0.0.1:{free_port()}"},  # nothing listens
    }
    alone, beside = (
        micro.micro_spec(micro_data, tmp_path / name, steps=40, **more)
        for name, more in (("alone", {}), ("beside", {"trackers": trackers}))
    )
    assert train(alone)[0] == 0
    code, output = train(beside)
    ended = time.time()
    assert code == 0, output
    lines = [line for line in output.splitlines() if line.startswith("warning: ")]
    assert len(lines) == 3 and all(sum(title in line for line in lines) == 1 for title in ("MLflow", "Langfuse", "W"))
    assert ended - (tmp_path / "beside" / "result.json").stat().st_mtime < sender.CLOSE_SECONDS + 15
    seconds = [statistics.median(line["seconds"] for line in micro.metrics(spec)) for spec in (alone, beside)]
    assert seconds[1] < 3 * seconds[0] + 0.05  # a wait for a server would be seconds
    assert losses(alone) == losses(beside) and len(losses(alone)) == 40, "bit for bit"
    assert not files_with(WANDB_KEY, tmp_path / "beside") and WANDB_KEY not in output


def losses(spec: TrainSpec) -> list[float]:
    return [line["loss"] for line in micro.metrics(spec)]


def test_closing_takes_a_few_seconds_at_most(
    micro_data: Path, tmp_path: Path, langfuse: Server, caplog: pytest.LogCaptureFixture
) -> None:
    langfuse.answers.clear()
    spec = micro.micro_spec(micro_data, tmp_path / "run", trackers={"langfuse": {"host": langfuse.address}})
    one = Remote(spec, trains=True)
    one.event("start", {})
    process = one._process
    assert process is not None
    wait_until(lambda: bool(langfuse.requests))
    began = time.monotonic()
    one.close()
    assert time.monotonic() - began < sender.CLOSE_SECONDS + 5
    assert process.poll() is not None, "nothing is left behind"
    assert sum("Langfuse" in record.getMessage() for record in caplog.records) == 1


def test_a_wrong_key_is_one_line_with_the_fix_and_is_not_tried_again(
    micro_data: Path, tmp_path: Path, langfuse: Server, caplog: pytest.LogCaptureFixture
) -> None:
    langfuse.key = basic(PUBLIC, "another")
    spec = micro.micro_spec(micro_data, tmp_path / "run", trackers={"langfuse": {"host": langfuse.address}})
    remote.tell(spec, {"start": {}, "end": {}})
    (line,) = [record.getMessage() for record in caplog.records]
    assert "refuses the keys" in line and "set LANGFUSE_PUBLIC_KEY and LANGFUSE_SECRET_KEY" in line
    assert len(langfuse.requests) == 1 and SECRET not in line


def test_a_client_that_crashes_or_is_missing_ends_nothing(
    micro_data: Path,
    tmp_path: Path,
    langfuse: Server,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    trackers = {
        "mlflow": {"tracking_uri": "http://127.0.0.1:9"},
        "wandb": {"project": "p"},
        "langfuse": {"host": langfuse.address},
    }
    spec = micro.micro_spec(micro_data, tmp_path / "run", trackers=trackers)
    (broken := tmp_path / "broken").mkdir()
    (broken / "mlflow.py").write_text("raise ImportError('no such client')")
    (broken / "wandb.py").write_text("raise RuntimeError('crashes on import')")
    path = os.pathsep.join([str(broken), *sys.path])
    monkeypatch.setenv("PYTHONPATH", path)
    remote.tell(spec, {"start": {}})
    lines = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(lines) == 2
    assert any("MLflow: its client is not installed" in line and "yaongi[trackers]" in line for line in lines)
    assert any("Weights & Biases: RuntimeError: crashes on import" in line for line in lines)
    assert told(langfuse, "start"), "the others go on"
    (broken / "wandb.py").write_text("import os; os._exit(11)")  # takes its whole process along
    caplog.clear()
    one = Remote(spec, trains=True)
    process = one._process
    assert process is not None
    process.wait(60)
    for step in range(3 * remote.MOST_WAITING):  # nobody waits for a place in the queue
        one.add(step, {"loss": 1.0})
    one.close()
    lines = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert lines.count("trackers: their process ended (11); the run goes on without them") == 1


def test_messages_of_an_outage_are_sent_later(
    micro_data: Path, tmp_path: Path, langfuse: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process, because the pause between tries is long."""
    monkeypatch.setattr(sender, "RETRY_SECONDS", 0.05)
    said: list[str] = []
    tries: list[str] = []

    class Sometimes:
        place, remark = state.Place(id="x"), ""
        got: list[Any] = []

        def event(self, name: str, values: dict[str, Any]) -> None:
            tries.append(name)
            if len(tries) < 3:
                raise OSError("Connection refused")
            self.got.append((name, values))

        def flush(self) -> None: ...
        def close(self) -> None: ...

    desk = sender.Desk("mlflow", Sometimes, lambda place: None, lambda level, text: said.append(text))
    desk.put({"do": "event", "name": "start", "values": {"step": 0}})
    desk.put({"do": "event", "name": "end", "values": {"step": 1}})
    desk.start()
    wait_until(lambda: len(Sometimes.got) == 2)
    desk.finish()
    desk.join(10)
    assert not desk.is_alive() and tries == ["start", "start", "start", "end"]
    assert said == ["MLflow: its server does not answer; the run goes on, and it is tried again"]


def test_at_the_end_a_slow_tracker_gets_its_time_and_one_that_stands_still_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sender, "CLOSE_SECONDS", 1.0)
    took: list[int] = []
    forever = threading.Event()

    class Slow:
        place, remark = state.Place(id="x"), ""

        def add(self, step: int, values: dict[str, float]) -> None:
            time.sleep(0.3)
            took.append(step)

        def flush(self) -> None: ...
        def close(self) -> None: ...

    class Standing(Slow):
        def add(self, step: int, values: dict[str, float]) -> None:
            forever.wait(60)

    desks = [sender.Desk("mlflow", kind, lambda place: None, lambda level, text: None) for kind in (Slow, Standing)]
    for desk in desks:
        desk.start()
        for step in range(6):
            desk.put({"do": "add", "step": step, "values": {}})
        desk.finish()
    assert sender.leave(desks) == desks[1:] and took == list(range(6))
    forever.set()


def test_of_too_many_messages_the_oldest_numbers_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sender, "MOST_WAITING", 3)
    desk = sender.Desk("mlflow", lambda: None, lambda place: None, lambda level, text: None)
    desk.put({"do": "event", "name": "start", "values": {}})
    for step in range(9):
        desk.put({"do": "add", "step": step, "values": {}})
    assert [each.get("step", each.get("name")) for each in desk._waiting] == ["start", 7, 8]


@pytest.mark.parametrize(
    ("trackers", "message"),
    [
        ({"mlflow": {"tracking_uri": "http://me:secret@host"}}, "a user's name or password in it"),
        ({"langfuse": {"host": "https://host/?key=x"}}, "an address with ? or # in it"),
        ({"mlflow": {"tracking_uri": "sqlite:///x.db"}}, "'sqlite:///x.db' is no address; write http(s)://host"),
        ({"mlflow": {"tracking_uri": "http://host:99999"}}, "is no address"),
        ({"wandb": {"project": "a/b"}}, "'a/b' cannot be a name there, because of '/'"),
        ({"wandb": {}}, "trackers.wandb.project: required field is missing"),
        ({"wandbb": {"project": "p"}}, "did you mean 'trackers.wandb'?"),
        ({"wandb": {"project": "p", "api_key": "x"}}, "api_key: unknown field"),
    ],
)
def test_a_bad_section_is_refused_with_the_fix(
    micro_data: Path, tmp_path: Path, trackers: dict[str, Any], message: str
) -> None:
    with pytest.raises(SpecError) as raised:
        micro.micro_spec(micro_data, tmp_path, trackers=trackers)
    assert message in str(raised.value) and "\n" not in str(raised.value)
    assert "secret" not in str(raised.value)


def test_a_tracker_without_key_is_a_line_with_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    trackers = TrackersSpec.model_validate(
        {"wandb": {"project": "p"}, "mlflow": {"tracking_uri": "http://h"}, "langfuse": {}}
    )
    lines = list(problems(trackers))
    assert len(lines) == 2 and "set WANDB_API_KEY" in lines[0] and "recorded offline" in lines[0]
    assert "set LANGFUSE_PUBLIC_KEY and LANGFUSE_SECRET_KEY" in lines[1] and "goes on without it" in lines[1]
    monkeypatch.setenv("WANDB_API_KEY", WANDB_KEY)
    monkeypatch.setenv("LANGFUSE_PUBLIC_KEY", PUBLIC)
    assert len(list(problems(trackers))) == 1, "half of a pair is no key"
    monkeypatch.setenv("LANGFUSE_SECRET_KEY", SECRET)
    assert list(problems(trackers)) == list(problems(None)) == []
    assert scrubbed(f"bad\nkey {SECRET} and {WANDB_KEY}") == "bad key *** and ***"


def test_megatron_tells_langfuse_if_its_keys_are_there(
    micro_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = micro.micro_spec(micro_data, tmp_path)
    theirs = own.model_copy(update={"engine": "megatron"})
    assert wanted(own) is None and wanted(theirs) is None
    monkeypatch.setenv("LANGFUSE_PUBLIC_KEY", PUBLIC)
    monkeypatch.setenv("LANGFUSE_SECRET_KEY", SECRET)
    monkeypatch.setenv(LANGFUSE_HOST, "http://here")
    found = wanted(theirs)
    assert wanted(own) is None and found is not None and found.names == ["langfuse"]


def test_no_client_is_imported_where_no_tracker_is_asked_for(micro_data: Path, tmp_path: Path) -> None:
    program = "import sys, trainer.recording.recorder, trainer.entrypoint\n"
    program += "print([name for name in ('wandb', 'mlflow', 'langfuse', 'opentelemetry') if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=micro.environment())
    assert found.stdout.strip() == "[]", found.stderr


def test_an_evaluation_is_told_without_texts(tmp_path: Path, langfuse: Server) -> None:
    options = {"max_tokens": 2000, "prompts": ["river"], "sample_tokens": 2}
    trackers = {"langfuse": {"host": langfuse.address}}
    spec, _ = make_run(tmp_path, evaluate=options, trackers=trackers)
    result = evaluate.run(spec)
    (event,) = told(langfuse, "evaluation")
    assert json.loads(event["heldout"]) == {"en": result["domains"]["en"]["bits_per_byte"]} and event["step"] == "12"
    assert "samples" not in event and not any("river" in str(each) for each in langfuse.events)
    assert state.read(spec.run_dir).told and state.read(spec.run_dir).started == 0, "no training was begun"


def test_the_run_s_page_is_in_the_report_and_found_in_a_log(tmp_path: Path) -> None:
    spec, _ = make_run(tmp_path)
    assert state.links(spec.run_dir) == {}
    pages = {"wandb": "https://wandb.ai/t/p/runs/x", "mlflow": "http://m:5000/#/experiments/1/runs/2"}
    places = {name: state.Place(id="x", url=url) for name, url in pages.items()} | {"langfuse": state.Place(id="t")}
    state.State(places=places).write(spec.run_dir)
    found = {"Weights & Biases": pages["wandb"], "MLflow": pages["mlflow"]}
    assert state.links(spec.run_dir) == found
    page = write_report(spec.run_dir).read_text(encoding="utf-8")
    assert all(f'<a href="{url}">{url}</a>' in page for url in pages.values())
    lines = [f"{title}: {url}\n" for title, url in found.items()]
    assert state.links_in(["step 1/2  loss 3", *lines, "warning: MLflow: its server does not answer"]) == found
    (Path(spec.run_dir) / state.FILE).write_text("{broken")
    assert state.links(spec.run_dir) == {} and state.read(spec.run_dir).told
