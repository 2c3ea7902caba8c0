"""Servers of exported models: how fast they answer, what they refuse, how full they are."""

from __future__ import annotations

from typing import Any

from manifests.dashboards.frame import Row, build
from manifests.dashboards.panels import Query, chart, metric, number, rate


def serving() -> dict[str, Any]:
    return build(
        "yaongi-serving",
        "yaongi / Serving",
        "Servers of exported models: speed of their answers, load, and what they refuse.",
        [
            Row("Now", _now()),
            Row("Speed of the answers", _speed()),
            Row("Load", _load()),
        ],
        variables=("run", "server"),
    )


def _quantile(name: str, share: float) -> Query:
    expression = f"histogram_quantile({share}, sum by (run, le) ({rate(name, '_bucket')}))"
    return Query(expression, f"{share:.0%} {{{{run}}}}")


def _now() -> list[Any]:
    answered = rate("serve_requests_total", code="200")
    return [
        number("Requests", "Per second.", "reqps", Query(f"sum by (run) ({rate('serve_requests_total')})"), decimals=1),
        number(
            "Answered",
            "Share of the requests with status 200.",
            "percentunit",
            Query(f"sum by (run) ({answered}) / sum by (run) ({rate('serve_requests_total')})"),
            limits=[("red", 0), ("orange", 0.9), ("green", 0.99)],
            decimals=1,
        ),
        number(
            "Tokens written",
            "Per second, all texts together.",
            "si:tok/s",
            Query(f"sum by (run) ({rate('serve_completion_tokens_total')})"),
        ),
        number(
            "First token",
            "In 95% of the texts it came within this time.",
            "s",
            _quantile("serve_first_token_seconds", 0.95),
            decimals=2,
        ),
        number("Texts", "That are continued now.", "short", Query(f"sum by (run) ({metric('serve_running_texts')})")),
        number(
            "Waiting",
            "Texts that have no place yet. If there are always some, more servers or rows are needed.",
            "short",
            Query(f"sum by (run) ({metric('serve_waiting_texts')})"),
            limits=[("orange", 1)],
        ),
    ]


def _speed() -> list[Any]:
    def quantiles(title: str, description: str, name: str) -> Any:
        return chart(title, description, "s", *(_quantile(name, share) for share in (0.5, 0.95, 0.99)), least=0)

    return [
        quantiles(
            "Time to the first token",
            "From the arrival of a request; its wait for a place and its prompt are in it.",
            "serve_first_token_seconds",
        ),
        quantiles("Time between tokens", "Of each text.", "serve_inter_token_seconds"),
        quantiles("Duration", "Of requests that were answered, to the last byte.", "serve_request_seconds"),
    ]


def _load() -> list[Any]:
    return [
        chart(
            "Texts at the same time",
            "Those that are continued, and those that wait.",
            "short",
            Query(f"sum by (run) ({metric('serve_running_texts')})", "continued {{run}}"),
            Query(f"sum by (run) ({metric('serve_waiting_texts')})", "waiting {{run}}"),
            width=6,
            least=0,
        ),
        chart(
            "Tokens",
            "Per second: of prompts, and written.",
            "si:tok/s",
            Query(f"sum by (run) ({rate('serve_prompt_tokens_total')})", "prompts {{run}}"),
            Query(f"sum by (run) ({rate('serve_completion_tokens_total')})", "written {{run}}"),
            width=6,
            least=0,
        ),
        chart(
            "Requests by status",
            "Per second; 499: the client left.",
            "reqps",
            Query(f"sum by (run, path, code) ({rate('serve_requests_total')})", "{{code}} {{path}} {{run}}"),
            width=6,
            stacked=True,
        ),
        chart(
            "Refusals",
            "Per second, by reason.",
            "reqps",
            Query(f"sum by (run, reason) ({rate('serve_refused_total')})", "{{reason}} {{run}}"),
            width=6,
            stacked=True,
        ),
    ]
