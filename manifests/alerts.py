"""Alerts and recording rules for Prometheus. Pure; `manifests.generate` writes them.

Series have the labels `namespace`, `pod`, `job` and `run`, added by the scraper (manifests/monitors.py). A recreated
pod begins new series, so comparisons with a run's past use series recorded by run. These end with the run's last
process: an alert that looks back checks with `alive` whether the run still has a process.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from manifests.kinds import Object
from manifests.names import APP, STEP_APP, Task

RUNBOOKS = "docs/runbooks"
_RUN = "namespace, run"
_RANK = "namespace, run, pod, rank"
_STEP_POD = "namespace, run, pod"
_TARGETS = f'up{{job=~"{APP}|{STEP_APP}"}}'
_LAUNCHED = "|".join(get_args(Task))

# Shares above which an alert fires; the dashboards draw the same lines.
MOST_DATA_WAIT = 0.25  # of a rank's time in its steps
MOST_STARVED_EXPERTS = 0.25  # of a layer's experts
MOST_FP8_OVERFLOWS = 0.01  # of the tensors cast
MOST_MEMORY = 0.95  # of the rank's limit

PROGRESS = "run:yaongi_progress:ratio"
LOSS = "run:yaongi_loss:max"
RESTARTS = "run:yaongi_restarts:sum"
STEP_SECONDS = "rank:yaongi_step_seconds:mean"
OWN_SECONDS = "rank:yaongi_own_seconds:mean10m"

RECORDED: dict[str, str] = {
    PROGRESS: f"max by ({_RUN}) (yaongi_step) / max by ({_RUN}) (yaongi_planned_steps)",
    LOSS: f"max by ({_RUN}) (yaongi_loss)",
    RESTARTS: f"sum by ({_RUN}) (max by ({_RUN}, reason) (yaongi_restarts_total))",
    # Since the process started, so that it stays defined while no step is done.
    STEP_SECONDS: f"sum by ({_RANK}) (yaongi_step_seconds_sum) / sum by ({_RANK}) (yaongi_step_seconds_count)",
    OWN_SECONDS: f"sum by ({_RANK}) (rate(yaongi_own_seconds_total[10m]))"
    f" / sum by ({_RANK}) (rate(yaongi_step_seconds_count[10m]))",
}


@dataclass(frozen=True)
class Alert:
    """One alert; `name` in CamelCase without prefix; `lasting`: how long it must be true before it fires.

    `description` may hold Prometheus templates.
    """

    name: str
    severity: Literal["critical", "warning"]
    expression: str
    lasting: str
    summary: str
    description: str

    @property
    def runbook(self) -> str:
        """File of its runbook in docs/runbooks."""
        words = "".join(f"-{letter.lower()}" if letter.isupper() else letter for letter in self.name)
        return f"{words.removeprefix('-')}.md"


def alive(expression: str) -> str:
    """The expression, limited to runs that have a process now."""
    return f"({expression}) and on ({_RUN}) {PROGRESS}"


ALERTS: tuple[Alert, ...] = (
    Alert(
        "HeartbeatStale",
        "critical",
        f"time() - max by ({_RANK}) (yaongi_heartbeat_timestamp_seconds) > 300 + 10 * {STEP_SECONDS}",
        "1m",
        "A rank has stopped making progress.",
        "Rank {{ $labels.rank }} of {{ $labels.run }} finished its last step {{ $value | humanizeDuration }} ago. When "
        "one rank hangs, all others wait for it: the cause is the rank that does not respond or logs nothing.",
    ),
    Alert(
        "NoProgress",
        "critical",
        f"(max_over_time({PROGRESS}[30m]) > 0 < 1) <= max_over_time({PROGRESS}[30m] offset 30m)",
        "10m",
        "A run has made no progress for half an hour.",
        "{{ $labels.run }} is at {{ $value | humanizePercentage }} of its steps, as it was half an hour ago: it hangs, "
        "or restarts and repeats the same steps.",
    ),
    Alert(
        "NonFinite",
        "critical",
        f'sum by ({_RUN}) (increase(yaongi_skipped_steps_total{{reason="nonfinite"}}[10m])) >= 3',
        "0m",
        "Loss or gradients are not finite.",
        "{{ $labels.run }} skipped {{ $value | humanize }} steps in 10 minutes because loss or gradient norm was NaN "
        "or infinite. After several in a row the run ends with exit code 70.",
    ),
    Alert(
        "LossSpike",
        "warning",
        alive(
            f"avg_over_time({LOSS}[5m]) > 1.15 * avg_over_time({LOSS}[30m] offset 5m) or sum by ({_RUN}) "
            '(increase(yaongi_skipped_steps_total{reason=~"loss_spike|gradient_spike"}[15m])) >= 3'
        ),
        "2m",
        "The loss has jumped.",
        "The loss of {{ $labels.run }} is clearly above that of the half hour before, or it keeps skipping spikes "
        "({{ $value | humanize }}).",
    ),
    Alert(
        "RestartStorm",
        "critical",
        f"(increase({RESTARTS}[30m]) and on ({_RUN}) last_over_time({RESTARTS}[5m])) >= 3"
        f" or sum by ({_STEP_POD}, task) (increase(yaongi_job_pod_restarts_total[30m])) >= 3",
        "0m",
        "A run keeps restarting.",
        "{{ $labels.run }} restarted {{ $value | humanize }} times in half an hour. Without progress it soon reaches "
        "its restart limit and ends with exit code 71.",
    ),
    Alert(
        "CheckpointTooOld",
        "warning",
        f"time() - max by ({_RUN}) (yaongi_checkpoint_last_success_timestamp_seconds)"
        f" > 600 + 2 * max by ({_RUN}) (yaongi_checkpoint_interval_steps) * max by ({_RUN}) ({STEP_SECONDS})",
        "5m",
        "A run's newest checkpoint is older than twice the interval.",
        "{{ $labels.run }} would lose the work of {{ $value | humanizeDuration }} if it were stopped now.",
    ),
    Alert(
        "CheckpointFailing",
        "warning",
        alive(f"sum by ({_RUN}) (increase(yaongi_checkpoint_failures_total[1h])) > 0"),
        "0m",
        "A checkpoint could not be saved.",
        "{{ $labels.run }} failed to save a checkpoint and continues; the previous checkpoint remains the newest.",
    ),
    Alert(
        "DataStall",
        "warning",
        f'sum by ({_RANK}) (rate(yaongi_phase_seconds_total{{phase="data"}}[10m])) / sum by ({_RANK}) '
        '(rate(yaongi_phase_seconds_total{phase=~"data|forward_backward|optimizer|device"}[10m])) > '
        f"{MOST_DATA_WAIT}",
        "10m",
        "A rank waits for data.",
        "Rank {{ $labels.rank }} of {{ $labels.run }} spends {{ $value | humanizePercentage }} of its steps waiting "
        "for tokens.",
    ),
    Alert(
        "Straggler",
        "warning",
        f"{OWN_SECONDS} / on ({_RUN}) group_left () quantile by ({_RUN}) (0.5, {OWN_SECONDS}) > 1.4 and "
        f"{OWN_SECONDS} - on ({_RUN}) group_left () quantile by ({_RUN}) (0.5, {OWN_SECONDS}) > 0.1 * {STEP_SECONDS}",
        "10m",
        "A rank is slower than the others, which all wait for it.",
        "Rank {{ $labels.rank }} of {{ $labels.run }} (pod {{ $labels.pod }}) takes {{ $value | humanize }} times as "
        "long as the median for data and forward passes.",
    ),
    Alert(
        "ExpertCollapse",
        "warning",
        alive(f"max by ({_RUN}) (avg_over_time(yaongi_expert_starved_ratio[15m])) > {MOST_STARVED_EXPERTS}"),
        "15m",
        "Many experts get almost no tokens.",
        "In one layer of {{ $labels.run }}, {{ $value | humanizePercentage }} of the experts got less than a tenth of "
        "the mean load.",
    ),
    Alert(
        "Fp8Overflow",
        "warning",
        f"sum by ({_RANK}) (rate(yaongi_fp8_overflows_total[15m])) / (max by ({_RANK}) (yaongi_fp8_tensors)"
        f" * sum by ({_RANK}) (rate(yaongi_step_seconds_count[15m]))) > {MOST_FP8_OVERFLOWS}",
        "10m",
        "FP8 casts clamp too often.",
        "On rank {{ $labels.rank }} of {{ $labels.run }}, {{ $value | humanizePercentage }} of the FP8 tensors of a "
        "step exceeded the range of their delayed scale.",
    ),
    Alert(
        "MemoryNearLimit",
        "warning",
        f"max by ({_RANK}, place) (yaongi_memory_bytes) / max by ({_RANK}, place) (yaongi_memory_limit_bytes)"
        f" > {MOST_MEMORY}",
        "2m",
        "A rank is close to its memory limit.",
        "Rank {{ $labels.rank }} of {{ $labels.run }} has used {{ $value | humanizePercentage }} of its "
        "{{ $labels.place }} memory; beyond the limit it is killed (137) or ends (162).",
    ),
    Alert(
        "QueueWait",
        "warning",
        f'max by ({_STEP_POD}, task) (yaongi_job_phase_seconds_total{{phase="queued"}}) > 1800 and '
        f'max by ({_STEP_POD}, task) (yaongi_job_phase{{phase="queued"}}) == 1',
        "1m",
        "A job has been queued for half an hour.",
        "The {{ $labels.task }} job of {{ $labels.run }} in {{ $labels.namespace }} has waited for nodes for "
        "{{ $value | humanizeDuration }}.",
    ),
    Alert(
        "LeaseRenewalFailing",
        "critical",
        f'sum by ({_STEP_POD}) (increase(yaongi_lease_renewals_total{{outcome="failed"}}[2m])) >= 2',
        "0m",
        "The launcher cannot renew a run's lease.",
        "The launcher {{ $labels.pod }} cannot write to the checkpoints volume; if this lasts for half a minute, its "
        "run saves a checkpoint and ends with exit code 75.",
    ),
    Alert(
        "DataStepStalled",
        "warning",
        f"time() - max by ({_STEP_POD}, stage) "
        f'(yaongi_stage_heartbeat_timestamp_seconds{{stage!~"{_LAUNCHED}"}}) > 1800',
        "1m",
        "A data step has made no progress for half an hour.",
        "The step {{ $labels.stage }} (pod {{ $labels.pod }}) last made progress {{ $value | humanizeDuration }} ago.",
    ),
    Alert(
        "TargetDown",
        "critical",
        f"{_TARGETS} == 0 and max_over_time({_TARGETS}[1h]) == 1",
        "1m",
        "A process no longer answers Prometheus.",
        "Pod {{ $labels.pod }} of {{ $labels.run }} exists but serves no metrics: its process is stopped, starved of "
        "CPU, or hangs in the kernel.",
    ),
)


def rule_groups(runbooks: str = RUNBOOKS, without: tuple[str, ...] = ()) -> Object:
    """A Prometheus rules file.

    Args:
        runbooks: folder or URL of docs/runbooks, the prefix of the alerts' `runbook_url`.
        without: names of alerts to leave out.
    """
    recorded = [{"record": name, "expr": expression} for name, expression in RECORDED.items()]
    alerts = [
        {
            "alert": f"Yaongi{alert.name}",
            "expr": alert.expression,
            "for": alert.lasting,
            "labels": {"severity": alert.severity},
            "annotations": {
                "summary": alert.summary,
                "description": alert.description,
                "runbook_url": f"{runbooks.rstrip('/')}/{alert.runbook}",
            },
        }
        for alert in ALERTS
        if alert.name not in without
    ]
    return {"groups": [{"name": "yaongi-recorded", "rules": recorded}, {"name": "yaongi-alerts", "rules": alerts}]}


def prometheus_rule(labels: dict[str, str], runbooks: str = RUNBOOKS) -> Object:
    """The rules as an object for the Prometheus operator, which selects it by `labels`."""
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "yaongi", "labels": dict(labels)},
        "spec": rule_groups(runbooks),
    }
