"""Write the bill of materials of an image as CycloneDX 1.6 JSON, from what inventory.py printed in it.

    docker/image.sh run IMAGE … | python sbom.py IMAGE REVISION CREATED TARGET

The same image gives the same bytes. It names packages, versions and licences: no hosts, no paths.
"""

from __future__ import annotations

import json
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


def bom(image: str, revision: str, created: str, inventory: Inventory) -> Bom:
    """Bill of an image `NAME:TAG` that was built from `revision` of the sources at `created` (ISO 8601)."""
    name, _, tag = image.rpartition("/")[2].partition(":")
    about = Component(type=ComponentType.CONTAINER, name=name, version=tag, bom_ref="image")
    about.properties.add(Property(name="org.opencontainers.image.revision", value=revision))
    content = json.dumps([image, revision, inventory], sort_keys=True)
    found = Bom(
        components=components(inventory),
        metadata=BomMetaData(component=about, timestamp=datetime.fromisoformat(created)),
        serial_number=uuid.uuid5(uuid.NAMESPACE_URL, content),
    )
    found.register_dependency(about, found.components)
    return found


def main(image: str, revision: str, created: str, target: str) -> None:
    text = JsonV1Dot6(bom(image, revision, created, json.load(sys.stdin))).output_as_string(indent=1)
    if error := JsonStrictValidator(SchemaVersion.V1_6).validate_str(text):
        sys.exit(f"{target}: not CycloneDX 1.6: {error}")
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    Path(target).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
