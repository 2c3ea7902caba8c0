"""Prefixes of the lines in a step's log that are parsed by `yaongi logs`, `status` and the progress display."""

from __future__ import annotations

import re

MOVED = "metrics of the steps: port "  # not the usual one
STARTED, DONE = "▶ ", "✓ "
FAILED = re.compile(r"error (?P<code>\d+): (?P<message>.*)")
