"""Refuse a wheel that lacks a file of the packages (presets, sample texts, templates, notices) or contains other files.

python check_wheel.py dist/yaongi-0.1.0-py3-none-any.whl      (from the root of the sources)
"""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

PACKAGES = ("pipelines", "components", "manifests", "trainer")
# Files for people to apply, upload or use in an editor, and sources of the dashboards: no installed code reads them.
NOT_PACKED = (
    "manifests/base/",
    "manifests/dashboards/",
    "manifests/examples/",
    "manifests/job.schema.json",
    "pipelines/pretrain.yaml",
)


def main(wheel: str) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = set(archive.namelist())
    sources = [path for package in PACKAGES for path in Path(package).rglob("*") if path.is_file()]
    wanted = {str(path) for path in sources if path.suffix != ".pyc" and not str(path).startswith(NOT_PACKED)}
    if missing := sorted(wanted - packed):
        sys.exit(f"{wheel} lacks {', '.join(missing)}; add them to [tool.setuptools.package-data] in pyproject.toml")
    if extra := sorted(name for name in packed - wanted if not name.partition("/")[0].endswith(".dist-info")):
        sys.exit(f"{wheel} holds {', '.join(extra)}; leave them out in [tool.setuptools] of pyproject.toml")
    print(f"{wheel}: all {len(wanted)} files of {', '.join(PACKAGES)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
