"""Refuse a base image whose torch the installed yaongi does not accept, as images are installed without dependencies.

python check_torch.py
"""

from __future__ import annotations

import sys
from importlib.metadata import requires, version

from packaging.requirements import Requirement


def main() -> None:
    found = version("torch")
    (accepted,) = {each.specifier for each in map(Requirement, requires("yaongi") or []) if each.name == "torch"}
    if not accepted.contains(found, prereleases=True):  # NVIDIA's images have 2.12.0a0+…
        sys.exit(f"docker/check_torch.py: the base image has torch {found}, not {accepted}; set another BASE_IMAGE")
    print("torch", found)


if __name__ == "__main__":
    main()
