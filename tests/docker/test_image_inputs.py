"""The inputs of the images: the part of the lock file that a base image needs, and a wheel with every file."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LOCK = ROOT / "requirements-trainer.lock"


def selected(*flags: str, installed: Path | None = None) -> dict[str, str]:
    """Requirement by package name; `installed` is a folder of the base image's own packages."""
    environment = {"PATH": os.environ["PATH"]} | ({"PYTHONPATH": str(installed)} if installed else {})
    # -S: without this environment's packages, as in a bare base image.
    command = [sys.executable, "-S", str(ROOT / "docker" / "select_requirements.py"), str(LOCK), *flags]
    text = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    return {re.split("==", block)[0]: block for block in re.split(r"\n(?=[a-z])", text) if "==" in block}


def test_a_bare_base_gets_the_whole_lock_with_hashes() -> None:
    found = selected()
    locked = set(re.findall(r"^([a-z0-9-]+)==", LOCK.read_text(), re.MULTILINE))
    assert set(found) == locked and len(locked) > 50
    assert all("--hash=sha256:" in block for block in found.values())


def test_a_cpu_image_leaves_out_only_what_torch_does_not_link_against() -> None:
    left_out = set(selected()) - set(selected("--cpu-only"))
    assert left_out == {
        "triton", "nvidia-cusolver", "nvidia-nvtx", "cuda-bindings", "cuda-pathfinder", "cuda-toolkit",
    }  # fmt: skip


def test_a_base_with_torch_keeps_it_and_what_it_was_built_with(tmp_path: Path) -> None:
    metadata = tmp_path / "torch-2.11.0a0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.11.0a0\n")
    found = set(selected(installed=tmp_path))
    assert found & {"torch", "numpy", "triton", "nvidia-cublas", "nvidia-nccl-cu13"} == set()
    assert found >= {"pydantic", "safetensors", "tensorboard", "tokenizers"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of a copy of these sources, because setuptools leaves folders behind."""
    sources = tmp_path_factory.mktemp("sources")
    for folder in ("pipelines", "components", "manifests", "trainer", "makers"):
        shutil.copytree(ROOT / folder, sources / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, sources / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist", "."]
    subprocess.run(command, cwd=sources, check=True, capture_output=True)
    (made,) = (sources / "dist").glob("*.whl")
    return made


@pytest.mark.parametrize(
    ("without", "beside", "said"),
    [
        ("", "", None),
        ("manifests/presets/tiny.yaml", "", "lacks manifests/presets/tiny.yaml;"),
        ("", "manifests/dashboards/panels.py", "holds manifests/dashboards/panels.py;"),
        ("", "makers/sample_corpus.py", "holds makers/sample_corpus.py;"),
    ],
)
def test_a_wheel_has_every_file_that_runs_and_nothing_else(
    wheel: Path, tmp_path: Path, without: str, beside: str, said: str | None
) -> None:
    changed = tmp_path / wheel.name
    with zipfile.ZipFile(wheel) as made, zipfile.ZipFile(changed, "w") as archive:
        for name in made.namelist():
            if name != without:
                archive.writestr(name, b"")
        if beside:
            archive.writestr(beside, b"")
    command = [sys.executable, ROOT / "docker" / "check_wheel.py", changed]
    done = subprocess.run(command, cwd=wheel.parents[1], capture_output=True, text=True)
    assert (done.returncode == 0) == (said is None), done.stderr
    assert said is None or said in done.stderr
