"""Contents that a dataset names by id only: fetched in parallel from a public bucket, proved by their SHA-1.

Stack-Edu and The Stack v2 publish ids of Software Heritage, whose bucket holds one gzipped object for each content,
named by its SHA-1 (https://docs.softwareheritage.org, objects on S3). No account is needed.
"""

from __future__ import annotations

import gzip
import hashlib
import zlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self

import urllib3

from components.download.retry import LONGEST_PAUSE_SECONDS, count_retry
from components.download.texts import Row, unicode_text
from manifests.dataspec import BlobsSpec
from trainer.data.manifest import DataError

ATTEMPTS, BACKOFF_SECONDS, MAX_WAIT_SECONDS = 8, 0.5, 60.0
TRANSIENT_STATUS = (408, 429, 500, 502, 503, 504)
MISSING_STATUS = (403, 404, 410)  # a bucket that may not be listed answers 403 for what it does not hold
LOOKAHEAD = 4  # requests in waiting for each worker


class _CountedRetry(urllib3.Retry):
    def increment(self, *args: Any, **kwargs: Any) -> Self:
        again = super().increment(*args, **kwargs)  # raises when there were enough
        count_retry()
        return again


def contents(rows: Iterator[tuple[str, Row]], spec: BlobsSpec) -> Iterator[str | None]:
    """The text of each row, in order, None where the content is not there or is not what its id says.

    At most `spec.workers` requests run at a time; a few more rows are read ahead, so memory does not grow.

    Raises:
        DataError: an id that is none, or a server that cannot be reached, also after retries.
    """
    retry = _CountedRetry(
        total=ATTEMPTS,
        backoff_factor=BACKOFF_SECONDS,
        backoff_max=MAX_WAIT_SECONDS,
        backoff_jitter=BACKOFF_SECONDS,
        status_forcelist=TRANSIENT_STATUS,
        raise_on_status=True,
        retry_after_max=int(LONGEST_PAUSE_SECONDS),
    )
    # The object itself is gzip; decoding as the transport's encoding is left off so that bytes are what the bucket has.
    pool = urllib3.PoolManager(maxsize=spec.workers, block=True, retries=retry, timeout=urllib3.Timeout(30, read=60))

    def fetch(where: str, row: Row) -> str | None:
        name = row[0]
        if not isinstance(name, str) or not name.isalnum():
            raise DataError(f"{where}: '{name}' is no id of a content; set text_column to the column of ids")
        url = spec.url.replace("{id}", name)
        try:
            answer = pool.request("GET", url, decode_content=False)
        except urllib3.exceptions.HTTPError as error:
            raise DataError(
                f"{where}: {url} cannot be read ({_line(error)}); check the network and run again"
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
        finally:  # also when the reader has enough: no request is left to run on
            for future in waiting:
                future.cancel()


def _text(name: str, data: bytes, encoding: object) -> str | None:
    """The content's text; None when it is not what its id says, so that nothing damaged is kept."""
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
    except (LookupError, ValueError):  # no such encoding, or other bytes than it has
        return content.decode("utf-8", errors="replace")


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
