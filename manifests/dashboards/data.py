"""Data preparation, training sources and checkpoints."""

from __future__ import annotations

from typing import Any

from manifests.alerts import MOST_DATA_WAIT
from manifests.dashboards.frame import Row, build
from manifests.dashboards.panels import Query, chart, metric, number, rate


def data() -> dict[str, Any]:
    return build(
        "yaongi-data",
        "yaongi / Data and checkpoints",
        "Steps that prepare data, the sources that are trained on, and checkpoints.",
        [
            Row("Now", _now()),
            Row("Preparation", _preparation()),
            Row("Documents and tokens", _documents()),
            Row("Training data", _training_data()),
            Row("Checkpoints", _checkpoints()),
        ],
    )


def _in_time_shown(name: str, by: str, legend: str) -> Query:
    """Counts of pipeline steps in the time shown; a step may be too short for a rate."""
    return Query(f"sum by ({by}) (max_over_time({metric(name)}[$__range]))", legend)


def _now() -> list[Any]:
    saved = metric("checkpoint_last_success_timestamp_seconds")
    return [
        number(
            "Tokens prepared",
            "Written to token files in the time shown.",
            "short",
            _in_time_shown("shard_tokens_total", "split", "{{split}}"),
        ),
        number(
            "Documents left out",
            "By hygiene, in the time shown; one that several filters name counts for each.",
            "short",
            Query(f"sum(max_over_time({metric('left_out_documents_total')}[$__range]))", "documents"),
        ),
        number(
            "Requests tried again",
            "By the download, in the time shown. Many: the other side limits or fails.",
            "short",
            Query(f"sum(max_over_time({metric('download_retries_total')}[$__range]))", "requests"),
            limits=[("orange", 10), ("red", 100)],
        ),
        number(
            "Since the last checkpoint",
            "What a crash would cost now.",
            "s",
            Query(f"time() - max by (run) ({saved})"),
            limits=[("orange", 3600), ("red", 2 * 3600)],
        ),
        number(
            "Failed checkpoints",
            "That could not be saved, in the time shown; the log says why.",
            "short",
            Query(f"sum by (run) (increase({metric('checkpoint_failures_total')}[$__range]))"),
            limits=[("red", 1)],
        ),
        number(
            "Waiting for data",
            "Share of the time of the steps. Above a few percent: the loader or its volume is too slow.",
            "percentunit",
            Query(_share_of_phase("data")),
            limits=[("orange", 0.05), ("red", MOST_DATA_WAIT)],
            decimals=1,
        ),
    ]


def _share_of_phase(phase: str) -> str:
    return f"sum by (run) ({rate('phase_seconds_total', phase=phase)}) / sum by (run) ({rate('phase_seconds_total')})"


def _preparation() -> list[Any]:
    return [
        chart(
            "Bytes worked through",
            "Per second, by step of the pipeline: read and written ones.",
            "Bps",
            Query(f"sum by (stage) ({rate('stage_bytes_total')})", "{{stage}}"),
            width=6,
            least=0,
        ),
        chart(
            "Download",
            "Bytes taken in per second, by source.",
            "Bps",
            Query(f"sum by (source) ({rate('download_bytes_total')})", "{{source}}"),
            width=6,
            least=0,
        ),
        chart(
            "Time since a step got further",
            "A step that stands still for minutes waits for a volume or a server.",
            "s",
            Query(f"time() - max by (stage) ({metric('stage_heartbeat_timestamp_seconds')})", "{{stage}}"),
            width=6,
            least=0,
            alerts=["DataStepStalled"],
        ),
        chart(
            "Verified files",
            "Files of an earlier run whose checksum was found right, and which are therefore not made again.",
            "short",
            _so_far("files_verified_total", "stage"),
            width=6,
            least=0,
        ),
    ]


def _documents() -> list[Any]:
    return [
        chart(
            "Documents",
            "Written so far, by step and source.",
            "short",
            _so_far("documents_total", "stage", "source"),
            width=6,
            least=0,
        ),
        chart(
            "Text",
            "UTF-8 bytes in those documents.",
            "bytes",
            _so_far("text_bytes_total", "stage", "source"),
            width=6,
            least=0,
        ),
        chart(
            "Tokens",
            "Written to token files so far.",
            "short",
            _so_far("shard_tokens_total", "source", "split"),
            width=6,
            least=0,
        ),
        chart(
            "Left out",
            "Documents that hygiene leaves out, by the filter that says so.",
            "short",
            _so_far("left_out_documents_total", "filter"),
            width=6,
            least=0,
        ),
    ]


def _so_far(name: str, *by: str) -> Query:
    """Counts of a step so far; it may begin and end between two points of a curve."""
    newest = f"max_over_time({metric(name)}[$__rate_interval])"
    return Query(f"sum by ({', '.join(by)}) ({newest})", " ".join(f"{{{{{label}}}}}" for label in by))


def _training_data() -> list[Any]:
    by_source = f"sum by (run, source) ({rate('source_tokens_total')})"
    return [
        chart(
            "Tokens by source",
            "Trained on per second.",
            "si:tok/s",
            Query(by_source, "{{source}} {{run}}"),
            stacked=True,
        ),
        chart(
            "Mixture",
            "Share of each source in the tokens; it should be the weights of the job.",
            "percentunit",
            Query(
                f"{by_source} / on (run) group_left () sum by (run) ({rate('source_tokens_total')})",
                "{{source}} {{run}}",
            ),
            stacked=True,
            least=0,
            most=1,
        ),
        chart(
            "Epochs",
            "Times that each source has been gone through; more than four teach little.",
            "none",
            Query(f"max by (run, source) ({metric('source_epochs')})", "{{source}} {{run}}"),
            least=0,
        ),
    ]


def _checkpoints() -> list[Any]:
    saved, interval = metric("checkpoint_last_success_timestamp_seconds"), metric("checkpoint_interval_steps")
    step_seconds = f"max by (run) ({metric('step_seconds', '_sum')} / {metric('step_seconds', '_count')})"
    return [
        chart(
            "Age of the last checkpoint",
            "Falls to 0 whenever one is durable. It should stay below twice the interval at the run's mean speed.",
            "s",
            Query(f"time() - max by (run) ({saved})", "age {{run}}"),
            Query(f"2 * max by (run) ({interval}) * {step_seconds}", "twice the interval {{run}}"),
            least=0,
            alerts=["CheckpointTooOld", "CheckpointFailing"],
        ),
        chart(
            "Duration",
            "From start to durable; training itself waits only for the copy in memory.",
            "s",
            Query(f"max by (run) ({metric('checkpoint_seconds')})"),
            least=0,
        ),
        chart(
            "Time spent saving",
            "Share of the time of the steps for which saving holds up training.",
            "percentunit",
            Query(_share_of_phase("checkpoint")),
            least=0,
        ),
    ]
