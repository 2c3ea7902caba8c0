"""Retries with exponential backoff; honours a server's Retry-After."""

from __future__ import annotations

import email.utils
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from components.measuring import add
from trainer.errors import in_words

if TYPE_CHECKING:
    from tenacity import RetryCallState

LONGEST_PAUSE_SECONDS = 600.0
LONGEST_REASON_CHARACTERS = 200
TOLD_ONCE_SECONDS = 1.0
_telling = threading.Lock()
_told: dict[tuple[str, str, int], float] = {}
T = TypeVar("T")


def retried(
    what: str,
    call: Callable[[], T],
    again: Callable[[BaseException], bool],
    attempts: int,
    seconds: float,
    longest: float,
) -> T:
    """The result of `call`, retried while `again(error)` is true, at most `attempts` times; then its last error is
    raised.

    Args:
        what: name of the request, for the message at each pause.
        seconds, longest: approximate first and longest pause; LONGEST_PAUSE_SECONDS if a server asks for one.
    """
    from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

    usual = wait_random_exponential(multiplier=seconds, max=longest)

    def pause(state: RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        return max(usual(state), min(asked_pause(error), LONGEST_PAUSE_SECONDS))

    tries = Retrying(
        stop=stop_after_attempt(attempts),
        wait=pause,
        retry=retry_if_exception(again),
        before_sleep=lambda state: _tell(what, state, attempts),
        reraise=True,
    )
    return tries(call)


def _tell(what: str, state: RetryCallState, attempts: int) -> None:
    """Print the reason and length of a pause; a silent minute looks like a hang."""
    add("download_retries_total")
    error = state.outcome.exception() if state.outcome else None
    said = in_words(error)[:LONGEST_REASON_CHARACTERS]
    pause = state.next_action.sleep if state.next_action else 0.0
    attempt = f"attempt {state.attempt_number} of {attempts}"
    with _telling:  # also while it prints: attempts are told in their order
        if not _told_just_now((what, said, state.attempt_number)):
            print(f"download: {what}: no answer ({said}); {attempt}, trying again in {pause:.0f} s", flush=True)


def _told_just_now(line: tuple[str, str, int]) -> bool:
    """Whether another thread printed this within TOLD_ONCE_SECONDS: one fault makes many requests fail at once."""
    now = time.monotonic()
    before = _told.get(line, -TOLD_ONCE_SECONDS)
    _told[line] = now
    return now - before < TOLD_ONCE_SECONDS


def status_of(error: BaseException | None) -> int | None:
    """The HTTP status of an error of any HTTP client."""
    found = getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)
    return found if isinstance(found, int) else None


def asked_pause(error: BaseException | None) -> float:
    """Seconds in the server's Retry-After (a number or a date); 0 without one."""
    headers = getattr(error, "headers", None) or getattr(getattr(error, "response", None), "headers", None) or {}
    asked = headers.get("Retry-After")
    if not asked:
        return 0.0
    if asked.strip().isdigit():
        return float(asked)
    try:
        return max(email.utils.parsedate_to_datetime(asked).timestamp() - time.time(), 0.0)
    except ValueError:
        return 0.0
