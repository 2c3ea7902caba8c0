"""The report as received by a browser: one file, valid ids, escaped text, correct numbers; also of unfinished runs."""

import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from made_run import make_run, write_metrics

from trainer import evaluate, export
from trainer.errors import ForeseenError
from trainer.report import compact, duration, write_report
from trainer.report.charts import LINE, MAX_POINTS, _averaged, line_chart
from trainer.report.settings import dates

VOID = {"meta", "br", "img", "link"}


class Page(HTMLParser):
    """Checks nesting; collects ids, references and visible text."""

    def __init__(self, html):
        super().__init__()
        self.ids, self.references, self.text, self._open = [], [], [], []
        self.feed(html)
        assert not self._open, f"left open: {self._open}"

    def handle_starttag(self, tag, attributes):
        if tag not in VOID:
            self._open.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            elif name in ("href", "src", "xlink:href"):
                self.references.append(value)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self._open.pop()

    def handle_endtag(self, tag):
        assert self._open and self._open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    prompts = ["다리 강물", "<script>alert(1)</script>"]
    evaluation = {"max_tokens": 60, "prompts": prompts, "sample_tokens": 4}
    spec, _ = make_run(tmp_path_factory.mktemp("report"), evaluate=evaluation)
    write_metrics(spec, 200)
    result = evaluate.run(spec)
    manifest = export.run(spec)
    return spec, result, manifest, (Path(spec.run_dir) / "report.html").read_text(encoding="utf-8")


def test_stands_alone_and_is_well_formed(run):
    page = Page(run[3])
    assert all(reference.startswith("#") for reference in page.references)
    assert "url(http" not in run[3] and "@import" not in run[3]
    assert len(page.ids) == len(set(page.ids))
    assert {reference[1:] for reference in page.references} <= set(page.ids)
    assert set(re.findall(r"url\(#([^)]+)\)", run[3])) <= set(page.ids)


def test_shows_the_numbers(run):
    _, result, manifest, html = run
    text = " ".join(Page(html).text)
    assert f"{result['all']['bits_per_byte']:.3f}" in text
    assert f"{manifest['parameters']:,}" in text
    assert "61.0" not in text and "60.94%" in text  # 156 of 256 tokens from ko, asked for 50%
    assert "50.0%" in text and "CC0-1.0" in text
    assert manifest["checkpoint_digest"] in text
    assert all(digest in text for digest in manifest["data"].values())
    assert "200" in text and "51,200" in text  # steps and tokens


def test_shows_hyperparameters_and_dates(run):
    spec, _, _, html = run
    cells = [text.strip() for text in Page(html).text if text.strip()]
    shown = dict(pairwise(cells))
    assert f"{spec.batch.tokens_per_step:,} tokens per step" in shown["batch"]
    assert f"learning rate {spec.optimizer.muon.learning_rate:g}" in shown["Muon"]
    assert shown["schedule"].startswith(f"WSD, warm-up {spec.schedule.warmup_fraction:.3g}")
    assert all(re.fullmatch(r"20\d\d-\d\d-\d\d \d\d:\d\d UTC", shown[what]) for what in ("last step", "evaluated"))
    assert "started" not in shown  # this run was made without an entrypoint, which counts starts


def test_a_start_is_the_first_of_all_nodes(tmp_path):
    (tmp_path / "restarts.json").write_text('{"nodes": {"b": {"first_start": 90}, "a": {"first_start": 61}}}')
    assert dates(tmp_path) == [("started", "1970-01-01 00:01 UTC")]
    (tmp_path / "restarts.json").write_text('{"nodes": {"a": {"first_start": 3600, "begun": 60}}}')
    assert dates(tmp_path) == [("started", "1970-01-01 00:01 UTC")], "not that of the last resume"
    (tmp_path / "restarts.json").write_text("{")
    assert dates(tmp_path) == []


def test_text_of_the_model_is_text(run):
    assert "다리 강물" in run[3]
    assert "<script>" not in run[3] and "&lt;script&gt;" in run[3]


def test_run_that_has_only_begun(tmp_path):
    spec, _ = make_run(tmp_path)
    html = write_report(spec.run_dir).read_text(encoding="utf-8")
    Page(html)
    assert "No step has been trained yet" in html and "Held-out quality" not in html
    write_metrics(spec, 1)
    Page(write_report(spec.run_dir).read_text(encoding="utf-8"))


def test_line_that_is_being_written_is_left_out(tmp_path):
    spec, _ = make_run(tmp_path)
    write_metrics(spec, 7)
    with (Path(spec.run_dir) / "logs" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')
    text = "".join(Page(write_report(spec.run_dir).read_text(encoding="utf-8")).text)
    assert "1,792" in text  # 7 steps of 256 tokens


@pytest.mark.parametrize(("name", "content"), [("eval.json", "{"), ("logs/metrics.jsonl", "{]\n")])
def test_damaged_file_is_an_error(tmp_path, name, content):
    spec, _ = make_run(tmp_path)
    write_metrics(spec, 3)
    (Path(spec.run_dir) / name).write_text(content)
    with pytest.raises(ForeseenError, match=name.split("/")[-1]) as caught:
        write_report(spec.run_dir)
    assert caught.value.code == 66


def test_shards_out_of_reach(tmp_path):
    spec, _ = make_run(tmp_path)
    Path(spec.tokens.shards).rename(tmp_path / "away")
    assert "not reachable from here" in write_report(spec.run_dir).read_text(encoding="utf-8")


def test_long_run_stays_small(tmp_path):
    spec, _ = make_run(tmp_path)
    write_metrics(spec, 20_000)
    assert write_report(spec.run_dir).stat().st_size < 400_000


def line(svg):
    """Path of the drawn line."""
    (path,) = re.findall(rf'<path d="([^"]*)" clip-path="[^"]*" style="fill: none; stroke: {LINE}', svg)
    return path


def test_chart_is_proportional_to_the_values():
    values = [1.0, 3.0, 2.0, 5.0, 4.0]
    path = line(line_chart(range(5), values, title="t", name="n", smooth=False))
    x, y = np.array([tuple(map(float, pair)) for pair in re.findall(r"[ML] ([-\d.]+) ([-\d.]+)", path)]).T
    assert np.allclose(np.diff(x), x[1] - x[0])
    # SVG counts downwards
    assert np.allclose(np.diff(y) / (y[1] - y[0]), np.diff(values) / (values[1] - values[0]), atol=1e-3)


@pytest.mark.parametrize(("points", "lines"), [(19, 1), (20, 2), (120, 2)])
def test_a_noisy_curve_is_smoothed_once_it_has_points(points, lines):
    values = 2 + (-1.0) ** np.arange(points)
    svg = line_chart(range(points), list(values), title="t", name="n")
    drawn = re.findall(rf'<path d="([^"]*)" clip-path="[^"]*" style="fill: none; stroke: {LINE}', svg)
    assert len(drawn) == lines
    heights = [[float(y) for y in re.findall(r"[ML] [-\d.]+ ([-\d.]+)", path)] for path in drawn]
    spread = [max(found) - min(found) for found in heights]
    assert lines == 1 or spread[1] < spread[0] / 2


def test_missing_value_is_a_gap():
    assert line(line_chart(range(5), [1.0, 2.0, None, 4.0, 5.0], title="t", name="n", smooth=False)).count("M") == 2


def test_long_run_is_averaged():
    values = np.array([block + offset for block in range(MAX_POINTS) for offset in (-1.0, 0.0, 1.0)])
    values[4] = np.nan  # the mean of the other two of its block is still 1
    values[9:12] = np.nan
    x, y = _averaged(np.arange(len(values), dtype=float), values)
    assert np.array_equal(x, np.arange(0, len(values), 3))
    expected = np.arange(MAX_POINTS, dtype=float)
    expected[3] = np.nan
    np.testing.assert_allclose(y, expected)


@pytest.mark.parametrize(
    ("seconds", "text"), [(4.25, "4.2 s"), (90, "1 min 30 s"), (3 * 3600 + 720, "3 h 12 min"), (200_000, "2 d 7 h")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_compact():
    assert [compact(v) for v in (0.5, 999, 1234, 4_198_000_000)] == ["0.5", "999", "1.23 k", "4.2 B"]


def test_reading_json_needs_no_torch():
    code = "import sys, trainer.report; sys.exit('torch' in sys.modules)"
    import subprocess
    import sys

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_evaluation_of_the_page_is_the_files(run):
    spec, result, _, _ = run
    assert json.loads((Path(spec.run_dir) / "eval.json").read_text(encoding="utf-8"))["all"] == result["all"]
