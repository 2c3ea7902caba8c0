"""Exports during training (`train.export.initial`, `checkpoints`): one child process at a time, of low priority.

The child works on the CPU with one thread, from a published checkpoint, so the ranks only start it. A checkpoint is
not deleted while its export is made or waits. An export that fails is told in one line, and training goes on. One that
a stop or a kill has prevented is made when the run is resumed, as long as its checkpoint is there.

    python -m trainer.exports --spec FILE CHECKPOINT
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from trainer import exported
from trainer.checkpoints.checkpoint import MANIFEST, prune, published, read_manifest, step_of
from trainer.errors import CheckpointError
from trainer.process import failures, launcher
from trainer.spec import TrainSpec
from trainer.specbase import parse, read_yaml, to_stored_yaml

LOG = "logs/exports.log"
SPEC = "exports/train.yaml"
NICE = 10
# A child is no rank, holds no GPU, and its end is told here.
_NOT_FOR_IT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", failures.DIRECTORY_VARIABLE)
_ITS_OWN = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}

log = logging.getLogger(__name__)


def initial_source(run_dir: str | Path) -> Path:
    """The weights before the first step, as a checkpoint without optimizer state, until they are exported."""
    return Path(run_dir) / "exports" / ".weights" / "step-00000000"


class Exports:
    """The exports of one process of rank 0; its methods may be called from several threads."""

    def __init__(self, spec: TrainSpec) -> None:
        self._spec = spec
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="export")
        self._lock = threading.Lock()
        self._waiting: dict[int, Future[None]] = {}
        self._child: subprocess.Popen[bytes] | None = None
        self._over = False

    def begin(self, first_step: int) -> None:
        """Before the first step: make what earlier processes of the run have left undone."""
        wanted = self._spec.exporting
        if wanted.initial and (initial_source(self._spec.run_dir) / MANIFEST).is_file():
            self._add(initial_source(self._spec.run_dir))
        if wanted.checkpoints:
            for path in reversed(published(self._spec.run_dir)):
                if step_of(path) <= first_step and self._lacks(path):
                    self._add(path)

    def published(self, checkpoint: Path) -> None:
        """A checkpoint was published."""
        if self._spec.exporting.checkpoints:
            self._add(checkpoint)

    def in_use(self) -> Collection[int]:
        """Steps whose checkpoints must not be deleted now."""
        with self._lock:
            return list(self._waiting)

    def finish(self, go_on: Callable[[bool], bool]) -> None:
        """Wait until all is exported, then `close`.

        Args:
            go_on: called about every second with whether there is work; whether to wait on.
        """
        if self._waiting:
            log.info("training is done; waiting for %d exports", len(self._waiting))
        worked = bool(self.in_use())
        while go_on(bool(self.in_use())):
            time.sleep(0.2)
        self.close()
        if worked:  # those that were in use when the last checkpoint was published
            prune(self._spec.run_dir, self._spec.checkpoint.keep_last, self._spec.decay_begins)

    def close(self) -> None:
        """End at once; what is not exported stays for the next process of the run."""
        with self._lock:
            self._over = True
            if self._child is not None:
                self._child.terminate()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _lacks(self, checkpoint: Path) -> bool:
        try:
            made_from = exported.digest(exported.step_dir(self._spec.run_dir, step_of(checkpoint)))
            return made_from != read_manifest(checkpoint).digest
        except CheckpointError:
            return False

    def _add(self, checkpoint: Path) -> None:
        with self._lock:
            if not self._over:
                self._waiting[step_of(checkpoint)] = self._pool.submit(self._export, checkpoint)

    def _export(self, checkpoint: Path) -> None:
        step, began = step_of(checkpoint), time.monotonic()
        try:
            problem = self._run(checkpoint)
            if problem:
                log.warning("the model of step %d was not exported (%s); training continues", step, problem)
            elif problem is None:
                log.info("exported the model of step %d in %.1f s", step, time.monotonic() - began)
                if checkpoint == initial_source(self._spec.run_dir):
                    shutil.rmtree(checkpoint.parent, ignore_errors=True)
        finally:
            with self._lock:
                self._waiting.pop(step, None)

    def _run(self, checkpoint: Path) -> str | None:
        """Run the child; None: it has made the export, "": it was told to end, else why it has not."""
        run_dir = Path(self._spec.run_dir)
        environment = {name: value for name, value in os.environ.items() if name not in _NOT_FOR_IT}
        command = [sys.executable, "-m", "trainer.exports", "--spec", str(run_dir / SPEC), str(checkpoint)]
        try:
            (run_dir / SPEC).parent.mkdir(parents=True, exist_ok=True)
            (run_dir / SPEC).write_bytes(to_stored_yaml(self._spec))
            with (run_dir / LOG).open("ab") as output:
                with self._lock:
                    if self._over:
                        return ""
                    self._child = subprocess.Popen(
                        command,
                        env=environment | _ITS_OWN | launcher.named(),
                        stdin=subprocess.DEVNULL,
                        stdout=output,
                        stderr=subprocess.PIPE,
                    )
                _, said = self._child.communicate()
                output.write(said)
        except OSError as error:
            return error.strerror or type(error).__name__
        code = self._child.returncode
        if code == 0:
            return None
        if self._over:
            return ""
        lines = said.decode(errors="replace").strip().splitlines()
        return f"{lines[-1] if lines else f'exit code {code}'}; its log: {run_dir / LOG}"


def main(arguments: Sequence[str] | None = None) -> int:
    os.nice(NICE)
    launcher.Launcher().end_with()
    options = argparse.ArgumentParser(prog="python -m trainer.exports", description="Export one checkpoint.")
    options.add_argument("--spec", required=True, metavar="FILE", help="TrainSpec of the run")
    options.add_argument("checkpoint", type=Path, help="directory of the checkpoint")
    told = options.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stdout)
    try:
        from trainer import export

        export.run_at(parse(TrainSpec, read_yaml(told.spec), str(told.spec)), told.checkpoint)
    except Exception as error:
        code, reason = failures.classify(error)
        logging.getLogger("trainer").exception("not exported")
        print(reason, file=sys.stderr)
        return int(code)
    return 0


if __name__ == "__main__":
    sys.exit(main())
