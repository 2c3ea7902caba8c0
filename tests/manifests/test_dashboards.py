"""The committed dashboards: complete, with only our metrics, and with all of them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from itertools import combinations
from typing import Any

import pytest

from manifests.alerts import ALERTS, RUNBOOKS
from manifests.dashboards.query import View, dashboards, event_queries, panels, substituted, targets
from trainer.recording.metrics import METRICS, PREFIX

DASHBOARDS = dashboards()
each = pytest.mark.parametrize("content", DASHBOARDS.values(), ids=DASHBOARDS)


def expressions(content: dict[str, Any]) -> list[str]:
    found = [target.expression for panel in panels(content) for target in targets(panel)]
    return found + list(event_queries(content).values())


def test_there_are_four_and_they_are_the_generated_ones() -> None:
    pytest.importorskip("grafana_foundation_sdk")
    from manifests.dashboards import files

    generated = {name.removesuffix(".json"): json.loads(text) for name, text in files().items()}
    assert set(generated) == {"training", "data", "cluster", "serving"}
    assert generated == DASHBOARDS, "run python -m manifests.generate and commit what it wrote"


def test_all_our_metrics_are_shown_and_no_others() -> None:
    shown = set()
    for content in DASHBOARDS.values():
        for panel in panels(content):
            for target in targets(panel):
                shown |= set(re.findall(rf"{PREFIX}\w+", target.expression))
    ours = {PREFIX + metric.name: metric for metric in METRICS}
    parts = {
        f"{name}_{part}": name
        for name, metric in ours.items()
        if metric.kind == "histogram"
        for part in ("bucket", "sum", "count")
    }
    assert {parts.get(name, name) for name in shown} == set(ours)


@each
def test_panels_say_what_they_show_in_which_unit(content: dict[str, Any]) -> None:
    for panel in panels(content):
        where = panel["title"]
        assert panel["description"].endswith("."), where
        assert panel["fieldConfig"]["defaults"]["unit"], where
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}, where
        for target in panel["targets"]:
            assert target["legendFormat"] and target["datasource"] == panel["datasource"], where
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"]), where


@each
def test_panels_have_ids_of_their_own_and_do_not_overlap(content: dict[str, Any]) -> None:
    everything = content["panels"]
    assert len({panel["id"] for panel in everything}) == len(everything)
    places = [panel["gridPos"] for panel in everything]
    for place in places:
        assert place["x"] >= 0 and place["x"] + place["w"] <= 24
    for a, b in combinations(places, 2):
        apart = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        assert apart or a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"], (a, b)
    rows = {place["y"]: 0 for place in places}
    for place in places:
        rows[place["y"]] += place["w"]
    assert set(rows.values()) == {24}, "a row of panels leaves a hole"


@each
def test_nothing_is_invented_where_there_is_no_data(content: dict[str, Any]) -> None:
    for expression in expressions(content):
        assert not re.search(r"vector\s*\(|absent|\bor\b", expression), expression


@each
def test_every_variable_is_used_and_every_use_is_a_variable(content: dict[str, Any]) -> None:
    variables = [variable["name"] for variable in content["templating"]["list"]]
    assert variables[0] == "datasource"
    assert len(set(variables)) == len(variables)
    view = View(start=0, end=3600, scrape_interval=15, chosen={"run": ["a-1", "b.2"]})
    for expression in expressions(content):
        assert "$" not in substituted(expression, view)
        of_run = r'namespace=~"\$namespace", run=~"\$(run|pipeline|server)"'
        assert len(re.findall(of_run, expression)) == expression.count("{"), (
            "the choice of a run changes it only in part"
        )
    for name in variables[1:]:
        assert any(f"${name}" in expression for expression in expressions(content)), name


@each
def test_events_are_marked_and_dashboards_lead_to_each_other(content: dict[str, Any]) -> None:
    assert set(event_queries(content)) == {"Restarts", "Checkpoints", "Alerts"}
    (link,) = [link for link in content["links"] if link["type"] == "dashboards"]
    assert link["includeVars"] and link["keepTime"]
    for other in DASHBOARDS.values():
        assert set(link["tags"]) <= set(other["tags"])


def test_a_table_of_labels_hides_what_says_nothing() -> None:
    (panel,) = [panel for content in DASHBOARDS.values() for panel in panels(content) if panel["type"] == "table"]
    (organized,) = panel["transformations"]
    assert organized["id"] == "organize" and organized["options"]["excludeByName"]["Value"] is True


def test_every_alert_is_explained_beside_what_it_watches() -> None:
    links = [link for content in DASHBOARDS.values() for panel in panels(content) for link in panel.get("links", [])]
    linked = {link["url"] for link in links}
    assert linked == {f"{RUNBOOKS}/{alert.runbook}" for alert in ALERTS}


def test_uids_last() -> None:
    """Bookmarks and links to dashboards depend on these."""
    uids = {name: content["uid"] for name, content in DASHBOARDS.items()}
    assert uids == {name: f"yaongi-{name}" for name in ("training", "data", "cluster", "serving")}
    assert all(len(uid) <= 40 for uid in uids.values())  # Grafana's limit


@each
def test_grafanas_own_model_reads_them_without_loss(content: dict[str, Any]) -> None:
    pytest.importorskip("grafana_foundation_sdk")
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.cog.plugins import register_default_plugins
    from grafana_foundation_sdk.models.dashboard import Dashboard

    register_default_plugins()
    again = json.loads(json.dumps(Dashboard.from_json(content), cls=JSONEncoder))
    for annotation in content["annotations"]["list"]:  # the model lacks what is the data source's own
        for key in ("titleFormat", "textFormat", "tagKeys", "useValueForTime"):
            annotation.pop(key, None)
    assert again == content


def test_variables_are_replaced_as_grafana_does() -> None:
    view = View(start=0, end=1200, scrape_interval=15, chosen={"run": ["a-1", "b.2"], "rank": "0"})
    assert view.step == 15
    expression = 'rate(x{run=~"$run", rank=~"${rank}", namespace=~"$namespace"}[$__rate_interval]) + y[$__range]'
    assert substituted(expression, view) == (
        'rate(x{run=~"(a\\-1|b\\.2)", rank=~"0", namespace=~".*"}[60s]) + y[1200s]'
    )
    with pytest.raises(ValueError, match=r"nothing replaces \$job"):
        substituted('x{job="$job"}', view)


def test_what_runs_does_not_need_the_generators_package() -> None:
    code = (
        "import sys; sys.modules['grafana_foundation_sdk'] = None\n"
        "import manifests.generate, manifests.dashboards.query, pipelines.cli, components.launch.kubernetes"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
