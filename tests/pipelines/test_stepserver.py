"""Steps as forks of one process: their output and exit, in parallel, with signals, and without a server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Each test in a separate process, since the server is a fork of the process that starts it.
BEGIN = """
import json, os, signal, sys, threading, time
from pathlib import Path
from components.quick import local_kfp
with local_kfp():
    from pipelines.stepserver import StepServer
signal.signal(signal.SIGTERM, lambda *_: None)

def command(body, name="f"):
    source = f"import os, signal, subprocess, sys, time\\ndef {name}():\\n    {body}\\n"
    given = json.dumps({"inputs": {}, "outputs": {"outputFile": os.path.abspath(f"{name}.json")}})
    script = "run $program_path/ephemeral_component.py"
    return ["sh", "-ec", script, source, "--executor_input", given, "--function_to_execute", name]

def up(name, seconds=60):
    end = time.monotonic() + seconds
    while not Path(name).exists():
        assert time.monotonic() < end, name
        time.sleep(0.01)

server = StepServer()
"""


def run(script: str, folder: Path) -> list[str]:
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": root}
    done = subprocess.run(
        [sys.executable, "-u", "-c", BEGIN + script],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        start_new_session=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def marked(lines: list[str]) -> list[str]:
    """What is not kfp's."""
    return [line.removeprefix("> ") for line in lines if line.startswith("> ")]


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        ("print('done', os.environ['OF_STEP'], os.environ['OF_SERVER'])", 0, "done yes too"),
        ("print('wrong', file=sys.stderr); sys.exit(65)", 65, "wrong"),
        ("raise KeyError('absent')", 1, "KeyError: 'absent'"),
        ("print('going', flush=True); os.kill(os.getpid(), signal.SIGKILL)", -9, "run out of memory"),
        # As in a separate process: it can wait for its children, and a signal ends it.
        ("print(subprocess.run(['sh', '-c', 'exit 7']).returncode, signal.getsignal(15))", 0, "7 0"),
    ],
)
def test_what_a_step_prints_and_how_it_ends_is_told(body: str, code: int, said: str, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("OF_SERVER", "too")
    lines = run(f"print(server.run(command({body!r}), {{'OF_STEP': 'yes'}})); server.close()", tmp_path)
    assert any(said in line for line in lines[:-1]), lines
    assert lines[-1] == str(code)


def test_steps_run_beside_each_other(tmp_path: Path):
    """Each waits for the other's file."""
    lines = run(
        """
wait = "open({0!r}, 'w').close(); "
wait += "[time.sleep(0.01) for _ in range(6000) if not os.path.exists({1!r})]; print('>', {0!r})"
codes = {}
def one(own, other):
    codes[own] = server.run(command(wait.format(own, other), own))
threads = [threading.Thread(target=one, args=pair) for pair in (("a", "b"), ("b", "a"))]
for thread in threads: thread.start()
for thread in threads: thread.join()
print('>', json.dumps(codes))
server.close()
""",
        tmp_path,
    )
    *said, codes = marked(lines)
    assert sorted(said) == ["a", "b"] and json.loads(codes) == {"a": 0, "b": 0}


def test_a_signal_to_all_ends_the_step_and_not_what_starts_the_next(tmp_path: Path):
    lines = run(
        """
codes = []
first = threading.Thread(target=lambda: codes.append(server.run(command("open('up', 'w').close(); time.sleep(600)"))))
first.start()
up("up")
os.killpg(0, signal.SIGTERM)
first.join()
codes.append(server.run(command("print('> next')")))
print('>', codes)
server.close()
""",
        tmp_path,
    )
    assert marked(lines) == ["next", "[-15, 0]"]


def test_without_its_server_a_step_counts_as_killed(tmp_path: Path):
    lines = run(
        """
os.kill(server._server, signal.SIGKILL)
server.close()
server = StepServer()
codes = []
body = "open('up', 'w').close(); [time.sleep(0.01) for _ in range(6000) if not os.path.exists('down')]"
first = threading.Thread(target=lambda: codes.append(server.run(command(body))))
first.start()
up("up")
os.kill(server._server, signal.SIGKILL)
open("down", "w").close()
first.join()
codes.append(server.run(command("print('never')")))
print('>', codes)
""",
        tmp_path,
    )
    assert marked(lines) == ["[-9, -9]"]


def test_another_command_is_refused(tmp_path: Path):
    script = "try:\n    server.run(['sh', '-c', 'pip install x', 'y'])\nexcept ValueError as error:\n    print(error)\n"
    assert run(script, tmp_path) == ["not a component of kfp: pip install x"]
