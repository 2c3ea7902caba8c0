"""A process that runs download steps against a Hub on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from hub_server import HubServer

# Reads jobs as JSON lines and answers each with its result or its error. It is a separate process because the Hub's
# address is fixed when the library is imported, and one for all tests because the import takes seconds.
WORKER = """
import contextlib, io, json, sys
import huggingface_hub.constants as constants
from components.download import blobs, hubaccess, source
from components.download.step import run
from manifests.spec import JobSpec, parse
from trainer.errors import ForeseenError
constants.DOWNLOAD_CHUNK_SIZE = 1 << 16
hubaccess.RETRY_SECONDS = hubaccess.MAX_WAIT_SECONDS = blobs.BACKOFF_SECONDS = 0.01
whole_part = source.PART_BYTES
for line in sys.stdin:
    job = json.loads(line)
    source.PART_BYTES = job.pop("part_bytes", whole_part)
    answer, said = {}, io.StringIO()
    with contextlib.redirect_stdout(said):
        try:
            answer["result"] = run(parse(JobSpec, job)).model_dump()
        except ForeseenError as error:
            answer |= {"error": str(error), "code": error.code}
    print(json.dumps(answer | {"said": said.getvalue()}), flush=True)
"""


class Hub:
    """The server and the worker process; `run` returns (result, error), `said` is what it printed meanwhile."""

    def __init__(self, server: HubServer, worker: subprocess.Popen[str]) -> None:
        self.server, self.worker, self.said = server, worker, ""

    @classmethod
    @contextmanager
    def started(cls, server: HubServer, home: Path) -> Iterator[Self]:
        # A secret made from a file ends in a line break.
        environment = os.environ | {"HF_ENDPOINT": server.url, "HF_HOME": str(home), "HF_TOKEN": "hf_secret\n"}
        process = subprocess.Popen(
            [sys.executable, "-c", WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        assert process.stdin
        yield cls(server, process)
        process.stdin.close()
        process.wait(timeout=120)

    def run(self, job: dict[str, Any]) -> tuple[dict[str, Any] | None, str | None]:
        assert self.worker.stdin and self.worker.stdout
        self.worker.stdin.write(json.dumps(job) + "\n")
        self.worker.stdin.flush()
        answer = json.loads(self.worker.stdout.readline())
        self.said = answer["said"]
        return answer.get("result"), answer.get("error")
