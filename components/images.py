"""Default image of the data steps: a pipeline parameter replaces it for a run, the environment for an installation."""

from __future__ import annotations

import os

VERSION = "0.1.0"
PIPELINE_IMAGE = os.environ.get("YAONGI_PIPELINE_IMAGE", f"localhost/yaongi-pipeline:{VERSION}")
