"""The parts of a run's page as values for its template."""

from __future__ import annotations

from collections import Counter
from typing import Any

from trainer.data.enough import end_of, stages_of
from trainer.data.mixture import Mixture
from trainer.recording.goodput import CLASSES, restarts_of
from trainer.recording.results import headline_loss, loss_of
from trainer.report.run import Run
from trainer.report.words import compact, duration, moment, share

MOST_SAMPLES = 6  # checkpoints of which texts are shown


def facts(run: Run) -> list[tuple[str, str, str]]:
    """(label, value, unit or remark) of the tiles on top."""
    spec, last = run.spec, run.steps[-1] if run.steps else None
    tiles = []
    if last:
        tiles.append(("Steps", f"{last['step']:,}", f"of {spec.steps:,}"))
        tiles.append(("Tokens", compact(last["tokens"]), f"{last['tokens']:,}"))
        loss, loss_steps = headline_loss(run.steps)
        if loss is not None:
            first = run.steps[0]["loss"]
            since = f", from {first:.3f}" if first else ""
            tiles.append(("Loss", f"{loss:.3f}", f"nats/token, {loss_of(loss_steps)}{since}"))
    if run.evaluation:
        overall = run.evaluation["all"]
        tiles.append(("Held-out", f"{overall['bits_per_byte']:.3f}", "bits per byte, all domains"))
    tiles.append(("Parameters", compact(run.parameters), f"{run.parameters:,}"))
    if run.result:
        tiles.append(("Speed", compact(run.result["tokens_per_second"]), "tokens/s, mean"))
    if seconds := sum(run.goodput.values()):
        ranks = run.result["world_size"] if run.result else 0
        remark = f", {ranks} rank{'s' * (ranks != 1)}" if ranks else ""
        tiles.append(
            ("Wall time", duration(seconds), f"{share(run.goodput.get('step', 0) / seconds)} training{remark}")
        )
    if run.result or run.causes:
        number = run.result["restarts"] if run.result else sum(run.causes.values())
        tiles.append(("Restarts", str(number), ""))
    return tiles


def ledger(run: Run) -> list[dict[str, Any]]:
    """Target and consumed tokens of each source so far, planned ones of the whole run, epochs and licence.

    The target follows the weights of all stages of the curriculum up to here; `available` and `epochs` are None where
    the shards are not reachable.
    """
    spec, tokens = run.spec, run.tokens
    consumed = run.steps[-1]["by_source"] if run.steps else {}
    names = list(spec.tokens.mix)
    mixture = Mixture(names, stages_of(spec.tokens.mix, spec.tokens.curriculum))

    def wanted(trained: int) -> list[float]:
        position = end_of(0, trained, spec.tokens.skip)
        return [trained * each / mixture.scale / position for each in mixture.entitled(position)]

    targets = wanted(tokens) if tokens else [0.0] * len(names)
    planned = wanted(spec.steps * spec.batch.tokens_per_step)
    rows = []
    for name, target, plan in zip(names, targets, planned, strict=True):
        there = run.shards.counts(name, "train").tokens if run.shards else 0
        used = consumed.get(name, 0)
        rows.append(
            {
                "name": name,
                "weight": spec.tokens.mix[name].weight,
                "target": target,
                "consumed": used,
                "share": used / tokens if tokens else 0.0,
                "target_share": target / tokens if tokens else spec.tokens.mix[name].weight,
                "planned": plan,
                "available": there or None,
                "epochs": used / there if there else None,
                "max_epochs": spec.tokens.mix[name].max_epochs,
                "source": run.sources.get(name),
            }
        )
    return rows


def time_spent(run: Run) -> list[tuple[str, str, float, float]]:
    """(class, its meaning, seconds, share) of the wall time; the shares sum to 1."""
    seconds = run.goodput
    whole = sum(seconds.values())
    return [(name, CLASSES.get(name, ""), value, value / whole) for name, value in seconds.items()]


def restarts(run: Run) -> tuple[list[dict[str, str]], list[tuple[str, int]]]:
    """What is known of each restart; and causes with their numbers, also of restarts that no process has recorded."""
    listed = [
        {
            "when": moment(each.started),
            "reason": each.reason,
            "reached": f"{each.reached:,}",
            "from_step": f"{each.from_step:,}",
            "lost": duration(each.lost) if each.lost else "–",
            "down": duration(each.down),
        }
        for each in restarts_of(run.processes)
    ]
    return listed, Counter(run.causes).most_common()


def samples(run: Run) -> list[tuple[str, list[tuple[str, str]]]]:
    """For each prompt, the texts by checkpoint: of validations during training and of the evaluation.

    Of many validations some are shown, evenly spaced, the first and the last among them.
    """
    chosen = [line for line in run.validations if line.get("samples")]
    if run.evaluation and run.evaluation["samples"]:
        evaluated = run.evaluation
        chosen = [line for line in chosen if line["step"] != evaluated["step"]]
        chosen.append({"step": evaluated["step"], "samples": evaluated["samples"]})
        chosen.sort(key=lambda line: line["step"])
    if len(chosen) > MOST_SAMPLES:
        last = len(chosen) - 1
        chosen = [chosen[round(n * last / (MOST_SAMPLES - 1))] for n in range(MOST_SAMPLES)]
    found: dict[str, list[tuple[str, str]]] = {}
    for line in chosen:
        for sample in line["samples"]:
            found.setdefault(sample["prompt"], []).append((f"step {line['step']:,}", sample["text"]))
    return list(found.items())


def scale(values: list[float]) -> float:
    """The largest value, for the lengths of bars; 1 without any."""
    return max(values, default=0.0) or 1.0
