"""What a step of ours wrote, out of the log of its pod, which Kubeflow Pipelines fills with lines of its own."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from components.diagnose.causes import exit_meaning
from components.marks import DONE, STARTED

# klog's head, as in "I1129 15:34:29.924795      16 main.go:67] ", that of kfp's executor, and lines of Argo.
MACHINERY = re.compile(
    r"(?P<level>[IWEF])\d{4} \d\d:\d\d:\d\d\.\d+ +\d+ \S+:\d+\] |\[KFP Executor [^\]]*\]: |"
    r"time=\S+ level=\w+ msg=.* argo=true|Error: exit status \d+$"
)
ERROR = re.compile(r"error(?: \d+)?: (?P<step>[^:]+): (?P<reason>.*)")  # without a number in images before 0.2
EXIT = re.compile(r"(?P<reason>\w+) \(exit code (?P<code>\d+)\)")
OBVIOUS = re.compile(r"launcher: job \S+ succeeded \(0 restarts\)")  # the line before tells more
NO_REASON = "failed to execute component"  # follows every failure


def own(text: str) -> list[str]:
    """The step's own lines; for a step that died before its first line, all but the program and its input.

    A task may have several steps one after the other, as `data` does.
    """
    lines = text.splitlines()
    found: list[str] = []
    at = _start(lines, 0)
    while at is not None:
        name = lines[at].removeprefix(STARTED)
        end = next((later for later in range(at + 1, len(lines)) if _ends(lines[later], name)), len(lines))
        found += [line for line in lines[at : end + 1] if not MACHINERY.match(line)]
        at = _start(lines, end + 1)
    if found:
        return found
    heads = [(MACHINERY.match(line), line) for line in _without_input(lines)]
    return [line for head, line in heads if head is None or head["level"] in ("W", "E", "F")]


def last(lines: Iterable[str]) -> str:
    """The last line with content; the marks of a step's begin and end are none."""
    said = [line.strip() for line in lines if line.strip() and not line.startswith((STARTED, DONE))]
    if len(said) > 1 and OBVIOUS.fullmatch(said[-1]):
        said.pop()
    return said[-1] if said else ""


def has_ended(lines: Iterable[str]) -> bool:
    """Whether a step has written its last line."""
    return any(line.startswith(DONE) or ERROR.fullmatch(line) for line in lines)


def has_failed(lines: Iterable[str]) -> bool:
    """Whether a step has said that it failed by itself."""
    return any(ERROR.fullmatch(line) for line in lines)


def failure(lines: Sequence[str], message: str) -> str:
    """Why a step failed: its own reason, else what the backend says about it, else its last line.

    Args:
        message: of the pod's node, as `main: Error (exit code 137)`.
    """
    if errors := [match for match in map(ERROR.fullmatch, lines) if match]:
        return errors[-1]["reason"]
    exit_code = EXIT.search(message)
    heads = [(MACHINERY.match(line), line) for line in lines]
    told = [line[head.end() :] for head, line in heads if head and head["level"] in ("E", "F")]
    told = [line for line in told if NO_REASON not in line and "exit status" not in line]
    meaning = ""
    if exit_code:
        meaning = f"{exit_meaning(int(exit_code['code']), exit_code['reason'])} (exit code {exit_code['code']})"
    found = [*told[-1:], *([meaning] if meaning else [message] if message else [])]
    return "; ".join(found) or last(lines) or "it says no reason"


def _start(lines: Sequence[str], first: int) -> int | None:
    """Where the next step begins, from line `first` on."""
    return next((at for at in range(first, len(lines)) if lines[at].startswith(STARTED)), None)


def _ends(line: str, name: str) -> bool:
    failed = ERROR.fullmatch(line)
    return line.startswith(f"{DONE}{name} (") or (failed is not None and failed["step"] == name)


def _without_input(lines: Sequence[str]) -> list[str]:
    """Without the JSON document that follows `Got executor_input:`."""
    kept, inside = [], False
    for line in lines:
        inside = inside or line.endswith("Got executor_input:")
        if not inside:
            kept.append(line)
        inside = inside and line != "}"
    return kept
