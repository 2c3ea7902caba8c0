"""Draw each dashboard from a real run scraped by a real Prometheus: the pictures in docs/dashboards.

    python makers/dashboard_pictures.py --steps 120 --out docs/dashboards

Needs the program `prometheus`. The run trains `tiny` in emulated FP8 with a sensitive spike guard; one of its two
processes is killed halfway and the run is resumed, so that restarts, skipped steps and lost work appear.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import urlopen

from manifests.dashboards.query import View
from manifests.spec import JobSpec, load_job
from trainer.specbase import changes_from_sets

YAONGI = Path(sys.executable).with_name("yaongi")
RANKS = 2
NAMESPACE = "here"
# A run in which everything that a dashboard shows happens within minutes on a CPU.
EVENTFUL = (
    "train.precision.dtype=fp8",
    "train.precision.fp8.implementation=emulated",
    "train.precision.fp8.recipe=delayed",  # its scale follows the values with a delay, so that they sometimes overflow
    "train.precision.fp8.amax_history_steps=4",
    "train.optimizer.spike_guard.sigmas=0.8",
    "train.optimizer.spike_guard.window=8",
    "train.runtime.log_every_steps=1",
    # The same texts in two sources, so that hygiene finds duplicates.
    'data.sources.math.origin.paths=["sample://math.jsonl.gz", "sample://code.jsonl.gz"]',
    "hygiene.exact_duplicates=true",
)
# Two rows of 256 tokens per step, so that a few hundred steps take minutes.
SMALL_STEPS = (
    "train.batch.tokens_per_step=512",
    "train.batch.micro_batch_rows=1",
    "train.checkpoint.every_steps=20",
    "train.evaluate.max_tokens=500",
)


class Prometheus:
    """A Prometheus server on this machine, for as long as the context lasts."""

    def __init__(
        self, folder: Path, port: int, targets: Sequence[tuple[int, Mapping[str, str]]], *, interval: float = 0.25
    ) -> None:
        """
        Args:
            port: to serve on.
            targets: (port on this machine, labels of its series).
            interval: between scrapes, in seconds.
        """
        self.port, self.interval, self._targets = port, interval, len(targets)
        static = [{"targets": [f"127.0.0.1:{port}"], "labels": dict(labels)} for port, labels in targets]
        config = {
            "global": {"scrape_interval": f"{interval * 1000:g}ms", "scrape_timeout": f"{interval * 1000:g}ms"},
            "scrape_configs": [{"job_name": "yaongi", "static_configs": static}],
        }
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "prometheus.yml").write_text(json.dumps(config))
        self._command = [
            "prometheus",
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{self.port}",
            "--log.level=warn",
        ]

    def __enter__(self) -> Prometheus:
        self._process = subprocess.Popen(self._command)
        wait_for("Prometheus", self._is_ready, timeout=30)
        # It answers seconds before its first scrape; shorter-lived processes would be missed.
        wait_for("its first scrapes", lambda: len(self.ask("query", query="up")["result"]) == self._targets, timeout=60)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()

    def ask(self, path: str, **parameters: str | float) -> Any:
        """The field `data` of the response to a request to its HTTP API, such as `query` or `query_range`.

        Raises:
            OSError: Prometheus refuses the request or has ended.
        """
        with urlopen(f"http://127.0.0.1:{self.port}/api/v1/{path}?{urlencode(parameters)}") as response:
            return json.load(response)["data"]

    def _is_ready(self) -> bool:
        assert self._process.poll() is None, "Prometheus ended immediately; the reason is on stderr"
        try:
            with urlopen(f"http://127.0.0.1:{self.port}/-/ready"):
                return True
        except OSError:
            return False


def free_ports(count: int) -> list[int]:
    """The first of `count` consecutive free ports."""
    for first in range(20_000 + os.getpid() % 10_000, 60_000, count):
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return list(range(first, first + count))
    raise OSError("no free ports")


def wait_for(what: str, is_there: Callable[[], bool], timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while not is_there():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout:g} s in vain for {what}")
        time.sleep(0.1)


class WatchedRun:
    """Run a job here with Prometheus: two processes train it, one is killed at step `kill_at`, the run is resumed."""

    def __init__(self, workdir: Path, job_file: str, sets: Sequence[str]) -> None:
        server, self.step_port, first, *_ = free_ports(2 + RANKS)
        ports = [f"train.runtime.metrics_port={first}"]
        trees = [f"storage.{tree}_dir={workdir}/{tree}" for tree in ("datasets", "checkpoints")]
        self._sets, self._workdir, self._job_file = [*EVENTFUL, *sets, *ports], workdir, job_file
        self.job: JobSpec = load_job(job_file, changes_from_sets([*self._sets, *trees]))
        labels = {"namespace": NAMESPACE, "run": self.job.run_name}
        targets = [(self.step_port, labels | {"pod": "steps"})]
        targets += [(first + rank, labels | {"pod": f"{self.job.run_name}-worker-{rank}"}) for rank in range(RANKS)]
        self.prometheus = Prometheus(workdir / "prometheus", server, targets)

    def tell(self, kill_at: int) -> None:
        """Train to the end, with a kill in between."""
        first = self._start()
        wait_for(f"step {kill_at}", lambda: self._steps() >= kill_at or first.poll() is not None, timeout=900)
        if first.poll() is not None:
            raise RuntimeError(f"the run ended before step {kill_at} with exit code {first.returncode}")
        os.kill(self._pid_of_rank(RANKS - 1), signal.SIGKILL)
        if first.wait() == 0:
            raise RuntimeError("the run succeeded although one of its processes was killed")
        if code := self._start().wait():
            raise RuntimeError(f"the resumed run ended with exit code {code}")

    def view(self, started: float) -> View:
        """Draw the whole run until now, as Grafana would with a data source of 1 s."""
        chosen = dict.fromkeys(("run", "pipeline"), self.job.run_name) | {"namespace": NAMESPACE}
        return View(started, time.time(), 1.0, chosen)

    def _start(self) -> subprocess.Popen[bytes]:
        changes = [part for change in self._sets for part in ("--set", change)]
        environment = os.environ | {"YAONGI_METRICS_PORT": str(self.step_port), "OMP_NUM_THREADS": "1"}
        command = [YAONGI, "run", self._job_file, "--workdir", self._workdir, *changes]
        return subprocess.Popen(command, env=environment)

    def _steps(self) -> int:
        file = Path(self.job.run_dir) / "logs" / "metrics.jsonl"
        return len(file.read_bytes().splitlines()) if file.exists() else 0

    def _pid_of_rank(self, rank: int) -> int:
        for entry in Path("/proc").iterdir():
            try:
                command = (entry / "cmdline").read_bytes().split(b"\0")
                variables = (entry / "environ").read_bytes().split(b"\0")
            except OSError:  # no process, not ours, or already ended
                continue
            if f"{self.job.run_dir}/train.yaml".encode() in command and f"RANK={rank}".encode() in variables:
                return int(entry.name)
        raise RuntimeError(f"no process of rank {rank} is there")


def main() -> None:
    from dashboard_drawing import draw

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--out", type=Path, default=Path("docs/dashboards"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = WatchedRun(Path(folder), "tiny", [f"train.steps={options.steps}", *SMALL_STEPS])
        with run.prometheus:
            started = time.time()
            run.tell(kill_at=options.steps // 2)
            draw(run.prometheus.ask, run.view(started), options.out)


if __name__ == "__main__":
    main()
