"""Print the Debian and Python packages of an image as JSON.

Runs inside the image, so it uses only the standard library.
"""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
from importlib.metadata import Distribution, distributions

FIELDS = ("Package", "Version", "Architecture")


def debian() -> list[list[str]]:
    """Name, version and architecture of each installed package; empty without dpkg."""
    wanted = "\\t".join(f"${{{field}}}" for field in FIELDS)
    command = ["dpkg-query", "--show", "--showformat", f"${{db:Status-Status}}\\t{wanted}\\n"]
    try:
        lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    except FileNotFoundError:
        return []
    return [line.split("\t")[1:] for line in lines if line.startswith("installed\t")]


def licence(distribution: Distribution) -> str | None:
    """The SPDX expression if the package has one, else a short name; None if the metadata holds a full licence text."""
    metadata = distribution.metadata
    if expression := metadata.get("License-Expression"):
        return expression
    classified = [
        line.rpartition(" :: ")[2] for line in metadata.get_all("Classifier", []) if line.startswith("License")
    ]
    text = metadata.get("License") or ""
    return text if 0 < len(text) < 60 and "\n" not in text else next(iter(classified), None)


def python() -> list[list[str | None]]:
    """Name, version and licence of the packages of this environment and of its base Python."""
    ask = [sys._base_executable, "-c", "import json, sys; print(json.dumps(sys.path))"]
    below = json.loads(subprocess.run(ask, check=True, capture_output=True, text=True).stdout)
    found = {}
    for distribution in distributions(path=[*sys.path, *below]):
        name = re.sub(r"[-_.]+", "-", distribution.metadata["Name"]).lower()
        found[name, distribution.version] = [name, distribution.version, licence(distribution)]
    return [found[key] for key in sorted(found)]


system = platform.freedesktop_os_release()
print(
    json.dumps(
        {
            "system": [system["ID"], system["VERSION_ID"]],
            "debian": sorted(debian()),
            "python": [["python", platform.python_version(), "PSF-2.0"], *python()],
        }
    )
)
