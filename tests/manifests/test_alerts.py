"""The alerts: promtool accepts the rules, each fires only when it should, and they use only metrics that exist."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import yaml
from alert_cases import CASES, Case
from tools import tool

from manifests import generate, metricsdoc
from manifests.alerts import ALERTS, RECORDED, RUNBOOKS, prometheus_rule, rule_groups
from manifests.yamltext import to_manifest
from trainer.recording.metrics import BY_NAME, PREFIX

ROOT = Path(generate.__file__).parents[1]
HEADINGS = ["Meaning", "Look at", "Likely causes", "What to do"]
OF_TARGET = {"namespace", "run", "pod", "job", "instance"}  # what the monitors attach
EXPRESSIONS = RECORDED | {alert.name: alert.expression for alert in ALERTS}
# One of ours, not a recorded name such as run:yaongi_loss:max; perhaps with matchers.
USED = re.compile(rf"(?<![\w:]){PREFIX}(\w+)(?:\{{([^}}]*)\}})?")


@pytest.fixture(scope="module")
def rules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("rules") / "rules.yaml"
    file.write_text(to_manifest([rule_groups()]), encoding="utf-8")
    return file


def promtool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([tool("promtool"), *map(str, arguments)], capture_output=True, text=True, timeout=280)


def as_unit_test(case: Case) -> dict[str, object]:
    """The case for `promtool test rules`: the series ALERTS says what fires, independent of annotations."""
    firing = f'ALERTS{{alertname="Yaongi{case.alert}", alertstate="firing"}}'
    if case.fires is None:
        looked_at = {"expr": f"count({firing})", "exp_samples": []}
    else:
        names = ", ".join(case.fires)
        told = ", ".join(f'{name}="{value}"' for name, value in case.fires.items())
        looked_at = {"expr": f"count by ({names}) ({firing})", "exp_samples": [{"labels": f"{{{told}}}", "value": 1}]}
    return {
        "name": f"{case.alert}: {case.story}",
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in case.series.items()],
        "promql_expr_test": [{**looked_at, "eval_time": f"{case.at}m"}],
    }


def test_promtool_accepts_the_rules(rules: Path) -> None:
    done = promtool("check", "rules", rules)
    assert done.returncode == 0, done.stderr
    assert f"{len(ALERTS) + len(RECORDED)} rules found" in done.stdout


def test_alerts_fire_and_keep_quiet_as_they_should(rules: Path, tmp_path: Path) -> None:
    cases = {"rule_files": [str(rules)], "evaluation_interval": "1m", "tests": [as_unit_test(case) for case in CASES]}
    file = tmp_path / "cases.yaml"
    file.write_text(yaml.safe_dump(cases, sort_keys=False), encoding="utf-8")
    done = promtool("test", "rules", file)
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_alert_has_cases_that_fire_and_that_do_not() -> None:
    names = {alert.name for alert in ALERTS}
    assert {case.alert for case in CASES if case.fires is not None} == names
    assert {case.alert for case in CASES if case.fires is None} == names


def test_annotations_come_out_with_values(rules: Path, tmp_path: Path) -> None:
    """Every template is filled in: promtool prints the actual annotations, since the test expects other ones."""
    firing = {case.alert: case for case in CASES if case.fires is not None}
    other = {"exp_alerts": [{"exp_labels": {"another": "alert"}}]}
    asked = [
        {
            **as_unit_test(case),
            "promql_expr_test": [],
            "alert_rule_test": [{"eval_time": f"{case.at}m", "alertname": f"Yaongi{case.alert}", **other}],
        }
        for case in firing.values()
    ]
    file = tmp_path / "cases.yaml"
    file.write_text(yaml.safe_dump({"rule_files": [str(rules)], "tests": asked}), encoding="utf-8")
    said = promtool("test", "rules", file)
    shown = said.stdout + said.stderr
    for alert in ALERTS:
        assert f'{RUNBOOKS}/{alert.runbook}"' in shown, alert.name
    assert "{{" not in shown and "<no value>" not in shown and "error" not in shown.lower().replace("stderr", "")


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_expressions_use_only_metrics_and_labels_that_are_exported(name: str) -> None:
    expression = EXPRESSIONS[name]
    known = set(OF_TARGET)
    for found in USED.finditer(expression):
        metric = BY_NAME.get(found[1]) or BY_NAME[re.sub(r"_(sum|count|bucket)$", "", found[1])]
        labels = {*metric.labels, *(["rank"] if metric.per_rank else [])}
        known |= labels
        assert set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", found[2] or "")) <= labels, found[0]
        counted = re.search(rf"(rate|increase)\({PREFIX}{found[1]}\b", expression)
        assert bool(counted) <= (metric.kind in ("counter", "histogram")), f"{metric.name} does not only rise"
    for recorded, source in RECORDED.items():
        if recorded in expression:
            known |= set(re.findall(r"\w+", re.findall(r"by \(([^)]*)\)", source)[0]))
    for listed in re.findall(r"(?:by|on) \(([^)]*)\)", expression):
        assert set(re.findall(r"\w+", listed)) <= known, listed


def test_the_committed_reference_is_the_generated_one() -> None:
    assert metricsdoc.COMMITTED.read_text(encoding="utf-8") == metricsdoc.reference(), (
        "run python -m manifests.metricsdoc"
    )


def test_each_recorded_series_is_used() -> None:
    for name in RECORDED:
        assert any(name in alert.expression for alert in ALERTS), name


def test_each_alert_has_a_runbook_and_no_runbook_is_left_over() -> None:
    folder = ROOT / "docs" / "runbooks"
    assert {path.name for path in folder.glob("*.md")} == {"README.md", *(alert.runbook for alert in ALERTS)}
    index = (folder / "README.md").read_text(encoding="utf-8")
    for alert in ALERTS:
        text = (folder / alert.runbook).read_text(encoding="utf-8")
        assert text.startswith(f"# Yaongi{alert.name}\n")
        assert re.findall(r"^## (.*)$", text, re.MULTILINE) == HEADINGS, alert.runbook
        assert "```" in text, f"{alert.runbook} shows no command"
        assert f"]({alert.runbook})" in index
        for used in set(re.findall(rf"\b{PREFIX}(\w+)", text)):
            assert used in BY_NAME or re.sub(r"_(sum|count|bucket)$", "", used) in BY_NAME, f"{alert.runbook}: {used}"


def test_names_and_texts() -> None:
    assert all(count == 1 for count in Counter(alert.name for alert in ALERTS).values())
    for alert in ALERTS:
        assert alert.summary.endswith(".") and "{{" not in alert.summary
        assert "{{ $labels." in alert.description, "it must say whom it is about"


def test_the_link_of_the_runbooks_can_be_set() -> None:
    (_, group) = prometheus_rule({}, "https://example.org/runbooks/")["spec"]["groups"]
    assert group["rules"][0]["annotations"]["runbook_url"] == "https://example.org/runbooks/heartbeat-stale.md"
