"""The common parts of the dashboards: variables, links, annotations, and rows of panels as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from grafana_foundation_sdk.builders import dashboard
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import dashboard as model

from manifests.dashboards.panels import DATASOURCE, OF_RUN, Panel, metric
from trainer.recording.metrics import PREFIX

TAG = "yaongi"
EVERYTHING = model.VariableOption(selected=True, text=["All"], value=["$__all"])


@dataclass(frozen=True)
class Row:
    title: str
    panels: Sequence[Panel]


def build(
    uid: str,
    title: str,
    description: str,
    rows: Sequence[Row],
    *,
    variables: Sequence[str] = ("run", "pipeline", "rank"),
) -> dict[str, Any]:
    """The JSON model of a dashboard, for Grafana or a ConfigMap.

    Args:
        uid: permanent id, used in links.
        variables: what can be chosen besides the data source and the namespace: run, pipeline, rank, server.
    """
    made = dashboard.Dashboard(title).uid(uid).description(description).tags([TAG]).time("now-6h", "now").refresh("30s")
    made.tooltip(model.DashboardCursorSync.CROSSHAIR).timezone("browser").editable()
    made.variables(_variables(variables)).annotations(_annotations())
    others = dashboard.DashboardLink("yaongi").type(model.DashboardLinkType.DASHBOARDS).tags([TAG])
    made.link(others.icon("external link").include_vars(True).keep_time(True).as_dropdown(False))
    number = 0
    for row in rows:
        made.with_row(dashboard.Row(row.title).id(number := number + 1))
        for panel in row.panels:
            made.with_panel(panel.id(number := number + 1))
    content: dict[str, Any] = json.loads(json.dumps(made.build(), cls=JSONEncoder))
    for annotation, more in zip(content["annotations"]["list"], _ANNOTATION_TEXTS, strict=True):
        annotation.update(more)
    return content


def _variables(names: Sequence[str]) -> list[dashboard.DatasourceVariable | dashboard.QueryVariable]:
    """By default all are selected, even series without the label, such as those of a Prometheus on a workstation."""
    source = dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus")
    queries = {
        "namespace": f'label_values({{__name__=~"{PREFIX}.+"}}, namespace)',
        "run": f'label_values({PREFIX}build_info{{namespace=~"$namespace"}}, run)',
        "pipeline": f'label_values({PREFIX}stage_heartbeat_timestamp_seconds{{namespace=~"$namespace"}}, run)',
        "rank": f"label_values({PREFIX}heartbeat_timestamp_seconds{{{OF_RUN}}}, rank)",
        "server": f'label_values({PREFIX}serve_running_texts{{namespace=~"$namespace"}}, run)',
    }
    chosen = [
        dashboard.QueryVariable(name)
        .label(name.capitalize())
        .datasource(DATASOURCE)
        .query({"query": query, "refId": name})
        .refresh(model.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(model.VariableSort.NUMERICAL_ASC if name == "rank" else model.VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(EVERYTHING)
        for name, query in queries.items()
        if name in ("namespace", *names)
    ]
    return [source, *chosen]


def _annotations() -> list[dashboard.AnnotationQuery]:
    # A restarted process may be another instance after a pause, so compare the current number with the one before.
    restarts = metric("restarts_total")
    before = f"last_over_time({restarts}[1h] offset $__rate_interval)"
    restarted = f"max by (run, reason) ({restarts}) > max by (run, reason) ({before})"
    # Until a process has saved one, the time is its start time and there is no duration.
    saved_at, duration = metric("checkpoint_last_success_timestamp_seconds"), metric("checkpoint_seconds")
    saved = f"1000 * max by (run) ({saved_at} and {duration})"
    firing = f'ALERTS{{alertname=~"Yaongi.+", alertstate="firing", {OF_RUN}}}'
    events = (("Restarts", restarted, "orange"), ("Checkpoints", saved, "blue"), ("Alerts", firing, "red"))
    return [
        dashboard.AnnotationQuery().name(name).datasource(DATASOURCE).expr(expression).enable(True).icon_color(color)
        for name, expression, color in events
    ]


# A field of the Prometheus data source that the SDK's annotation model lacks.
_ANNOTATION_TEXTS = (
    {"titleFormat": "restart", "textFormat": "{{run}} restarted: {{reason}}", "tagKeys": "run,reason"},
    {"titleFormat": "checkpoint", "textFormat": "{{run}} saved", "tagKeys": "run", "useValueForTime": True},
    {"titleFormat": "{{alertname}}", "textFormat": "{{run}} {{severity}}", "tagKeys": "run,severity"},
)
