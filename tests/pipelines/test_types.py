"""The type checker of `make lint`: that it runs, and what it refuses where."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
UNTYPED = "def twice(value):\n    return value + value\n"
WRONG = "def length(value: str | None) -> int:\n    return len(value)\n"
# The fields of a spec are arguments of its constructor, with their types.
WRONG_SPEC = "from pydantic import BaseModel\n\n\nclass Spec(BaseModel):\n    steps: int\n\n\nSpec(steps='1')\n"


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, set[str]]:
    """File → codes of the errors that the checker finds, as it is set up here, in packages of the same names."""
    tree = tmp_path_factory.mktemp("types")
    for path, text in {
        "trainer/spec.py": UNTYPED + WRONG_SPEC,
        "trainer/data/loader.py": UNTYPED + WRONG,
        "trainer/kinds/base.py": UNTYPED,
        "trainer/loop.py": UNTYPED + WRONG,
        "manifests/lint/place.py": UNTYPED,
        "components/step.py": UNTYPED + WRONG,
        "pipelines/cli.py": UNTYPED + WRONG,
    }.items():
        file = tree / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    for directory in [path for path in tree.rglob("*") if path.is_dir()]:
        (directory / "__init__.py").touch()
    command = [Path(sys.executable).with_name("mypy"), "--config-file", ROOT / "pyproject.toml", "--no-pretty"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tree)
    assert done.returncode == 1, done.stdout + done.stderr
    errors: dict[str, set[str]] = {}
    for path, code in re.findall(r"^(\S+?):\d+: error: .*\[(\S+)\]$", done.stdout, re.MULTILINE):
        errors.setdefault(path, set()).add(code)
    return errors


def test_wrong_types_are_found_in_every_package_and_missing_ones_where_it_is_strict(found):
    assert found == {
        "trainer/spec.py": {"no-untyped-def", "arg-type"},
        "trainer/data/loader.py": {"no-untyped-def", "arg-type"},
        "trainer/kinds/base.py": {"no-untyped-def"},
        "trainer/loop.py": {"arg-type"},
        "manifests/lint/place.py": {"no-untyped-def"},
        "components/step.py": {"arg-type"},
        "pipelines/cli.py": {"arg-type"},
    }


def test_lint_runs_it():
    done = subprocess.run(["make", "--dry-run", "lint"], capture_output=True, text=True, cwd=ROOT)
    assert ".venv/bin/mypy" in done.stdout.splitlines(), done.stdout + done.stderr
