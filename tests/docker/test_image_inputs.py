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
LOCK, GPU_LOCK = ROOT / "requirements-trainer.lock", ROOT / "requirements-gpu.lock"
COMPILED = {"causal-conv1d", "flash-attn", "mamba-ssm", "transformer-engine-torch"}


def selected(
    *flags: str, installed: Path | None = None, lock: Path = LOCK, programs: str = os.environ["PATH"]
) -> dict[str, str]:
    """Requirement by package name; `installed` is a folder of the base image's own packages."""
    environment = {"PATH": programs} | ({"PYTHONPATH": str(installed)} if installed else {})
    # -S: without this environment's packages, as in a bare base image.
    command = [sys.executable, "-S", str(ROOT / "docker" / "select_requirements.py"), str(lock), *flags]
    text = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    return {re.split("==", block)[0]: block for block in re.split(r"\n(?=[a-z])", text) if "==" in block}


def locked(lock: Path) -> set[tuple[str, str]]:
    """Packages and versions; some have several, for different versions of Python."""
    return set(re.findall(r"^([a-z0-9-]+)==([^ \n]+)", lock.read_text(), re.MULTILINE))


def install(folder: Path, name: str, version: str) -> None:
    """The metadata of a package, as if it were installed."""
    metadata = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_the_tools_that_build_the_wheel_are_those_of_development_by_hash() -> None:
    lock = ROOT / "requirements-build.lock"
    assert {"setuptools", "build"} <= {name for name, _ in locked(lock)}
    assert locked(lock) <= locked(ROOT / "requirements.lock")
    assert all("--hash=sha256:" in block for block in selected(lock=lock).values())


def test_the_trainer_image_runs_the_whole_pipeline() -> None:
    """On one machine it is the only image, so it has what the small image of the steps has."""
    names = {name for name, _ in locked(LOCK)}
    assert {name for name, _ in locked(ROOT / "requirements-pipeline.lock")} <= names and "torch" in names


def test_a_gpu_image_has_the_versions_of_the_trainer_and_kernels_by_hash() -> None:
    assert locked(LOCK) <= locked(GPU_LOCK)
    names = {name for name, _ in locked(GPU_LOCK)}
    kernels = {*COMPILED, "flash-attn-4", "quack-kernels", "nvidia-cutlass-dsl", "transformer-engine", "triton"}
    assert kernels <= names
    assert all("--hash=sha256:" in block for block in selected(lock=GPU_LOCK).values())
    assert selected(lock=GPU_LOCK).keys() == names - COMPILED


def test_kernels_are_compiled_only_where_there_is_a_compiler(tmp_path: Path) -> None:
    assert selected("--compiled", lock=GPU_LOCK, programs="/bin") == {}
    (tmp_path / "nvcc").touch(mode=0o755)
    assert selected("--compiled", lock=GPU_LOCK, programs=str(tmp_path)).keys() == COMPILED
    assert selected("--compiled", programs=str(tmp_path)) == {}, "an image for CPUs has none"


def test_a_base_with_kernels_keeps_them(tmp_path: Path) -> None:
    (tmp_path / "nvcc").touch(mode=0o755)
    base = tmp_path / "packages"
    for name, version in (("torch", "2.9.0a0"), ("flash-attn", "2.7.4"), ("transformer_engine", "2.8.0")):
        install(base, name, version)
    found = selected("--compiled", lock=GPU_LOCK, programs=str(tmp_path), installed=base)
    assert found.keys() == {"causal-conv1d", "mamba-ssm"}
    wheels = selected(lock=GPU_LOCK, installed=base).keys()
    assert wheels & {"torch", "triton", "transformer-engine", "transformer-engine-cu13", "nvidia-cublas"} == set()
    assert "nvidia-cudnn-frontend" not in wheels, "as Transformer Engine's own"
    assert wheels >= {"flash-attn-4", "quack-kernels", "nvidia-cutlass-dsl", "apache-tvm-ffi"}


def test_a_bare_base_gets_the_whole_lock_with_hashes() -> None:
    found = selected()
    assert found.keys() == {name for name, _ in locked(LOCK)} and len(found) > 50
    assert all("--hash=sha256:" in block for block in found.values())


def test_a_cpu_image_leaves_out_only_what_torch_does_not_link_against() -> None:
    left_out = set(selected()) - set(selected("--cpu-only"))
    assert left_out == {
        "triton", "nvidia-cusolver", "nvidia-nvtx", "cuda-bindings", "cuda-pathfinder", "cuda-toolkit",
    }  # fmt: skip


def test_a_base_with_torch_keeps_it_and_what_it_was_built_with(tmp_path: Path) -> None:
    install(tmp_path, "torch", "2.11.0a0")
    found = set(selected(installed=tmp_path))
    assert found & {"torch", "numpy", "triton", "nvidia-cublas", "nvidia-nccl-cu13"} == set()
    assert found >= {"pydantic", "safetensors", "tensorboard", "tokenizers"}
    kernels = set(selected(lock=GPU_LOCK, installed=tmp_path))
    assert kernels >= {"transformer-engine", "nvidia-cudnn-frontend"}, "torch was not built with these"


@pytest.mark.parametrize(
    ("torch", "said"),
    [
        ("2.12.0a0+5aff3928d8.nv26.05", None),
        ("2.9.0a0+145a3a7bda.nv25.10", "the base image has torch 2.9.0a0+145a3a7bda.nv25.10, not <2.14,>=2.11; set"),
        ("2.14.0", "the base image has torch 2.14.0, not <2.14,>=2.11; set another BASE_IMAGE"),
    ],
)
def test_a_base_with_a_torch_that_we_do_not_accept_is_refused(tmp_path: Path, torch: str, said: str | None) -> None:
    install(tmp_path, "torch", torch)
    command = [sys.executable, ROOT / "docker" / "check_torch.py"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode == 0) == (said is None), done.stderr
    assert said in done.stderr if said else done.stdout == f"torch {torch}\n"


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
