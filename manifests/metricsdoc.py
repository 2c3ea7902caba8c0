"""docs/metrics.md, the reference of metrics and alerts; `python -m manifests.metricsdoc` writes it (tested)."""

from __future__ import annotations

from pathlib import Path

from manifests.alerts import ALERTS, RECORDED
from manifests.names import APP, SERVER_APP, STEP_APP, STEP_METRICS_PORT
from trainer.recording.metrics import METRICS, PREFIX, Metric, Process

COMMITTED = Path(__file__).parent.parent / "docs" / "metrics.md"
SERVED: dict[Process, str] = {
    "trainer": f"Every rank, on port `train.runtime.metrics_port` (9400) + local rank. Job `{APP}` in Prometheus; "
    "values of the whole run come from rank 0, those with the label `rank` from each.",
    "evaluation": "An evaluation with [benchmarks](evaluation.md), while it measures them, on port "
    f"`train.runtime.metrics_port`. Job `{APP}`.",
    "launcher": f"The steps train, evaluate and export of the pipeline, on port {STEP_METRICS_PORT} "
    f"(YAONGI_METRICS_PORT; 0 serves none). Job `{STEP_APP}`.",
    "data": "The other steps of the pipeline, on the same port. "
    "Where several steps run on one machine at once, the first has the port.",
    "server": f"A server of an exported model ([serving](serving.md)), on its `--metrics-port`. Job `{SERVER_APP}`; "
    "the label `run` is the release of the chart.",
}
HEAD = """# Metrics

Generated from `trainer/recording/metrics.py` and `manifests/alerts.py` by `python -m manifests.metricsdoc`.

Base units, `_total` for counters, which count since the process started. No label names a run, a step or a host: the
monitors in `manifests/base/podmonitor.yaml` attach `namespace`, `pod`, `job` and `run` (of a pipeline's step the
pipeline run's id). Export, and an evaluation without benchmarks, serve no metrics of their own: they are single
processes of minutes, whose launcher tells phase and time. Alerts are explained in [runbooks](runbooks/README.md); a
Prometheus without the operator takes them from `python -m manifests.generate rules`.
"""


def reference() -> str:
    parts = [HEAD]
    for process, where in SERVED.items():
        rows = [_row(metric) for metric in METRICS if process in metric.processes]
        parts.append(
            f"## {process.capitalize()}\n\n{where}\n\n| metric | kind | labels | unit | |\n|---|---|---|---|---|\n"
        )
        parts[-1] += "".join(rows)
    alerts = "".join(
        f"| [Yaongi{alert.name}](runbooks/{alert.runbook}) | {alert.severity} | {alert.summary} |\n" for alert in ALERTS
    )
    parts.append(f"## Alerts\n\n| alert | severity | |\n|---|---|---|\n{alerts}")
    recorded = "".join(f"| `{name}` | `{expression}` |\n" for name, expression in RECORDED.items())
    parts.append(f"## Recorded series\n\n| series | expression |\n|---|---|\n{recorded}")
    return "\n".join(parts)


def _row(metric: Metric) -> str:
    labels = ", ".join((*metric.labels, *(["rank"] if metric.per_rank else [])))
    return f"| `{PREFIX}{metric.name}` | {metric.kind} | {labels} | {metric.unit} | {metric.help} |\n"


if __name__ == "__main__":
    COMMITTED.write_text(reference(), encoding="utf-8")
    print(f"wrote docs/{COMMITTED.name}")
