"""What the lines of a step's log begin with that others read: `yaongi logs`, `status`, the progress of a run."""

from __future__ import annotations

import re

MOVED = "metrics of the steps: port "  # not the usual one
STARTED, DONE = "▶ ", "✓ "
FAILED = re.compile(r"error (?P<code>\d+): (?P<message>.*)")
