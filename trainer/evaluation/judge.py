"""A judge model behind an OpenAI-compatible API: one chat completion a question, with retries.

A busy or failing server is asked again after a growing pause, or after the one that it asks for (Retry-After). The key
of the API is only ever sent; neither messages nor files contain it.
"""

from __future__ import annotations

import json
import os
import re
from typing import TYPE_CHECKING, Any, NamedTuple

from trainer.benchmarkspec import JudgeSpec
from trainer.errors import LaunchError, SpecError, in_words

if TYPE_CHECKING:
    import urllib3

BUSY = (408, 409, 425, 429, 500, 502, 503, 504)
REFUSED = (400, 413, 422)  # this question only: too long, or against the judge's rules
PAUSE_SECONDS, LONGEST_PAUSE_SECONDS, LONGEST_ASKED_SECONDS = 1.0, 60.0, 600
CONNECT_SECONDS = 10.0
LONGEST_MESSAGE = 200  # characters of a server's message that are shown


class Reply(NamedTuple):
    """The text of an answer, None if the judge gave none, and why; the tokens that it cost, as the judge counts."""

    text: str | None
    why_not: str
    prompt_tokens: int
    completion_tokens: int


def key_of(spec: JudgeSpec) -> str | None:
    """The API's key from the environment; None for a judge without one.

    Raises:
        SpecError: the variable is not set, or cannot be a key.
    """
    if spec.api_key_env is None:
        return None
    if not (key := os.environ.get(spec.api_key_env, "").strip()):
        raise SpecError(
            f"train.evaluate.judge: the environment variable {spec.api_key_env} is not set; put the key of the judge's "
            "API there, or set api_key_env: null for a server without one"
        )
    if not re.fullmatch(r"[!-~]+", key):  # a header with it would be refused, in a message that shows it
        raise SpecError(
            f"train.evaluate.judge: the environment variable {spec.api_key_env} holds more than a key; put only "
            "the key there, without spaces and line breaks"
        )
    return key


def pool(spec: JudgeSpec, redirects: int = 0) -> urllib3.PoolManager:
    """Connections that retry, and follow at most so many redirects.

    Raises:
        SpecError: the package for them is missing.
    """
    try:
        import urllib3
    except ImportError:
        raise SpecError(
            "train.evaluate.judge needs urllib3, which is not installed; install it with pip install 'yaongi[eval]'"
        ) from None
    retries = urllib3.Retry(
        total=spec.retries,
        redirect=redirects,
        backoff_factor=PAUSE_SECONDS,
        backoff_max=LONGEST_PAUSE_SECONDS,
        backoff_jitter=PAUSE_SECONDS / 2,
        status_forcelist=BUSY,
        allowed_methods=None,
        raise_on_status=False,
        raise_on_redirect=False,
        retry_after_max=LONGEST_ASKED_SECONDS,
    )
    timeout = urllib3.Timeout(connect=min(CONNECT_SECONDS, spec.timeout_seconds), read=spec.timeout_seconds)
    return urllib3.PoolManager(maxsize=spec.max_concurrency, block=True, retries=retries, timeout=timeout)


class Judge:
    """Threads may share it.

    Raises:
        SpecError: the API's key is not in the environment, or a package is missing.
    """

    def __init__(self, spec: JudgeSpec) -> None:
        self._spec, self._key, self._pool = spec, key_of(spec), pool(spec)

    def ask(self, system: str, question: str) -> Reply:
        """The judge's answer, at temperature 0.

        Raises:
            LaunchError: the server does not answer, or refuses everything: key, address or model are wrong.
        """
        import urllib3

        address = f"{self._spec.url}/chat/completions"
        messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        body = {"model": self._spec.model, "messages": messages, "temperature": 0, "n": 1}
        try:
            answer = self._pool.request("POST", address, json=body, headers=headers)
        except urllib3.exceptions.HTTPError as error:
            reason = getattr(error, "reason", None) or error
            raise LaunchError(f"the judge at {self._spec.url} does not answer ({self._said(reason)})") from None
        if answer.status == 200:
            return _read(answer.data)
        if answer.status in REFUSED:
            return Reply(None, f"status {answer.status}: {self._message(answer.data)}", 0, 0)
        if answer.status in (401, 403):  # the server's message may repeat the key
            raise LaunchError(
                f"the judge at {self._spec.url} refuses access ({answer.status}); check the key in "
                f"{self._spec.api_key_env or 'api_key_env'}"
            )
        said = self._message(answer.data)
        raise LaunchError(
            f"the judge at {self._spec.url} answered {answer.status}{f' ({said})' if said else ''}; check "
            "train.evaluate.judge.url and model, and the limits of the account"
        )

    def _message(self, data: bytes) -> str:
        """The message in an error object of the API, or the beginning of another text, without the key."""
        try:
            error = json.loads(data)["error"]
            said = str(error["message"] if isinstance(error, dict) else error)
        except (ValueError, KeyError, TypeError):
            said = data.decode("utf-8", "replace")
        return self._said(" ".join(said.split()))[:LONGEST_MESSAGE]

    def _said(self, what: object) -> str:
        said = in_words(what)
        return said.replace(self._key, "…") if self._key else said


def _read(data: bytes) -> Reply:
    try:
        answer: Any = json.loads(data)
    except ValueError:
        return Reply(None, "not JSON", 0, 0)
    usage = answer.get("usage") if isinstance(answer, dict) else None
    counts = [_count(usage, name) for name in ("prompt_tokens", "completion_tokens")]
    try:
        text = answer["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        text = None
    if not isinstance(text, str) or not text.strip():
        return Reply(None, "an answer without text", *counts)
    return Reply(text, "", *counts)


def _count(usage: Any, name: str) -> int:
    value = usage.get(name) if isinstance(usage, dict) else None
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0
