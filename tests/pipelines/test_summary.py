"""The end of `yaongi run`."""

import io
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from components.summary.step import RunSummary
from pipelines.summary import show
from trainer.evaluation.scores import Row


def test_the_command_to_try_the_model_stands_alone_on_one_line_and_fits_it():
    numbers = dict.fromkeys(("loss_first", "loss_last", "loss", "tokens_per_second", "seconds"), 1.0)
    places = {name: Path("w") / name for name in ("checkpoint", "export", "report")}
    run = RunSummary("mine-0123abcd", 1, 1, loss_steps=1, bits_per_byte={}, before={}, samples=[], **numbers, **places)
    narrow = Console(file=io.StringIO(), width=40)
    show(run, Path("w/log"), narrow, Path("a workdir that is longer than a narrow terminal"))
    command = "yaongi generate mine-0123abcd --prompt '…' --workdir 'a workdir that is longer than a narrow terminal'"
    assert narrow.file.getvalue().splitlines()[-1] == command
    show(replace(run, before={"ko": (7.1, 1.25)}), Path("w/log"), narrow, Path("w"), chat=True)
    lines = narrow.file.getvalue().splitlines()
    assert lines[-1] == "yaongi generate mine-0123abcd --chat --prompt '…' --workdir w"
    assert "held-out loss   ko 7.100 → 1.250" in lines


def test_benchmarks_are_lines_and_numbers():
    rows = [
        Row("kmmlu", "acc", 0.25, 0.004, 5, 35030, "2.0"),
        Row("gsm8k", "exact_match,strict-match", 0.5, None, 5, 9, "3"),
    ]
    numbers = dict.fromkeys(("loss_first", "loss_last", "loss", "tokens_per_second", "seconds"), 1.0)
    places = {name: Path("w") / name for name in ("checkpoint", "export", "report")}
    none = {"bits_per_byte": {}, "before": {}, "samples": []}
    run = RunSummary("mine-0123abcd", 1, 1, loss_steps=1, benchmarks=rows, **none, **numbers, **places)
    shown = [value for label, value in run.rows() if label == "benchmark"]
    assert shown == ["kmmlu acc 0.250 ± 0.004", "gsm8k exact_match,strict-match 0.500"]
    found = {name: value for name, value in run.metrics().items() if name.startswith("benchmark")}
    assert found == {"benchmark_kmmlu_acc": 0.25, "benchmark_gsm8k_exact_match_strict_match": 0.5}
