"""Checks before the first step, so that an unusable node is reported by name within seconds.

Each node's entrypoint looks at its volumes, shared memory and GPUs; once the ranks have met, they look at their own
GPU, at the links between them and at their clocks (`ranks`). A check that fails ends the start with an exit code of
trainer/exitcodes.py; one that only found something slow or suspicious warns. Results become metrics.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

from trainer.errors import ForeseenError
from trainer.exitcodes import retryable
from trainer.preflight import fabric, gpus, storage
from trainer.preflight.measured import Measured
from trainer.process.failures import node_name
from trainer.spec import TrainSpec

log = logging.getLogger(__name__)

VARIABLE = "YAONGI_PREFLIGHT"  # the entrypoint's findings, for the ranks, which have the metrics server


@dataclass(frozen=True)
class Finding:
    """One check that did not fail: how long it took, and what it measured."""

    check: str
    seconds: float
    text: str
    bytes_per_second: float | None = None
    warning: str | None = None


def of_node(spec: TrainSpec) -> list[Finding]:
    """Check this node; the findings are also left in the environment, for `of_entrypoint`.

    Raises:
        SpecError, DataError, VolumeError, GpuError: shared memory or driver, shards, a volume, GPUs.
    """
    limits = spec.runtime.preflight
    if not limits.enabled:
        return []
    findings = run(
        {
            "datasets": lambda: storage.readable(spec.tokens, limits.min_read_mb_per_second),
            "checkpoints": lambda: storage.writable(spec, limits.min_write_mb_per_second),
            "shared_memory": lambda: storage.shared_memory(limits.min_shared_memory_gib),
            "gpus": lambda: gpus.visible(spec.runtime.device),
            "locked_memory": lambda: fabric.locked_memory(limits.fabric),
        }
    )
    os.environ[VARIABLE] = json.dumps([asdict(finding) for finding in findings])
    return findings


def of_entrypoint() -> list[Finding]:
    """What `of_node` has found in the process that started this one."""
    return [Finding(**finding) for finding in json.loads(os.environ.get(VARIABLE, "[]"))]


def run(checks: Mapping[str, Callable[[], Measured]]) -> list[Finding]:
    """Run every check, log one line for each finding, and a summary.

    Raises:
        ForeseenError: the error of the most significant failed check, a permanent one if there is any.
    """
    findings: list[Finding] = []
    failures: list[ForeseenError] = []
    for name, check in checks.items():
        began = time.monotonic()
        try:
            measured = check()
        except ForeseenError as error:
            failures.append(type(error)(f"preflight on node {node_name()}: {error}"))
            continue
        seconds = time.monotonic() - began
        findings.append(Finding(name, seconds, measured.text, measured.bytes_per_second, measured.warning))
        if measured.warning:
            log.warning("preflight on node %s: %s", node_name(), measured.warning)
    failures.sort(key=lambda error: retryable(error.code))
    for further in failures[1:]:
        log.error("%s", further)
    if failures:
        raise failures[0]
    told = ", ".join(finding.text for finding in findings if finding.text)
    log.info("preflight on node %s: %s (%.1f s)", node_name(), told, sum(finding.seconds for finding in findings))
    return findings
