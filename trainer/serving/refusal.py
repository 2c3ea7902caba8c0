"""Errors as the API writes them: {"error": {"message", "type", "param", "code"}}. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

INVALID, SERVER = "invalid_request_error", "server_error"


class Refusal(Exception):
    """An answer that is an error.

    Attributes:
        reason: label of the metric serve_rejected_total.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})
        self.reason = code or kind
        self.body: dict[str, Any] = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def invalid(param: str | None, message: str) -> Refusal:
    return Refusal(400, message, param=param, code="invalid_value")


def too_long(param: str, length: int, prompt: int, wanted: int) -> Refusal:
    """Tokens: of the longest text, of the prompt, and asked for."""
    return Refusal(
        400,
        f"This model's maximum context length is {length} tokens. However, you requested {prompt + wanted} tokens "
        f"({prompt} in the {param}, {wanted} in the completion). Please reduce the length of the {param} or of the "
        "completion.",
        param=param,
        code="context_length_exceeded",
    )


def far_too_long(param: str, length: int) -> Refusal:
    """`length`: tokens of the longest text."""
    return Refusal(
        400,
        f"This model's maximum context length is {length} tokens; the {param} is many times as long. Please reduce it.",
        param=param,
        code="context_length_exceeded",
    )


def unauthorized() -> Refusal:
    return Refusal(
        401,
        "Incorrect or missing API key; send it in the header Authorization: Bearer KEY.",
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )


def no_such_model(name: str) -> Refusal:
    return Refusal(404, f"The model {name!r} does not exist.", param="model", code="model_not_found")


def busy(waiting: int) -> Refusal:
    return Refusal(
        429,
        f"{waiting} texts wait already; try again later.",
        kind="requests",
        code="rate_limit_exceeded",
        headers={"Retry-After": "1"},
    )


def body_too_large(limit: int) -> Refusal:
    return Refusal(
        413, f"The body of a request may have {limit} bytes.", code="request_too_large", headers={"Connection": "close"}
    )


def not_ready(state: str) -> Refusal:
    """`state`: loading or draining."""
    return Refusal(503, f"The server is {state}.", kind=SERVER, code=state, headers={"Retry-After": "1"})


def timed_out(seconds: float) -> Refusal:
    return Refusal(504, f"The answer took longer than {seconds:g} seconds.", kind=SERVER, code="timeout")


def failed(why: str) -> Refusal:
    return Refusal(500, f"The engine has failed ({why}); the server must be restarted.", kind=SERVER, code="failed")
