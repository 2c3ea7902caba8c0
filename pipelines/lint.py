"""`yaongi lint`: the traps in any PyTorchJob or TrainJob manifest, each with its effect and its fix."""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from trainer.errors import SpecError

if TYPE_CHECKING:
    from manifests.lint.check import Result
    from manifests.lint.registry import Rule

STDIN = "-"
COLOURS = {"error": "bold red", "warning": "yellow"}


class Format(StrEnum):
    HUMAN = "human"
    JSON = "json"


def lint(
    files: Annotated[
        list[str] | None, typer.Argument(metavar="FILE…", help="YAML or JSON manifests; - for stdin.")
    ] = None,
    format: Annotated[Format, typer.Option(help="human, or one JSON object.")] = Format.HUMAN,
    trainer_version: Annotated[str, typer.Option(help="Kubeflow Trainer to check TrainJobs for: 2.0 to 2.3.")] = "2.3",
    rules: Annotated[bool, typer.Option("--rules", help="List all rules with their reasons.")] = False,
    explain: Annotated[str, typer.Option(metavar="RULE", help="Explain one rule.")] = "",
) -> None:
    """Find the traps in PyTorchJob and TrainJob manifests, ours or not. Exit code 1: errors; 2: unreadable."""
    from manifests.lint.check import lint as check
    from manifests.lint.fields import TRAINER_VERSIONS
    from manifests.lint.registry import RULES

    console = Console(highlight=False, soft_wrap=True)
    if rules or explain:
        for rule in [_rule(explain)] if explain else RULES.values():
            _explain(rule, console)
        return
    if not files:
        raise SpecError("no FILE to check; name manifests, or - for stdin")
    if trainer_version not in TRAINER_VERSIONS:
        raise SpecError(f"--trainer-version {trainer_version} is not one of {', '.join(TRAINER_VERSIONS)}")
    result = check({name: _read(name) for name in files}, trainer_version)
    if format is Format.JSON:
        counts = {"objects": result.objects, "jobs": result.jobs, "errors": result.errors}
        print(json.dumps({**counts, "findings": [asdict(finding) for finding in result.findings]}, indent=2))
    else:
        _show(result, console)
    if result.errors:
        raise typer.Exit(1)


def _read(name: str) -> str:
    try:
        return sys.stdin.read() if name == STDIN else Path(name).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise SpecError(f"{name}: is not UTF-8 text; give YAML or JSON manifests") from None
    except IsADirectoryError:
        raise SpecError(f"{name}: is a folder; name the files in it, {name}/*.yaml") from None
    except OSError as error:
        raise SpecError(f"{name}: cannot be read ({error.strerror})") from None


def _rule(id: str) -> Rule:
    from difflib import get_close_matches

    from manifests.lint.registry import RULES

    if id not in RULES:
        nearest = get_close_matches(id, RULES, 1)
        hint = f"did you mean '{nearest[0]}'?" if nearest else "yaongi lint --rules lists them"
        raise SpecError(f"there is no rule '{id}'; {hint}")
    return RULES[id]


def _explain(rule: Rule, console: Console) -> None:
    console.print(Text.assemble((rule.severity, COLOURS[rule.severity]), " ", (rule.id, "bold")))
    console.print(Text(f"    why: {rule.why}\n    fix: {rule.fix}"))


def _show(result: Result, console: Console) -> None:
    explained: set[str] = set()
    for finding in result.findings:
        console.print(
            Text.assemble(
                f"{finding.source}:{finding.line}: ",
                (finding.severity, COLOURS[finding.severity]),
                " ",
                (finding.rule, "bold"),
                f": {finding.what} ({finding.object}, {finding.path})",
            )
        )
        if finding.rule not in explained:  # once is enough for many containers
            console.print(Text(f"    why: {finding.why}\n    fix: {finding.fix}", style="dim"))
            explained.add(finding.rule)
    if not result.jobs:
        console.print(f"no PyTorchJob, TrainJob or training runtime among {result.objects} objects")
        return
    counts = Counter(finding.severity.value for finding in result.findings)
    told = ", ".join(f"{counts[kind]} {kind}{'s' * (counts[kind] != 1)}" for kind in ("error", "warning"))
    console.print(f"{result.jobs} job{'s' * (result.jobs != 1)} checked: {told if result.findings else 'clean'}")
