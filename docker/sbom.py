"""Write the bill of materials of an image as CycloneDX 1.6 JSON, from its labels and what inventory.py finds in it.

    python docker/sbom.py IMAGE TARGET

The same image gives the same bytes. The bill names packages, versions and licences, but no hosts or paths.
"""

from __future__ import annotations

import json
import subprocess
import sys
import uuid
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model import Property
from cyclonedx.model.bom import Bom, BomMetaData
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.model.license import LicenseAcknowledgement
from cyclonedx.output.json import JsonV1Dot6
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packageurl import PackageURL

HERE = Path(__file__).parent
LABEL = "org.opencontainers.image."
Inventory = dict[str, list]


def components(inventory: Inventory) -> Iterator[Component]:
    distribution, release = inventory["system"]
    yield Component(type=ComponentType.OPERATING_SYSTEM, name=distribution, version=release, bom_ref="system")
    for name, version, architecture in inventory["debian"]:
        qualifiers = {"arch": architecture, "distro": f"{distribution}-{release}"}
        yield package(PackageURL("deb", distribution, name, version, qualifiers))
    (_, python, licence), *packages = inventory["python"]
    yield package(PackageURL("generic", None, "python", python), licence)
    for name, version, licence in packages:
        yield package(PackageURL("pypi", None, name, version), licence)


def package(url: PackageURL, licence: str | None = None) -> Component:
    declared = LicenseAcknowledgement.DECLARED
    return Component(
        type=ComponentType.LIBRARY,
        name=url.name,
        version=url.version,
        purl=url,
        bom_ref=url.to_string(),
        licenses=[LicenseFactory().make_from_string(licence, license_acknowledgement=declared)] if licence else [],
    )


def bom(image: str, labels: dict[str, str], inventory: Inventory) -> Bom:
    """The bill of materials of the image `NAME:TAG`; revision and time are those of its sources."""
    name, _, tag = image.rpartition("/")[2].partition(":")
    about = Component(type=ComponentType.CONTAINER, name=name, version=tag, bom_ref="image")
    revision = labels[LABEL + "revision"]
    about.properties.add(Property(name=LABEL + "revision", value=revision))
    content = json.dumps([image, revision, inventory], sort_keys=True)
    found = Bom(
        components=components(inventory),
        metadata=BomMetaData(component=about, timestamp=datetime.fromisoformat(labels[LABEL + "created"])),
        serial_number=uuid.uuid5(uuid.NAMESPACE_URL, content),
    )
    found.register_dependency(about, found.components)
    return found


def as_json(found: Bom) -> str:
    """Raises: ValueError: it is not valid CycloneDX."""
    text = JsonV1Dot6(found).output_as_string(indent=1)
    if error := JsonStrictValidator(SchemaVersion.V1_6).validate_str(text):
        raise ValueError(f"not CycloneDX 1.6: {error}")
    return text + "\n"


def ask(verb: str, image: str, *command: str) -> str:
    return subprocess.run(
        [HERE / "image.sh", verb, image, *command], check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def main(image: str, target: str) -> None:
    labels = dict(line.split("=", 1) for line in ask("labels", image).splitlines())
    if missing := [name for name in ("revision", "created") if LABEL + name not in labels]:
        sys.exit(f"{image} lacks the label {LABEL}{missing[0]}; build it with docker/build.sh")
    inventory = ask("run", image, "/opt/yaongi/bin/python", "-c", (HERE / "inventory.py").read_text())
    text = as_json(bom(image, labels, json.loads(inventory)))
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    Path(target).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
