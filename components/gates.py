"""Gates of a job (`train.evaluate.gate`) that cannot be decided after the training, said before it."""

from __future__ import annotations

from manifests.spec import JobSpec
from trainer import gate
from trainer.errors import SpecError
from trainer.evaluation.scores import LOGICKOR
from trainer.gatespec import BENCHMARKS, HELDOUT


def check(job: JobSpec) -> None:
    """Refuse gates on metrics that will not be measured, and baselines that are not there.

    Raises:
        SpecError: one line for each gate.
    """
    spec = job.train_spec()
    domains = {source.domain for source in job.data.sources.values()}
    asked = {task.task for task in spec.evaluate.benchmarks} | ({LOGICKOR} if spec.evaluate.judge else set())
    problems = []
    for number, each in enumerate(spec.evaluate.gate):
        kind, _, name = each.metric.partition(".")
        problem = gate.problem_before(each, spec.run_dir)
        if kind in HELDOUT and name not in (*domains, gate.ALL):
            problem = f"metric {each.metric}: no source has domain {name}; there are {', '.join(sorted(domains))}"
        if kind == BENCHMARKS and not any(task.partition("/")[0] in asked for task, _ in gate.splits(name)):
            there = ", ".join(sorted(asked)) or "none"
            problem = f"metric {each.metric}: train.evaluate asks for no such task; it asks for {there}"
        if problem:
            problems.append(f"{gate.FIELD}[{number}]: {problem}")
    if problems:
        raise SpecError("\n".join(problems))
