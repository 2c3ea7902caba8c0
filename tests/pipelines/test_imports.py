"""Who may import whom, and what stays light."""

import importlib.util
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_imports_go_one_way():
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout


def test_help_answers_without_heavy_packages():
    code = """
        import contextlib, io, sys
        sys.argv = ["yaongi", "--help"]
        from pipelines.cli import main
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
            main()
        assert "yaongi run tiny" in out.getvalue()
        heavy = {"torch", "kfp", "kubernetes", "datasets", "matplotlib", "transformers"}
        print(sorted(heavy & sys.modules.keys()))
    """
    assert python(_dedent(code)) == "[]\n"


@pytest.mark.parametrize("package", ["components", "pipelines", "manifests"])
def test_the_slim_image_needs_no_torch(package):
    names = [
        module.name
        for module in pkgutil.walk_packages([str(ROOT / package)], f"{package}.")
        if not module.ispkg and module.name != "pipelines.execute"
    ]
    assert names
    python(f"import sys; sys.modules['torch'] = None\nfor name in {names}: __import__(name)")


def test_our_trainer_is_the_one_that_is_imported():
    spec = importlib.util.find_spec("trainer")
    assert spec is not None and Path(spec.origin or "").parent == ROOT / "trainer"


def _dedent(code: str) -> str:
    import textwrap

    return textwrap.dedent(code)
