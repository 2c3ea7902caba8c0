"""Both built images: their labels, their user, and whether the bill of materials matches their contents."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from kube import PIPELINE_IMAGE, TRAINER_IMAGE

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
PREFIX = "org.opencontainers.image."
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
each_image = pytest.mark.parametrize("image", [PIPELINE_IMAGE, TRAINER_IMAGE], ids=["pipeline", "trainer"])


def ask(verb: str, image: str, *command: str) -> str:
    done = subprocess.run([ROOT / "docker" / "image.sh", verb, image, *command], capture_output=True, text=True)
    if "none of buildah" in done.stderr or "has no image" in done.stderr:
        pytest.skip(f"needs the images in this machine's storage: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    return done.stdout


def packages_of_pip(image: str, which: str) -> set[tuple[str, str]]:
    """The packages that the base image's pip lists, in a separate environment or in its base Python."""
    command = f"PATH=/usr/local/bin:/usr/bin:/bin python3 -m pip {which} list --format=json"
    listed = json.loads(ask("run", image, "sh", "-c", command))
    return {(re.sub(r"[-_.]+", "-", item["name"]).lower(), item["version"]) for item in listed}


@each_image
def test_labels_tell_where_the_image_is_from(image: str) -> None:
    labels = dict(line.split("=", 1) for line in ask("labels", image).splitlines())
    found = {name.removeprefix(PREFIX): value for name, value in labels.items() if name.startswith(PREFIX)}
    print(json.dumps(found, indent=1))
    assert found["version"] == VERSION
    assert found["licenses"] == "Apache-2.0"
    assert re.fullmatch(r"[0-9a-f]{7,40}(-dirty)?", found["revision"])
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ", found["created"])
    assert found["base.name"] and re.fullmatch(r"sha256:[0-9a-f]{64}", found["base.digest"])
    assert found["title"].startswith("yaongi") and len(found["description"]) > 20


@each_image
def test_it_says_its_version(image: str) -> None:
    assert VERSION in ask("run", image, "/usr/local/bin/entry", "yaongi", "--version")


def test_the_image_of_a_plain_build_is_enough_for_one_machine() -> None:
    """The trainer's image is the Dockerfile's default, which `docker build -t yaongi-h100 .` gives (docs/docker.md)."""
    entry = "/usr/local/bin/entry"
    said = ask("run", TRAINER_IMAGE, "sh", "-c", f"{entry} yaongi doctor; echo exit code $?")
    assert re.search(r"PyTorch +ok +2\.", said) and re.search(r"exit code [01]$", said), said
    prepared = f"{entry} yaongi prepare tiny --until download --workdir /work && cd /work && ls -l datasets && id -u"
    said = ask("run", TRAINER_IMAGE, "sh", "-c", prepared)
    assert "next: yaongi prepare tiny --workdir /work" in said and said.endswith("\n1000\n"), said
    refused = f"{entry} yaongi run tiny --workdir /opt/work 2>&1; echo exit code $?"
    said = ask("run", TRAINER_IMAGE, "sh", "-c", refused)
    assert re.search(r"/opt/work/\S+ cannot be written here; .*\nexit code 2$", said), said


@each_image
def test_the_bill_of_materials_is_what_pip_and_dpkg_say(image: str, tmp_path: Path) -> None:
    debian = {tuple(line.split()) for line in ask("run", image, "dpkg-query", "-W").splitlines()}
    subprocess.run([sys.executable, ROOT / "docker" / "sbom.py", image, tmp_path / "image.cdx.json"], check=True)
    text = (tmp_path / "image.cdx.json").read_text()
    bill, written = json.loads(text), ROOT / "dist" / "sbom" / f"{image.rpartition('/')[2].partition(':')[0]}.cdx.json"
    if written.exists() and json.loads(written.read_text())["metadata"] == bill["metadata"]:
        assert written.read_text() == text, "the bill written when this image was built"
    found: dict[str, set[tuple[str, str]]] = {"pypi": set(), "deb": set()}
    for component in bill["components"]:
        kind = component.get("purl", ":/").split(":")[1].split("/")[0]
        found.setdefault(kind, set()).add((component["name"], component["version"]))
    python = packages_of_pip(image, "--python /opt/yaongi/bin/python") | packages_of_pip(image, "")
    print(f"{image}: {len(found['pypi'])} Python and {len(found['deb'])} Debian packages")
    assert found["pypi"] == python and len(python) > 50
    assert found["deb"] == {(name.partition(":")[0], version) for name, version in debian}
    assert not re.search(r"https?://(?!cyclonedx\.org)|file:|/opt/|/root|/home", text), "no host, no path"
