"""Dockerfiles and the bill of materials, without building an image; tests/e2e/test_images.py looks into built ones."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
from tools import tool

ROOT = Path(__file__).parents[2]
DOCKERFILES = sorted(path for path in ROOT.glob("*/**/*Dockerfile") if not path.is_relative_to(ROOT / ".venv"))
LABELS = {"org.opencontainers.image.revision": "abc1234", "org.opencontainers.image.created": "2026-01-02T03:04:05Z"}
INVENTORY = {
    "system": ["debian", "12"],
    "debian": [
        ["libc6", "2.36-9+deb12u13", "amd64"],
        ["libstdc++6", "12.2.0-14", "amd64"],
        ["tzdata", "1:2025b", "all"],
    ],
    "python": [
        ["python", "3.11.2", "PSF-2.0"],
        ["kfp", "2.17.0", "Apache Software License"],
        ["numpy", "2.4.6", "BSD-3-Clause AND MIT"],
        ["numpy", "2.1.0", None],
    ],
}


@pytest.fixture(scope="module")
def sbom() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sbom", ROOT / "docker" / "sbom.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_hadolint_is_content_without_exceptions(path: Path) -> None:
    done = subprocess.run([tool("hadolint"), "--no-color", path], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout
    assert "hadolint" not in path.read_text()
    assert not list(ROOT.glob(".hadolint*"))


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_images_run_as_a_numeric_user_that_is_not_root(path: Path) -> None:
    """It must be a number: the kubelet cannot check `runAsNonRoot` for a name."""
    last = re.findall(r"^USER (.*)$", path.read_text(), re.MULTILINE)[-1]
    assert re.fullmatch(r"[1-9][0-9]*:[1-9][0-9]*", last)


def test_there_are_four_dockerfiles() -> None:
    assert len(DOCKERFILES) == 4


def test_a_bill_lists_each_package_once_by_its_url_and_is_valid(sbom: ModuleType) -> None:
    bill = json.loads(sbom.as_json(sbom.bom("localhost/yaongi-pipeline:1.2", LABELS, INVENTORY)))
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
    urls = [component.get("purl") for component in bill["components"]]
    assert sorted(url for url in urls if url) == [
        "pkg:deb/debian/libc6@2.36-9%2Bdeb12u13?arch=amd64&distro=debian-12",
        "pkg:deb/debian/libstdc%2B%2B6@12.2.0-14?arch=amd64&distro=debian-12",
        "pkg:deb/debian/tzdata@1:2025b?arch=all&distro=debian-12",
        "pkg:generic/python@3.11.2",
        "pkg:pypi/kfp@2.17.0",
        "pkg:pypi/numpy@2.1.0",
        "pkg:pypi/numpy@2.4.6",
    ]
    image = bill["metadata"]["component"]
    assert (image["type"], image["name"], image["version"]) == ("container", "yaongi-pipeline", "1.2")
    assert bill["metadata"]["timestamp"].startswith("2026-01-02T03:04:05")
    (root,) = [entry for entry in bill["dependencies"] if entry["ref"] == image["bom-ref"]]
    assert len(root["dependsOn"]) == len(urls)


def test_the_same_image_gives_the_same_bill(sbom: ModuleType) -> None:
    def text(revision: str) -> str:
        labels = LABELS | {"org.opencontainers.image.revision": revision}
        return sbom.as_json(sbom.bom("localhost/yaongi-pipeline:1.2", labels, INVENTORY))

    assert text("abc1234") == text("abc1234") != text("def5678")


def test_an_invalid_bill_is_refused(sbom: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sbom.JsonStrictValidator, "validate_str", lambda *_: "components is wrong")
    with pytest.raises(ValueError, match=r"not CycloneDX 1\.6: components is wrong"):
        sbom.as_json(sbom.bom("i:1", LABELS, INVENTORY))


def test_without_an_engine_the_advice_is_to_install_one(tmp_path: Path) -> None:
    for program in ("bash", "env"):
        (tmp_path / program).symlink_to(f"/usr/bin/{program}")
    command = [ROOT / "docker" / "image.sh", "labels", "some:1"]
    done = subprocess.run(command, env={"PATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "docker/image.sh: none of buildah, podman and docker works here; install one\n"


def test_images_are_built_by_the_given_builder() -> None:
    command = [ROOT / "docker" / "image.sh", "build", "some:1", ".", "-f", "x.Dockerfile"]
    done = subprocess.run(
        command, env={"PATH": "/usr/bin:/bin", "BUILD_IMAGE": "echo built"}, capture_output=True, text=True
    )
    assert done.stdout == "built some:1 . -f x.Dockerfile\n"
