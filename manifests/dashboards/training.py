"""Does it learn, how fast, and are all ranks well?"""

from __future__ import annotations

from typing import Any

from manifests.alerts import MOST_FP8_OVERFLOWS, MOST_STARVED_EXPERTS
from manifests.dashboards.frame import Row, build
from manifests.dashboards.panels import Query, chart, facts, metric, number, rate


def training() -> dict[str, Any]:
    return build(
        "yaongi-training",
        "yaongi / Training",
        "Loss, speed, experts, precision and ranks of training runs.",
        [
            Row("Now", _now()),
            Row("Learning", _learning()),
            Row("Speed", _speed()),
            Row("Experts and FP8", _experts_and_fp8()),
            Row("Evaluation", _evaluation()),
            Row("Ranks", _ranks()),
        ],
        variables=("run", "rank"),
    )


def _now() -> list[Any]:
    return [
        number("Loss", "Mean cross-entropy of the last step.", "none", Query(_of_run("loss")), decimals=3),
        number(
            "Speed", "Tokens per second over the last step, all ranks.", "si:tok/s", Query(_of_run("tokens_per_second"))
        ),
        number(
            "Tokens",
            "Trained on in the time shown.",
            "short",
            Query(f"sum by (run) (increase({metric('tokens_total')}[$__range]))"),
        ),
        number(
            "Steps",
            "Optimizer steps done in the time shown, skipped ones included.",
            "short",
            Query(f"sum by (run) (increase({metric('steps_total')}[$__range]))"),
        ),
        number(
            "Skipped steps",
            "Steps that changed nothing in the time shown: not finite, or a spike of loss or gradient.",
            "short",
            Query(f"sum by (run) (increase({metric('skipped_steps_total')}[$__range]))"),
            limits=[("orange", 1), ("red", 10)],
        ),
        number(
            "Last step",
            "Time since the slowest rank finished a step.",
            "s",
            Query(f"time() - min by (run) ({metric('heartbeat_timestamp_seconds')})"),
            limits=[("orange", 300), ("red", 900)],
        ),
    ]


def _of_run(name: str) -> str:
    return f"max by (run) ({metric(name)})"


def _learning() -> list[Any]:
    steps = f"sum by (run) ({rate('steps_total')})"
    return [
        chart(
            "Loss",
            "Mean cross-entropy of each step.",
            "none",
            Query(_of_run("loss")),
            alerts=["LossSpike"],
        ),
        chart(
            "Held-out text",
            "Bits per byte by domain at the last validation; only with train.evaluate.every_steps.",
            "none",
            Query(f"max by (run, domain) ({metric('validation_bits_per_byte')})", "{{domain}} {{run}}"),
        ),
        chart(
            "Gradient norm",
            "Before clipping. Spikes that come more and more often go before a divergence.",
            "none",
            Query(_of_run("grad_norm")),
            logarithmic=True,
        ),
        chart(
            "Further objectives",
            "Balance loss of the router (weighted) and cross-entropy of the tokens after the next.",
            "none",
            Query(f"max by (run, objective) ({metric('auxiliary_loss')})", "{{objective}} {{run}}"),
            width=6,
            logarithmic=True,
        ),
        chart("Learning rate", "In force for the matrices.", "none", Query(_of_run("learning_rate")), width=6, least=0),
        chart(
            "Clipped steps",
            "Share of the steps whose gradients were cut; staying at 1, the learning rate is too high for the limit.",
            "percentunit",
            Query(f"sum by (run) ({rate('clips_total')}) / {steps}"),
            width=6,
            least=0,
            most=1,
        ),
        chart(
            "Skipped steps",
            "By reason, in the interval of a point. Ten in a row end the run.",
            "short",
            Query(
                f"sum by (run, reason) (increase({metric('skipped_steps_total')}[$__rate_interval]))",
                "{{reason}} {{run}}",
            ),
            width=6,
            least=0,
            alerts=["NonFinite"],
        ),
    ]


def _speed() -> list[Any]:
    own = f"sum by (run, rank) ({rate('own_seconds_total')})"
    steps = f"sum by (run, rank) ({rate('step_seconds', '_count')})"
    return [
        chart("Tokens per second", "All ranks together.", "si:tok/s", Query(_of_run("tokens_per_second")), least=0),
        chart(
            "Model FLOPs utilisation",
            "Share of the devices' dense BF16 peak. Absent on a CPU and on GPUs whose peak is not known.",
            "percentunit",
            Query(_of_run("mfu_ratio")),
            least=0,
            most=1,
        ),
        chart(
            "Step time",
            "Median and 95th percentile over all ranks.",
            "s",
            *(
                Query(
                    f"histogram_quantile({share}, sum by (run, le) ({rate('step_seconds', '_bucket')}))",
                    f"{name} {{{{run}}}}",
                )
                for share, name in ((0.5, "median"), (0.95, "95 %"))
            ),
            least=0,
        ),
        chart(
            "Own work of each rank",
            "Time of a step in which a rank waits for no other: data, forward passes. One that stands out slows all.",
            "s",
            Query(f"{own} / {steps}", "rank {{rank}} {{run}}"),
            width=12,
            least=0,
            alerts=["Straggler"],
        ),
        chart(
            "Phases of a step",
            "Share of the time, mean of the ranks. Data above a few percent: the loader or its volume is too slow.",
            "percentunit",
            Query(
                f"sum by (run, phase) ({rate('phase_seconds_total')}) / on (run) group_left ()"
                f" sum by (run) ({rate('phase_seconds_total')})",
                "{{phase}} {{run}}",
            ),
            width=12,
            stacked=True,
            least=0,
            most=1,
            alerts=["DataStall"],
        ),
    ]


def _experts_and_fp8() -> list[Any]:
    # The tensors of a step are those of each rank, and each rank counts its own steps and overflows.
    cast = f"max by (run, rank) ({metric('fp8_tensors')}) * sum by (run, rank) ({rate('step_seconds', '_count')})"
    return [
        chart(
            "Load of the fullest expert",
            "Over the mean, worst layer. It should fall towards 1; the number of experts over top-k is a collapse.",
            "none",
            Query(_of_run("expert_load_max_ratio")),
            width=6,
            least=1,
        ),
        chart(
            "Starved experts",
            "Share of the experts with less than a tenth of the mean load, worst layer.",
            "percentunit",
            Query(_of_run("expert_starved_ratio")),
            width=6,
            limits=[("red", MOST_STARVED_EXPERTS)],
            least=0,
            alerts=["ExpertCollapse"],
        ),
        chart(
            "FP8: largest magnitude",
            "Cast to FP8, by operand, all ranks. Absent without FP8.",
            "none",
            Query(f"max by (run, operand) ({metric('fp8_amax')})", "{{operand}} {{run}}"),
            width=6,
            logarithmic=True,
        ),
        chart(
            "FP8: clamped tensors",
            "Share of those cast whose numbers were larger than delayed scaling foresaw. Absent with other recipes.",
            "percentunit",
            Query(f"sum by (run, rank) ({rate('fp8_overflows_total')}) / ({cast})", "rank {{rank}} {{run}}"),
            width=6,
            limits=[("red", MOST_FP8_OVERFLOWS)],
            least=0,
            alerts=["Fp8Overflow"],
        ),
    ]


def _evaluation() -> list[Any]:
    return [
        chart(
            "Benchmarks",
            "Scores so far, while the evaluation runs and as the last scrape saw them. LogicKor's go from 1 to 10.",
            "none",
            Query(f"max by (run, task, metric) ({metric('benchmark_score')})", "{{task}} {{metric}} {{run}}"),
            width=24,
        ),
    ]


def _ranks() -> list[Any]:
    return [
        chart(
            "Peak memory",
            "Of the GPU's allocator (gpu) and of the process (host).",
            "bytes",
            Query(f"max by (run, place, rank) ({metric('memory_bytes')})", "{{place}} rank {{rank}} {{run}}"),
            width=12,
            least=0,
        ),
        chart(
            "Time since the last step",
            "Grows on all ranks while one hangs; on one alone when it has gone.",
            "s",
            Query(f"time() - max by (run, rank) ({metric('heartbeat_timestamp_seconds')})", "rank {{rank}} {{run}}"),
            width=12,
            limits=[("red", 900)],
            least=0,
            alerts=["HeartbeatStale"],
        ),
        facts(
            "What runs",
            "Code, device, mesh, precision and the implementation of each operation, of the runs in the time shown.",
            f"last_over_time({metric('build_info')}[$__range])",
            hidden=[],
        ),
    ]
