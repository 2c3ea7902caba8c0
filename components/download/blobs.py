"""Contents that a dataset names only by id: fetched in parallel from a public bucket and verified by SHA-1.

Stack-Edu and The Stack v2 publish ids of Software Heritage, whose bucket has one gzipped object per content, named by
its SHA-1 (https://docs.softwareheritage.org, objects on S3). No account is needed.
"""

from __future__ import annotations

import gzip
import hashlib
import zlib
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import urllib3

from components.download.retry import retried
from components.download.texts import Row, unicode_text
from manifests.dataspec import BlobsSpec
from trainer.errors import DataError, LaunchError, in_words

ATTEMPTS, BACKOFF_SECONDS, MAX_WAIT_SECONDS = 9, 1.0, 60.0
TRANSIENT_STATUS = (408, 429, 500, 502, 503, 504)
MISSING_STATUS = (403, 404, 410)  # a bucket without list permission answers 403 for a missing object
ONCE = urllib3.Retry(connect=0, read=0, status=0, other=0, redirect=5, raise_on_status=False)
LOOKAHEAD = 4  # queued requests per worker


class _BusyError(Exception):
    """A response that asks for a retry."""

    def __init__(self, status: int, headers: Mapping[str, str]) -> None:
        super().__init__(f"it answered {status}")
        self.status, self.headers = status, headers


def contents(rows: Iterator[tuple[str, Row]], spec: BlobsSpec) -> Iterator[str | None]:
    """The text of each row, in order; None if the content is missing or does not match its id.

    At most `spec.workers` requests run at a time; a few more rows are read ahead, so memory does not grow.

    Raises:
        DataError: a value is not an id.
        LaunchError: a server does not answer, even after retries.
    """
    # The object itself is gzip; HTTP content decoding is off, so that the bytes are those of the bucket.
    pool = urllib3.PoolManager(maxsize=spec.workers, block=True, retries=ONCE, timeout=urllib3.Timeout(30, read=60))
    bucket = f"contents of {spec.url.partition('{id}')[0]}"

    def ask(url: str) -> urllib3.BaseHTTPResponse:
        try:
            answer = pool.request("GET", url, decode_content=False)
        except urllib3.exceptions.MaxRetryError as error:
            raise error.reason or error from None  # without the id, so that identical failures are reported once
        if answer.status in TRANSIENT_STATUS:
            raise _BusyError(answer.status, answer.headers)
        return answer

    def fetch(where: str, row: Row) -> str | None:
        name = row[0]
        if not isinstance(name, str) or not name.isalnum():
            raise DataError(f"{where}: '{name}' is not a content id; set text_column to the column of ids")
        url = spec.url.replace("{id}", name)
        try:
            answer = retried(bucket, partial(ask, url), _is_transient, ATTEMPTS, BACKOFF_SECONDS, MAX_WAIT_SECONDS)
        except (_BusyError, urllib3.exceptions.HTTPError) as error:
            raise LaunchError(
                f"{where}: {url} cannot be read ({in_words(error)}); check the network and run again"
            ) from None
        if answer.status in MISSING_STATUS:
            return None
        if answer.status != 200:
            raise DataError(f"{where}: {url} answered {answer.status}; check blobs.url")
        return _text(name, answer.data, row[1] if spec.encoding_column else None)

    waiting = deque[Future[str | None]]()
    with ThreadPoolExecutor(spec.workers) as workers:
        try:
            for where, row in rows:
                waiting.append(workers.submit(fetch, where, row))
                if len(waiting) >= LOOKAHEAD * spec.workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:  # also if the reader stops early: no request keeps running
            for future in waiting:
                future.cancel()


def _text(name: str, data: bytes, encoding: object) -> str | None:
    """The content's text; None if it does not match its id, so that no damaged text is kept."""
    try:
        content = gzip.decompress(data)
    except (OSError, EOFError, zlib.error):
        return None
    as_blob = b"blob %d\0" % len(content)
    digests = (hashlib.sha1(start + content, usedforsecurity=False).hexdigest() for start in (b"", as_blob))
    if name.lower() not in digests:
        return None
    return _decoded(content, encoding)


def _decoded(content: bytes, encoding: object) -> str:
    try:
        return unicode_text(content.decode(str(encoding or "utf-8")))  # UTF-7 can spell lone surrogates
    except (LookupError, ValueError):  # unknown encoding, or bytes that are invalid in it
        return content.decode("utf-8", errors="replace")


def _is_transient(error: BaseException) -> bool:
    return isinstance(error, _BusyError | urllib3.exceptions.HTTPError)
