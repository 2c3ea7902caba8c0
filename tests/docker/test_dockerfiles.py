"""Dockerfiles and the bill of materials, without building an image; tests/e2e/test_images.py looks into built ones."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
from tools import tool

ROOT = Path(__file__).parents[2]
DOCKERFILES = sorted(
    [ROOT / "Dockerfile", *(path for folder in ("docker", "tests") for path in (ROOT / folder).glob("**/*Dockerfile"))]
)
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
    for stage in stages(path):
        if "ENTRYPOINT" in stage:  # the others are only built with
            last = re.findall(r"^USER (.*)$", stage, re.MULTILINE)[-1]
            assert re.fullmatch(r"[1-9][0-9]*:[1-9][0-9]*", last)


def stages(path: Path) -> list[str]:
    return re.split(r"^(?=FROM )", path.read_text(), flags=re.MULTILINE)[1:]


def test_there_are_three_dockerfiles_for_four_images() -> None:
    assert len(DOCKERFILES) == 3
    assert sum("ENTRYPOINT" in stage for path in DOCKERFILES for stage in stages(path)) == 4


def copied(text: str) -> list[str]:
    """What a Dockerfile copies from its context."""
    lines = re.findall(r"^COPY (?!--from)(.*)$", text, re.MULTILINE)
    return [source for line in lines for source in line.split()[:-1]]


def test_a_plain_build_gives_the_trainer_and_needs_only_what_the_context_has() -> None:
    """.dockerignore lets nothing through but what is copied, so that no other change repeats a layer."""
    assert stages(ROOT / "Dockerfile")[-1].startswith("FROM ${BASE_IMAGE} AS trainer\n")
    wanted = {source for path in DOCKERFILES if "tests" not in path.parts for source in copied(path.read_text())}
    rules = (ROOT / ".dockerignore").read_text().splitlines()
    let_in = {rule[1:] for rule in rules if rule.startswith("!")}
    assert rules[0] == "*" and {source for source in wanted if not (ROOT / source).exists()} == set()
    locks = {name for name in wanted if name.startswith("requirements-")}
    assert wanted - locks == let_in - {"requirements-*.lock"}
    assert rules.index("**/.env") > max(rules.index(rule) for rule in rules if rule.startswith("!"))


def test_sources_come_after_the_layers_of_dependencies() -> None:
    """A change of the sources must not install torch again."""
    for stage in stages(ROOT / "Dockerfile")[1:]:
        installed, wheel = stage.index("-r requirements-uv.lock"), stage.index("COPY --from=wheel")
        assert stage.count("COPY --from=wheel") == 1 and installed < wheel
        assert not set(copied(stage)) & {"pipelines", "components", "manifests", "trainer", "pyproject.toml"}
        assert stage.rindex("RUN ") < stage.index("ARG REVISION"), "labels change with each commit"


def test_a_plain_build_has_the_label_of_this_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert set(re.findall(r"^ARG VERSION=(.*)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)) == {version}


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
