"""Print as JSON which packages are in the image that this runs in: Debian's and Python's.

Runs in the image, so it uses the standard library alone.
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
    """Name, version and architecture of what is installed; none in a base without dpkg."""
    wanted = "\\t".join(f"${{{field}}}" for field in FIELDS)
    command = ["dpkg-query", "--show", "--showformat", f"${{db:Status-Status}}\\t{wanted}\\n"]
    try:
        lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    except FileNotFoundError:
        return []
    return [line.split("\t")[1:] for line in lines if line.startswith("installed\t")]


def licence(distribution: Distribution) -> str | None:
    """SPDX where the package says so; a licence's whole text is none."""
    metadata = distribution.metadata
    if expression := metadata.get("License-Expression"):
        return expression
    classified = [
        line.rpartition(" :: ")[2] for line in metadata.get_all("Classifier", []) if line.startswith("License")
    ]
    text = metadata.get("License") or ""
    return text if 0 < len(text) < 60 and "\n" not in text else next(iter(classified), None)


def python() -> list[list[str | None]]:
    """Name, version and licence of what this environment has and the Python below it."""
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
