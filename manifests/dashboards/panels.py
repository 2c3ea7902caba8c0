"""The style of panels, and how they select metrics.

`metric("loss")` accepts only metrics of trainer/recording/metrics.py and adds the selectors of the template variables.
All expressions use it, so no dashboard can query a metric that is not exported. Charts sum over pods and instances, so
that a recreated pod continues the curve of its predecessor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, table, timeseries
from grafana_foundation_sdk.models import common as looks
from grafana_foundation_sdk.models import dashboard as model
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from manifests.alerts import ALERTS, RUNBOOKS
from trainer.recording.metrics import BY_NAME, PREFIX

DATASOURCE = model.DataSourceRef(type_val="prometheus", uid="${datasource}")
OF_RUN = 'namespace=~"$namespace", run=~"$run"'
OF_STEPS = 'namespace=~"$namespace", run=~"$pipeline"'  # a step only has the run id of its pipeline
OF_SERVERS = 'namespace=~"$namespace", run=~"$server"'  # the release of the chart

Panel = timeseries.Panel | stat.Panel | table.Panel
Limit = tuple[str, float]
"""A colour and the value from which it applies."""


@dataclass(frozen=True)
class Query:
    """A PromQL expression and the name of its series, with labels as `{{label}}`."""

    expression: str
    legend: str = "{{run}}"


def metric(name: str, suffix: str = "", **labels: str) -> str:
    """Selector of one of our metrics for the chosen runs, and the chosen ranks where it has a rank.

    Args:
        suffix: `_bucket`, `_sum` or `_count` of a histogram.
        labels: exact matches of further labels.
    """
    known = BY_NAME[name]
    assert (known.kind == "histogram") == bool(suffix), f"{name} is a {known.kind}"
    assert set(labels) <= set(known.labels), f"{name} has the labels {known.labels}"
    chosen = {"trainer": OF_RUN, "evaluation": OF_RUN, "server": OF_SERVERS}.get(known.processes[0], OF_STEPS)
    matchers = [chosen, *(f'{label}="{value}"' for label, value in labels.items())]
    if known.per_rank:
        matchers.append('rank=~"$rank"')
    return f"{PREFIX}{name}{suffix}{{{', '.join(matchers)}}}"


def rate(name: str, suffix: str = "", **labels: str) -> str:
    return f"rate({metric(name, suffix, **labels)}[$__rate_interval])"


def chart(
    title: str,
    description: str,
    unit: str,
    *queries: Query,
    width: int = 8,
    stacked: bool = False,
    logarithmic: bool = False,
    limits: Sequence[Limit] = (),
    least: float | None = None,
    most: float | None = None,
    alerts: Sequence[str] = (),
) -> timeseries.Panel:
    """Curves over time.

    Args:
        limits: drawn as dashed lines.
        least, most: ends of the axis.
        alerts: the related alerts; the panel links to their runbooks.
    """
    panel = timeseries.Panel().title(title).description(description).unit(unit).span(width).height(8)
    panel.datasource(DATASOURCE).targets(_targets(queries)).thresholds(_thresholds(limits)).links(_runbooks(alerts))
    legend = common.VizLegendOptions().display_mode(looks.LegendDisplayMode.LIST)
    panel.legend(legend.placement(looks.LegendPlacement.BOTTOM).show_legend(True).calcs([]))
    panel.tooltip(common.VizTooltipOptions().mode(looks.TooltipDisplayMode.MULTI).sort(looks.SortOrder.DESCENDING))
    panel.line_width(1).show_points(looks.VisibilityMode.NEVER).fill_opacity(50 if stacked else 0)
    if stacked:
        panel.stacking(common.StackingConfig().mode(looks.StackingMode.NORMAL).group("A"))
    if logarithmic:
        panel.scale_distribution(common.ScaleDistributionConfig().type(looks.ScaleDistribution.LOG).log(10))
    if limits:
        panel.thresholds_style(common.GraphThresholdsStyleConfig().mode(looks.GraphTresholdsStyleMode.DASHED))
    if least is not None:
        panel.min(least)
    if most is not None:
        panel.max(most)
    return panel


def number(
    title: str,
    description: str,
    unit: str,
    query: Query,
    *,
    width: int = 4,
    limits: Sequence[Limit] = (),
    decimals: int | None = None,
    words: Sequence[str] = (),
) -> stat.Panel:
    """The newest value of each series in large type, on the colour of the limit it has passed.

    Args:
        words: shown for the values 0, 1, …
    """
    panel = stat.Panel().title(title).description(description).unit(unit).span(width).height(4)
    panel.datasource(DATASOURCE).targets(_targets([query])).thresholds(_thresholds(limits))
    panel.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]).values(False).fields(""))
    panel.graph_mode(looks.BigValueGraphMode.NONE).text_mode(looks.BigValueTextMode.AUTO)
    panel.color_mode(looks.BigValueColorMode.BACKGROUND if limits else looks.BigValueColorMode.NONE)
    if words:
        meanings = {str(value): model.ValueMappingResult(text=word, index=value) for value, word in enumerate(words)}
        panel.mappings([model.ValueMap(options=meanings)])
    return panel if decimals is None else panel.decimals(decimals)


def facts(title: str, description: str, expression: str, *, hidden: Sequence[str], width: int = 24) -> table.Panel:
    """A table of series labels (for series whose value means nothing), one row each, without the `hidden` labels."""
    panel = table.Panel().title(title).description(description).unit("none").span(width).height(5)
    target = prometheus.Dataquery().expr(expression).instant().format(PromQueryFormat.TABLE).legend_format("{{run}}")
    panel.datasource(DATASOURCE).with_target(target.ref_id("A").datasource(DATASOURCE)).show_header(True)
    panel.thresholds(_thresholds(()))
    left_out = dict.fromkeys(["Time", "Value", "__name__", "instance", "job", "endpoint", "container", *hidden], True)
    without = model.DataTransformerConfig(id_val="organize", options={"excludeByName": left_out})
    return panel.with_transformation(without)


def _targets(queries: Sequence[Query]) -> list[prometheus.Dataquery]:
    return [
        prometheus.Dataquery()
        .expr(query.expression)
        .range()
        .legend_format(query.legend)
        .ref_id(chr(ord("A") + number))
        .datasource(DATASOURCE)
        for number, query in enumerate(queries)
    ]


def _runbooks(alerts: Sequence[str]) -> list[dashboard.DashboardLink]:
    """The chart adds the URL prefix of the runbooks, as for the alerts."""
    known = {alert.name: alert for alert in ALERTS}
    return [
        dashboard.DashboardLink(f"Runbook: {name}")
        .type(model.DashboardLinkType.LINK)
        .url(f"{RUNBOOKS}/{known[name].runbook}")
        .target_blank(True)
        for name in alerts
    ]


def _thresholds(limits: Sequence[Limit]) -> dashboard.ThresholdsConfig:
    steps = [model.Threshold(value=None, color="green" if limits else "text")]
    steps += [model.Threshold(value=value, color=color) for color, value in limits]
    return dashboard.ThresholdsConfig().mode(model.ThresholdsMode.ABSOLUTE).steps(steps)
