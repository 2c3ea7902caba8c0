"""The report as received by a browser: one file, valid ids, escaped text, correct numbers; also of unfinished runs."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import former
import numpy as np
import pytest
from made_run import make_run, write_metrics, write_validations

from trainer import evaluate, export
from trainer.errors import ForeseenError
from trainer.recording.goodput import Process
from trainer.report import render, update_report, write_report
from trainer.report.charts import MAX_POINTS, Line, _averaged, line_chart, ticks
from trainer.report.curves import curves
from trainer.report.run import read_run
from trainer.report.sections import ledger, samples
from trainer.report.settings import dates
from trainer.report.words import compact, duration

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
    write_validations(spec, range(50, 250, 50))
    result = evaluate.run(spec)
    manifest = export.run(spec)
    return spec, result, manifest, (Path(spec.run_dir) / "report.html").read_text(encoding="utf-8")


def test_stands_alone_and_is_well_formed(run):
    page = Page(run[3])
    assert all(reference.startswith("#") for reference in page.references)
    assert not re.search(r"url\(|@import|https?://|fetch\(|\bimport\b", run[3])
    assert len(page.ids) == len(set(page.ids))
    assert {reference[1:] for reference in page.references} <= set(page.ids)
    sections = {"spec", "data", "training", "validation", "evaluation", "samples", "time", "restarts", "provenance"}
    assert sections == set(page.ids)


def test_shows_what_was_proven_and_the_trial(run):
    kernel = {"format": "bf16", "version": "2.3.2", "passed": True, "outcome": "within 1.0e-03 of its reference"}
    wrong = {"passed": False, "outcome": "outputs differ by 1.0e-01 of the reference's, 3e-02 is allowed"}
    rows = [
        {"change": "as proven", "seconds": 0.0125, "verdict": "without a trial"},
        {"change": "precision: bf16", "seconds": None, "verdict": "fails"},
    ]
    proof = {
        "kernels": [
            kernel | {"operation": "ssd", "backend": "mamba_ssm", "package": "mamba_ssm", "used": True},
            kernel
            | {"operation": "conv", "backend": "causal_conv1d", "package": "causal_conv1d", "used": False}
            | wrong,
        ],
        "made": 2,
        "seconds": 42.0,
        "remarks": ["node-1: <nothing> is compared"],
        "chosen": {"precision": "fp8", "ssd": "mamba_ssm"},
        "precision": "proven by te",
        "reasons": {"ssd": "Triton kernels of mamba_ssm"},
        "trial": {"rows": rows, "seconds": 61.0},
    }
    read = read_run(run[0].run_dir)
    page = Page(render(replace(read, proof=proof)))
    assert {"kernels", "trial"} <= set(page.ids) and not {"kernels", "trial"} & set(Page(run[3]).ids)
    text = " ".join(" ".join(page.text).split())
    assert "ssd mamba_ssm bf16 mamba_ssm 2.3.2 within 1.0e-03 of its reference yes" in text
    assert "outputs differ by 1.0e-01 of the reference's, 3e-02 is allowed –" in text
    assert "node-1: <nothing> is compared" in text and "as proven 12.50 without a trial" in text
    assert "precision: bf16 – fails" in text and "ssd mamba_ssm Triton kernels of mamba_ssm" in text
    without = Page(render(replace(read, proof=proof | {"trial": None})))
    assert "trial" not in without.ids and "kernels" in without.ids


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
    cells = cells[cells.index("Hyperparameters") + 1 :]
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


def test_ledger_has_target_and_consumed_tokens_and_epochs(run):
    spec, _, _, html = run
    tokens = read_run(spec.run_dir).shards.counts("ko", "train").tokens
    row = re.search(r"<tr><td>ko</td>.*?</tr>", html, re.DOTALL)[0]
    cells = [" ".join(re.sub(r"<[^>]*>", "", cell).split()) for cell in re.findall(r"<td.*?</td>", row, re.DOTALL)]
    planned = spec.steps * spec.batch.tokens_per_step / 2  # of which this run has made more steps
    assert cells[2:4] == ["50.0%", "60.94%"] and cells[5:7] == ["25,600", f"{156 * 200:,}"]
    assert cells[7] == compact(planned)
    assert cells[8] == f"{156 * 200 / tokens:.3g} of {spec.tokens.mix['ko'].max_epochs:g}"


def test_a_curriculum_moves_the_targets(tmp_path):
    stage = {"from_tokens": 512, "weights": {"ko": 1.0, "en": 0.0}}
    spec, _ = make_run(tmp_path, tokens={"curriculum": [stage]})
    write_metrics(spec, 4)
    targets = {row["name"]: row["target"] for row in ledger(read_run(spec.run_dir))}
    assert targets == {"ko": 256 + 512, "en": 256}


def test_samples_of_several_checkpoints(run):
    spec, result, _, html = run
    shown = dict(samples(read_run(spec.run_dir)))["다리 강물"]
    assert [when for when, _ in shown] == ["step 12", "step 50", "step 100", "step 150", "step 200"]
    assert shown[1][1] == " 50 texts" and shown[0][1] == result["samples"][0]["text"]
    assert " 150 texts" in html


def test_only_the_last_validation_of_a_step_that_was_trained_again_counts(tmp_path):
    spec, _ = make_run(tmp_path)
    write_metrics(spec, 120)
    file = write_validations(spec, [50, 100, 150, 50])
    file.write_text(file.read_text().replace("50 texts", "old texts", 1))
    found = read_run(spec.run_dir).validations
    assert [line["step"] for line in found] == [50, 100], "step 150 has not been trained"
    assert found[0]["samples"][0]["text"] == " 50 texts"


def test_classes_of_the_wall_time_sum_to_all_of_it(tmp_path):
    spec, _ = make_run(tmp_path)
    write_metrics(spec, 8)
    processes = [
        Process(100.0, 160.0, 0, 6, {"startup": 40.0, "step": 15.0, "data_wait": 1.0}),
        Process(200.0, 230.0, 4, 8, {"startup": 20.0, "step": 4.0, "checkpoint": 3.0}, 5.0, {"out_of_memory": 1}),
    ]
    entries = {"processes": [vars(process) for process in processes]}
    (Path(spec.run_dir) / "goodput.json").write_text(json.dumps(entries))
    nodes = {"nodes": {"a": {"first_start": 90, "total": 1, "reasons": {"out_of_memory": 1}}}}
    (Path(spec.run_dir) / "restarts.json").write_text(json.dumps(nodes))
    html = write_report(spec.run_dir).read_text(encoding="utf-8")
    shares = {name: float(part) for name, part in re.findall(r'<i class="g-(\w+)" style="flex:([\d.]+)"', html)}
    assert sum(shares.values()) == pytest.approx(1, abs=1e-5)
    assert shares["down"] == pytest.approx(40 / 140, abs=1e-5) and shares["startup"] == pytest.approx(0.5, abs=1e-5)
    assert "100.0%" in html and "2 min 20 s" in html
    text = " ".join(" ".join(Page(html).text).split())
    assert "1970-01-01 00:03 UTC out of memory 6 4 5.0 s 40.0 s" in text and "In all: 1 × out of memory." in text


def test_text_of_the_model_is_text(run):
    assert "다리 강물" in run[3]
    assert "<script>alert" not in run[3] and "&lt;script&gt;" in run[3]


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


def test_a_task_does_not_fail_because_of_its_report(tmp_path, caplog):
    spec, _ = make_run(tmp_path)
    (Path(spec.run_dir) / "eval.json").write_text('{"all": <')
    update_report(spec.run_dir)
    assert "the report could not be made" in caplog.text
    html = (Path(spec.run_dir) / "report.html").read_text(encoding="utf-8")
    assert "eval.json" in "".join(Page(html).text)
    (Path(spec.run_dir) / "eval.json").unlink()
    update_report(spec.run_dir)
    assert "could not be made" not in (Path(spec.run_dir) / "report.html").read_text(encoding="utf-8")


def test_a_run_of_version_0_1(tmp_path):
    run = former.unpack(tmp_path)
    html = write_report(run).read_text(encoding="utf-8")
    text = " ".join(Page(html).text)
    assert "step 8" in text and "not recorded by an earlier version" in text


def test_what_differs_from_the_preset(tmp_path):
    spec, _ = make_run(tmp_path)
    value = {"preset": "tiny", "differences": [{"field": "train.steps", "preset": "300", "run": "12"}]}
    (Path(spec.run_dir) / "preset.json").write_text(json.dumps(value))
    text = " ".join(" ".join(Page(write_report(spec.run_dir).read_text(encoding="utf-8")).text).split())
    assert "differs from preset tiny preset this run train.steps 300 12" in text


def test_curves_of_all_that_was_recorded(tmp_path):
    spec, _ = make_run(tmp_path)
    write_metrics(spec, 60)
    lines = [json.loads(line) for line in (Path(spec.run_dir) / "logs" / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line["mfu"], line["auxiliary"]["mtp_1"] = 0.4, 5.0
        if line["step"] % 10 == 0:
            line["fp8"] = {"input": 10.0, "weight": 1.0, "gradient": 0.001, "overflows": line["step"]}
    (Path(spec.run_dir) / "logs" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    figures = {re.search("<figcaption>([^<]*?) <", figure)[1]: figure for figure in curves(read_run(spec.run_dir))}
    assert {"Training loss", "Router balance loss", "MFU", "FP8 amax", "FP8 overflows", "Fullest expert"} < set(figures)
    assert "Answers" not in figures, "a value that no step has gives no chart"
    assert re.findall('data-name="([^"]*)"', figures["Training loss"]) == ["next token", "2 tokens ahead"]
    assert [len(points) for points in paths(figures["FP8 amax"])] == [6, 6, 6]
    assert "M68 975v25" in figures["Training loss"], "step 5 of 1 to 60 was skipped"
    assert figures["Gradient norm"].count("975v25") == 3, "three steps were clipped"


def test_shards_out_of_reach(tmp_path):
    spec, _ = make_run(tmp_path)
    Path(spec.tokens.shards).rename(tmp_path / "away")
    assert "not reachable from here" in write_report(spec.run_dir).read_text(encoding="utf-8")


def test_long_run_stays_small(tmp_path):
    spec, _ = make_run(tmp_path)
    write_metrics(spec, 20_000)
    assert write_report(spec.run_dir).stat().st_size < 400_000


def paths(figure, kind="line"):
    """The drawn paths of a kind: points (x, y) of an SVG of 1000 by 1000 that counts downwards."""
    found = re.findall(rf'<path class="{kind} c\d"[^>]* d="([^"]*)"', figure)
    return [np.array([tuple(map(float, pair)) for pair in re.findall(r"[ML]([-\d.]+) ([-\d.]+)", d)]) for d in found]


def test_chart_is_proportional_to_the_values():
    values = [1.0, 3.0, 2.0, 5.0, 4.0]
    figure = line_chart("t", "u", [Line("n", range(5), values)])
    (points,) = paths(figure)
    left, right, bottom, top = map(float, re.search(r'data-range="([^"]*)"', figure)[1].split())
    np.testing.assert_allclose(left + points[:, 0] / 1000 * (right - left), range(5), atol=1e-3)
    np.testing.assert_allclose(top - points[:, 1] / 1000 * (top - bottom), values, atol=1e-3)
    # A label stands where its number is.
    labels = [
        (float(place), float(text)) for place, text in re.findall(r'class="y" style="top:([\d.]+)%">(\d+)<', figure)
    ]
    assert len(labels) >= 3
    for place, number in labels:
        assert top - place / 100 * (top - bottom) == pytest.approx(number, abs=1e-3)


def test_logarithmic_chart():
    (points,) = paths(line_chart("t", "u", [Line("n", range(4), [1e-3, 1e-2, 1e-1, 0.0])], log=True))
    assert len(points) == 3 and np.allclose(np.diff(points[:, 1], n=2), 0, atol=0.2)


def test_lines_share_their_axes_and_names_are_text():
    figure = line_chart("a <t>", "u", [Line("<b>", [0, 10], [1, 2]), Line("c", [5, 20], [2, 4])], x_name="token")
    first, second = paths(figure)
    assert first[1][1] == second[0][1], "both are 2"
    assert [first[1][0], second[0][0], second[1][0]] == [500, 250, 1000]
    assert "<b>" not in re.sub(r"<b>[\d.]+</b>", "", figure) and "<t>" not in figure


def test_chart_without_a_value_is_none():
    assert line_chart("t", "u", [Line("n", [1, 2], [None, float("nan")])]) == ""
    assert "NaN" not in line_chart("t", "u", [Line("n", [3], [7.0])]), "a single point has limits too"


@pytest.mark.parametrize(("points", "lines"), [(19, 1), (20, 2), (120, 2)])
def test_a_noisy_curve_is_smoothed_once_it_has_points(points, lines):
    values = 2 + (-1.0) ** np.arange(points)
    figure = line_chart("t", "u", [Line("n", range(points), list(values), smooth=True)])
    raw, (shown,) = paths(figure, "raw"), paths(figure)
    assert len(raw) == lines - 1
    assert lines == 1 or np.ptp(shown[:, 1]) < np.ptp(raw[0][:, 1]) / 2


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 10, [0, 2, 4, 6, 8, 10]), (-1, 1, [-1, -0.5, 0, 0.5, 1]), (0.0013, 0.0029, [0.0015, 0.002, 0.0025])],
)
def test_ticks_are_round_numbers(low, high, expected):
    assert ticks(low, high, 4) == pytest.approx(expected)


def test_missing_value_is_a_gap():
    figure = line_chart("t", "u", [Line("n", range(5), [1.0, 2.0, None, 4.0, 5.0])])
    assert re.search(r'class="line c0"[^>]* d="([^"]*)"', figure)[1].count("M") == 2


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


def test_parameters_are_those_of_the_export(run):
    spec, _, manifest, _ = run
    assert read_run(spec.run_dir).parameters == manifest["parameters"]


def test_evaluation_of_the_page_is_the_files(run):
    spec, result, _, _ = run
    assert json.loads((Path(spec.run_dir) / "eval.json").read_text(encoding="utf-8"))["all"] == result["all"]
