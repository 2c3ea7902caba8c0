"""Is everything there that should run, what has been lost, and to what?"""

from __future__ import annotations

from typing import Any

from manifests.alerts import MOST_MEMORY
from manifests.dashboards.frame import Row, build
from manifests.dashboards.panels import OF_RUN, Query, chart, metric, number, rate


def cluster() -> dict[str, Any]:
    return build(
        "yaongi-cluster",
        "yaongi / Cluster and jobs",
        "Jobs and their phases, restarts, where the time goes, memory and scraped processes.",
        [
            Row("Now", _now()),
            Row("Jobs", _jobs()),
            Row("Where the time goes", _time()),
            Row("Checks before the start", _preflight()),
            Row("Kernels", _kernels()),
            Row("Processes", _processes()),
        ],
    )


def _now() -> list[Any]:
    useful, all_classes = metric("goodput_seconds_total", **{"class": "step"}), metric("goodput_seconds_total")
    return [
        number("Processes", "That answered the last scrape.", "short", Query(f"sum by (run) (up{{{OF_RUN}}})")),
        number(
            "Progress",
            "Steps done of those planned.",
            "percentunit",
            Query(_progress()),
            decimals=1,
        ),
        number(
            "Goodput",
            "Share of the time shown in which steps were computed; the rest is start-up, waiting, saving or lost work.",
            "percentunit",
            Query(f"sum by (run) (increase({useful}[$__range])) / sum by (run) (increase({all_classes}[$__range]))"),
            limits=[("red", 0), ("orange", 0.8), ("green", 0.95)],
            decimals=1,
        ),
        number(
            "Restarts",
            "Of the run so far, all reasons.",
            "short",
            Query(f"sum by (run) (max by (run, reason) ({metric('restarts_total')}))"),
            limits=[("orange", 1), ("red", 5)],
        ),
        number(
            "Replaced pods",
            "Pods of the jobs shown that took another one's place.",
            "short",
            Query(
                f"sum by (run, task) (max_over_time({metric('job_pod_restarts_total')}[$__range]))", "{{task}} {{run}}"
            ),
            limits=[("orange", 1), ("red", 5)],
        ),
        number(
            "Memory",
            "Highest peak of any rank, of what there is for it. Beyond its limit a process is killed.",
            "percentunit",
            Query(f"max by (run) ({_memory_share()})"),
            limits=[("orange", 0.85), ("red", MOST_MEMORY)],
            decimals=1,
        ),
    ]


def _progress() -> str:
    return f"max by (run) ({metric('step')}) / max by (run) ({metric('planned_steps')})"


def _jobs() -> list[Any]:
    return [
        chart(
            "Phase of the job",
            "1 for the phase that it is in, as its launcher sees it. Long queued: no room, or no quota.",
            "none",
            Query(f"max by (run, task, phase) ({metric('job_phase')})", "{{task}} {{phase}} {{run}}"),
            stacked=True,
            least=0,
            alerts=["QueueWait"],
        ),
        chart(
            "Time in each phase",
            "So far, as long as the launcher has followed it.",
            "s",
            Query(f"max by (run, task, phase) ({metric('job_phase_seconds_total')})", "{{task}} {{phase}} {{run}}"),
            least=0,
        ),
        chart(
            "Renewals of the lease",
            "In the interval of a point, by outcome. Failed ones end the run when they go on.",
            "short",
            Query(
                f"sum by (run, outcome) (increase({metric('lease_renewals_total')}[$__rate_interval]))",
                "{{outcome}} {{run}}",
            ),
            least=0,
            alerts=["LeaseRenewalFailing"],
        ),
    ]


def _time() -> list[Any]:
    classes = rate("goodput_seconds_total")
    return [
        chart(
            "Progress",
            "Steps done of those planned; level while nothing gets further, back after a restart.",
            "percentunit",
            Query(_progress()),
            least=0,
            most=1,
            alerts=["NoProgress"],
        ),
        chart(
            "Use of the time",
            "Share of the wall time: computing steps, start-up, waiting for data, saving, work that a restart lost.",
            "percentunit",
            Query(
                f"sum by (run, class) ({classes}) / on (run) group_left () sum by (run) ({classes})",
                "{{class}} {{run}}",
            ),
            stacked=True,
            least=0,
            most=1,
        ),
        chart(
            "Restarts",
            "Of the run so far, by reason.",
            "short",
            Query(f"max by (run, reason) ({metric('restarts_total')})", "{{reason}} {{run}}"),
            least=0,
            alerts=["RestartStorm"],
        ),
    ]


def _preflight() -> list[Any]:
    def newest(name: str) -> str:
        return f"min by (run, check) (last_over_time({metric(name)}[$__range]))"

    return [
        number(
            "Checks",
            "Of volumes, shared memory, GPUs, links and clocks, by each rank; the worst one.",
            "none",
            Query(newest("preflight_result"), "{{check}} {{run}}"),
            width=12,
            limits=[("orange", 0), ("green", 1)],
            words=["warned", "passed"],
        ),
        number(
            "Speeds",
            "Measured by those checks, the slowest rank: reading data, writing checkpoints, links between ranks.",
            "binBps",
            Query(newest("preflight_bytes_per_second"), "{{check}} {{run}}"),
            width=8,
        ),
        number(
            "Duration",
            "Of the checks.",
            "s",
            Query(f"max by (run) (last_over_time({metric('preflight_seconds')}[$__range]))"),
        ),
    ]


def _kernels() -> list[Any]:
    return [
        number(
            "Kernels",
            "Compared with their references on this kind of GPU; a wrong one is passed over.",
            "none",
            Query(
                f"min by (run, operation, backend, format) (last_over_time({metric('proof_result')}[$__range]))",
                "{{operation}} by {{backend}} in {{format}} {{run}}",
            ),
            width=20,
            limits=[("orange", 0), ("green", 1)],
            words=["wrong", "proven"],
        ),
        number(
            "Proof",
            "Of comparing them.",
            "s",
            Query(f"max by (run) (last_over_time({metric('proof_seconds')}[$__range]))"),
        ),
        number(
            "Trial",
            "A micro-batch forward and backward through all layers, by what was changed; the fastest way is taken.",
            "s",
            Query(f"max by (run, way) (last_over_time({metric('trial_seconds')}[$__range]))", "{{way}} {{run}}"),
            width=24,
        ),
    ]


def _memory_share() -> str:
    used, limit = metric("memory_bytes"), metric("memory_limit_bytes")
    return f"max by (run, rank, place) ({used}) / max by (run, rank, place) ({limit})"


def _processes() -> list[Any]:
    return [
        chart(
            "Peak memory",
            "Of the GPU's allocator (gpu) and of the process (host), over what there is for the rank.",
            "percentunit",
            Query(_memory_share(), "{{place}} rank {{rank}} {{run}}"),
            width=12,
            limits=[("red", MOST_MEMORY)],
            least=0,
            most=1,
            alerts=["MemoryNearLimit"],
        ),
        chart(
            "Scraped processes",
            "1 while Prometheus reaches the process's metrics, 0 while it does not.",
            "none",
            Query(f"max by (run, pod) (up{{{OF_RUN}}})", "{{pod}}"),
            width=12,
            least=0,
            most=1,
            alerts=["TargetDown"],
        ),
    ]
