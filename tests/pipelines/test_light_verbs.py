"""A command answers without importing packages that only other commands need."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.cli import VERBS

ROOT = Path(__file__).parents[2]

# Slow imports; rfc3987_syntax compiles grammars for two seconds, which are not used here.
HEAVY = (
    *("torch", "kfp", "kubernetes", "rfc3987_syntax", "pyarrow", "matplotlib", "transformers", "datasets", "numpy"),
    *("tokenizers", "huggingface_hub", "fsspec", "jinja2", "tensorboard", "prometheus_client", "requests", "urllib3"),
)
PROGRAM = f"""
import atexit, json, resource, sys

def told():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    found = sorted(set({HEAVY!r}) & sys.modules.keys())
    print(json.dumps([found, usage.ru_utime + usage.ru_stime]), file=sys.stderr)

atexit.register(told)
"""
COMMAND = PROGRAM + "from pipelines.cli import main\nmain()\n"
# Each command in a fork of a process that has imported the command line, which takes half of a command's time.
FORKS = f"""
import json, os, sys

from pipelines.cli import main

for arguments in json.loads(sys.argv[1]):
    receives, sends = os.pipe()
    if not os.fork():
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        sys.argv = ["yaongi", *arguments]
        ended = "nothing"
        try:
            main()
        except BaseException as error:
            ended = type(error).__name__
        os.write(sends, json.dumps([sorted(set({HEAVY!r}) & sys.modules.keys()), ended]).encode())
        os._exit(0)
    os.close(sends)
    print(os.read(receives, 4096).decode(), flush=True)
    os.close(receives)
    os.wait()
"""


def told(program: str, *arguments: str, **environment: str) -> tuple[set[str], float]:
    """Which of HEAVY a program has imported at its end, and its seconds of CPU."""
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
    )
    found, seconds = json.loads(done.stderr.splitlines()[-1])
    return set(found), seconds


LINES = (
    "--help",
    *(f"{verb} --help" for verb in VERBS),
    "presets",
    "render tiny",
    "lint manifests/examples/cpu-smoke.yaml",
    "status --workdir WORK",
    "status tiny --workdir WORK",
    "logs tiny --workdir WORK",
    "stop tiny --workdir WORK",
    "resume tiny --workdir WORK",
    "why tiny",
    "status 0f6c2f8e-8a7b-4d43-9c55-3d1e6a0b7c21 --host http://127.0.0.1:9",
    "generate tiny --prompt x --workdir WORK",
    "evaluate tiny --workdir WORK",
)


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list]:
    """Command line → which of HEAVY it has imported at its end, and what it ended with."""
    places = [(line, str(tmp_path_factory.mktemp("work"))) for line in LINES]
    arguments = [
        line.replace("WORK", work).replace("manifests", str(ROOT / "manifests")).split() for line, work in places
    ]
    done = subprocess.run(
        [sys.executable, "-c", FORKS, json.dumps(arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "KUBECONFIG": str(tmp_path_factory.mktemp("no-cluster") / "none")},
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(LINES, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("line", LINES)
def test_a_command_imports_nothing_that_it_does_not_need(commands: dict[str, list], line: str) -> None:
    """None of them has a cluster, and their arguments name things that do not exist."""
    assert commands[line] == [[], "SystemExit"]


def test_help_takes_little_cpu() -> None:
    """Relative to the time of its own packages, as a processor may be slow or busy: three times as much, measured."""
    _, least = told(PROGRAM + "import typer, rich.console, pydantic")
    _, taken = told(COMMAND, "--help")
    assert taken < 10 * least


@pytest.mark.parametrize(
    ("step", "may"),
    [
        ("plan", set()),
        ("download", {"fsspec"}),
        ("hygiene", set()),
        ("tokenizer", {"tokenizers"}),
        ("shards", {"numpy", "tokenizers"}),
        ("launch", set()),
        ("summary", set()),
    ],
)
def test_a_step_that_finds_its_work_done_imports_little(step: str, may: set[str]) -> None:
    """Only its module is imported: packages for the work are imported when the work starts."""
    program = PROGRAM + f"import components.{step}.step, components.running, manifests.spec\n"
    program += "manifests.spec.load_job('tiny')\n"
    assert told(program)[0] <= may | {"prometheus_client"}


def test_the_kubernetes_client_comes_without_the_grammars_of_a_validator() -> None:
    found, _ = told(PROGRAM + "import components.cluster.api, kubernetes.dynamic\n")
    assert "kubernetes" in found and "rfc3987_syntax" not in found


def test_the_pipeline_comes_without_the_grammars_of_a_validator() -> None:
    found, _ = told(PROGRAM + "from pipelines.compile import compiled\ncompiled()\n")
    assert "kfp" in found and "rfc3987_syntax" not in found


def test_what_is_left_out_of_an_import_can_be_imported_afterwards() -> None:
    found, _ = told(PROGRAM + "import components.cluster.api, kubernetes_validate\n")
    assert "rfc3987_syntax" in found
