"""`yaongi compare` on runs of version 0.1 and copies of them that differ."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import former
import pytest

from pipelines import compare
from trainer.report.comparison import Result, labels, results
from trainer.report.run import read_run


class Text(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(html)

    def handle_data(self, data: str) -> None:
        self.found.append(data)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return former.unpack(tmp_path)


def rewritten(file: Path, change: Callable[[dict], object]) -> None:
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for line in lines:
        change(line)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def better(run: Path) -> Path:
    """A copy with half the loss and bits per byte, a benchmark, and another learning rate and name."""
    copy = run.with_name("other-00000001")
    shutil.copytree(run, copy)
    rewritten(copy / "logs" / "metrics.jsonl", lambda line: line.update(loss=line["loss"] / 2))
    for name in ("train.yaml", "job.yaml"):
        text = (copy / name).read_text().replace(former.RUN, copy.name)
        (copy / name).write_text(re.sub(r"(muon:\n +learning_rate: )\S+", r"\g<1>0.0625", text))
    evaluation = json.loads((copy / "eval.json").read_text())
    for scores in (*evaluation["domains"].values(), evaluation["all"]):
        scores["bits_per_byte"] /= 2
    number = {"value": 0.25, "stderr": 0.0125, "higher_is_better": True}
    evaluation["benchmarks"] = {"kobest": {"metrics": {"acc": number}, "num_fewshot": 5, "samples": 10, "version": "1"}}
    (copy / "eval.json").write_text(json.dumps(evaluation))
    validations = [
        {"step": step, "tokens": 64 * step, "domains": {"en": {"bits_per_byte": 9 - step}}} for step in (4, 8)
    ]
    (copy / "validation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in validations))
    return copy


def test_tables_and_page(run: Path, better: Path, yaongi: Callable[..., tuple[int, str, str]], tmp_path: Path):
    code, said, _ = yaongi("compare", former.RUN, "other", "--output", "pages/two.html")
    assert code == 0
    rows = {re.split(r"\s{2,}", line.strip())[0]: re.split(r"\s{2,}", line.strip())[1:] for line in said.splitlines()}
    old, new = read_run(run), read_run(better)
    assert old.evaluation is not None and new.evaluation is not None
    assert rows["final loss nats/token"] == [f"{each.steps[-1]['loss']:.3f}" for each in (old, new)]
    for domain in old.evaluation["domains"]:
        scores = [each["domains"][domain]["bits_per_byte"] for each in (old.evaluation, new.evaluation)]
        assert rows[f"held-out, {domain} bits per byte"] == [f"{score:.3f}" for score in scores]
    assert rows["kobest acc"] == ["–", "0.250 ± 0.013"]
    assert rows["train.optimizer.muon.learning_rate"][1] == "0.0625"
    assert len([name for name in rows if name.startswith("train.")]) == 1, "names and folders are no difference"

    html = (tmp_path / "pages" / "two.html").read_text(encoding="utf-8")
    assert not re.search(r"url\(|@import|https?://|src=|fetch\(", html)
    text = " ".join(" ".join(Text(html).found).split())
    for part in ("Training loss", "Validation: en", "Throughput", "Differences of the specs", former.RUN, better.name):
        assert part in text
    (loss,) = re.findall(r"<figure.*?</figure>", html, re.DOTALL)[:1]
    drawn = dict(re.findall(r'class="line c\d" data-name="([^"]*)" d="([^"]*)"', loss))
    assert list(drawn) == [former.RUN, better.name]
    low, high = map(float, re.findall(r'data-range="\S+ \S+ (\S+) (\S+)"', loss)[0])
    for name, each in ((former.RUN, old), (better.name, new)):
        heights = [float(y) for y in re.findall(r"[ML]\S+ ([-\d.]+)", drawn[name])]
        values = [high - y / 1000 * (high - low) for y in heights]
        assert values == pytest.approx([line["loss"] for line in each.steps], abs=1e-3)


def test_the_best_run_of_a_row(run: Path, better: Path):
    runs = [read_run(run), read_run(better)]
    found = {row.label: row for row in results(runs)}
    assert found["final loss"].best == 1 and found["held-out, all domains"].best == 1
    assert found["kobest"].best is None, "only one run has it"
    assert found["tokens"].best is None, "more tokens are not better"
    assert found["final loss"].changes()[1] == f"−{runs[1].steps[-1]['loss']:.3f}"
    assert {row.best for row in results([runs[0], runs[0]])} == {None}
    assert labels([runs[0], runs[0]]) == [f"{former.RUN} in {run.parent}"] * 2


def test_names_are_no_markup(capsys: pytest.CaptureFixture[str]):
    """Folders, tasks and metrics may have brackets."""
    row = Result("own[/x]", "f1[red]", (1.0, 2.0), ("1", "2"), "higher")
    compare._show(["a in /work[/old]", "b"], [row], "job.yaml", [])
    said = capsys.readouterr().out
    assert "a in /work[/old]" in said and "own[/x] f1[red]" in said


def test_runs_without_jobs_are_compared_by_their_training(
    run: Path, better: Path, yaongi: Callable[..., tuple[int, str, str]], tmp_path: Path
):
    moved = tmp_path / "copies" / "of-a-volume"
    shutil.copytree(better, moved)
    (moved / "job.yaml").unlink()
    code, said, _ = yaongi("compare", str(run), str(moved))
    assert code == 0 and "differs in train.yaml" in said and (tmp_path / "compare.html").is_file()
    assert re.search(r"^ optimizer.muon.learning_rate .* 0.0625", said, re.MULTILINE)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([former.RUN], "is only one run; name at least two"),
        ([former.RUN, f"work/checkpoints/runs/{former.RUN}"], "are the same run"),
        ([former.RUN, "nobody"], "no run 'nobody' in work; known: micro"),
        ([former.RUN, "new"], "has no trained step in logs/metrics.jsonl yet; train it first: yaongi resume new"),
        ([former.RUN, "other", "--output", "job.yaml/page.html"], "cannot be written"),
        (
            [former.RUN, "other", "--output", f"work/checkpoints/runs/{former.RUN}/job.yaml"],
            "is a file that is no page",
        ),
    ],
)
def test_bad_input_is_one_line(
    run: Path, better: Path, yaongi: Callable[..., tuple[int, str, str]], arguments: list[str], complaint: str
):
    new = run.with_name("new-00000002")
    new.mkdir()
    shutil.copy(run / "train.yaml", new)
    code, _, said = yaongi("compare", *arguments)
    assert code in (2, 74) and complaint in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("file", "written", "complaint"),
    [
        ("validation.jsonl", "[]\n", "line 1 lacks step and domains"),
        ("validation.jsonl", '{"step": 4, "domains": {}}\n{"step": 8}\n', "line 2 lacks step and domains"),
        ("logs/metrics.jsonl", "5\n", "line 1 lacks step"),
        ("eval.json", '{"run": "other"}', "has no 'domains'"),
    ],
)
def test_files_with_other_content_are_one_line(
    run: Path, better: Path, yaongi: Callable[..., tuple[int, str, str]], file: str, written: str, complaint: str
):
    (better / file).write_text(written)
    code, _, said = yaongi("compare", former.RUN, better.name)
    assert code == 66 and complaint in said and said.count("\n") == 1


def test_damaged_files_are_one_line(run: Path, better: Path, yaongi: Callable[..., tuple[int, str, str]]):
    (better / "logs" / "metrics.jsonl").write_text("{]\n")
    code, _, said = yaongi("compare", former.RUN, better.name)
    assert code == 66 and "a line is not JSON" in said and said.count("\n") == 1
