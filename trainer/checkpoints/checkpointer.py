"""Save and load the tensors of a training run, for any number of processes on either side.

torch.distributed.checkpoint (DCP) writes every tensor once, distributed over the ranks. Everything that is not a tensor
goes into checkpoint.json, so only DCP's own index is pickled (trainer/checkpoints/index.py).
With `asynchronous` a thread works on a copy of the tensors and on its own process group while training continues; the
next save waits for it.
"""

from __future__ import annotations

import importlib.metadata
import logging
import shutil
import time
import warnings
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from trainer.checkpoints import checkpoint
from trainer.checkpoints.checkpoint import CheckpointManifest
from trainer.checkpoints.index import INDEX, Reader, read_shapes
from trainer.checkpoints.length import continuable
from trainer.distributed import World
from trainer.errors import CheckpointError, DataError, DivergedError, SpecError, in_words
from trainer.fields import stored, version_of
from trainer.fp8.state import Fp8State
from trainer.fp8.te import TeState
from trainer.model.rows import own_rows
from trainer.modelspec import ModelSpec
from trainer.optim import Optimizers
from trainer.spec import TrainSpec
from trainer.specbase import VERSION_FIELD, parse

log = logging.getLogger(__name__)


class Checkpointer:
    """Saves and resumes one training run; every rank has one and calls it at the same steps.

    Args:
        digests: digests of shards and tokenizer; they must be equal in a checkpoint and in the run that resumes from
            it.
        on_published: called on rank 0, perhaps from a thread, with the step and the seconds from start to durable.
        on_failed: called likewise if a checkpoint could not be saved.
        fp8: state of FP8 products, None without any. If a checkpoint lacks it, it is reset.
        former: digests of earlier generations of the shards, which are accepted too.
        in_use: on rank 0, the steps whose checkpoints must not be deleted now.
    """

    def __init__(
        self,
        spec: TrainSpec,
        world: World,
        model: nn.Module,
        optimizers: Optimizers,
        digests: dict[str, str],
        on_published: Callable[[int, float], None],
        on_failed: Callable[[], None],
        fp8: Fp8State | TeState | None = None,
        former: Collection[str] = (),
        in_use: Callable[[], Collection[int]] = tuple,
    ) -> None:
        self._spec, self._world, self._model, self._optimizers = spec, world, model, optimizers
        self._fp8, self._former = fp8, former
        self._digests, self._on_published, self._on_failed = digests, on_published, on_failed
        self._in_use = in_use
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[str | None] | None = None
        self._copies: dict[str, Tensor] = {}
        self.saved_step = -1

    def save(self, step: int, cursor: dict[str, Any], scalars: dict[str, float]) -> None:
        """Save the state after `step` steps; returns once training may change the tensors again.

        A failed save (for example, disk full) is logged, leaves no files and does not end the run; `wait` reports it.

        Raises:
            DivergedError: on every rank, if weights or optimizer states of any rank are not finite. No later step can
                repair that.
        """
        self.wait()
        state = _state(self._model, self._optimizers)
        if broken := self._not_finite(state):
            before = checkpoint.newest_until(self._spec.run_dir, step)
            raise DivergedError(
                f"{broken} is not finite after step {step}, so there is no checkpoint of it; lower the learning rates; "
                f"{checkpoint.how_to_go_back(before)}",
            )
        began = time.monotonic()
        manifest = self._manifest(step, cursor, scalars)
        tensors = {**state, **_random_state(self._world), **self._fp8_state()}
        self.saved_step = step
        if self._spec.checkpoint.asynchronous:
            tensors = self._copy(tensors)
            self._pending = self._thread.submit(self._write, manifest, tensors, began)
        else:
            self._pending = Future()
            self._pending.set_result(self._write(manifest, tensors, began))

    def save_weights(self, folder: Path, step: int, cursor: dict[str, Any]) -> str | None:
        """Write the weights to `folder` as a checkpoint without optimizer state, from which no run resumes; for export.

        Returns:
            Why it failed; None if it is complete.
        """
        hidden = folder.with_name(f".unfinished-{folder.name}")

        def publish(files: dict[str, checkpoint.CheckpointFile]) -> None:
            checkpoint.complete(hidden, self._manifest(step, cursor, {}).model_copy(update={"files": files}))
            hidden.rename(folder)

        def clear() -> None:
            for former in (hidden, folder):
                shutil.rmtree(former, ignore_errors=True)
            hidden.mkdir(parents=True)

        try:
            self._write_files(hidden, _model_state(self._model), clear, publish)
        except (CheckpointException, _SaveFailed) as error:
            return _first_cause(error)
        return None

    def _manifest(self, step: int, cursor: dict[str, Any], scalars: dict[str, float]) -> CheckpointManifest:
        return CheckpointManifest(
            step=step,
            spec={VERSION_FIELD: version_of(self._spec)} | stored(self._spec),
            code_version=f"yaongi {importlib.metadata.version('yaongi')}, torch {torch.__version__}",
            digests=self._digests,
            cursor=cursor,
            world_size=self._world.size,
            scalars=scalars,
            files={},
        )

    def wait(self) -> str | None:
        """Wait for the save in progress; returns its error, None if it was published."""
        problem = self._pending.result() if self._pending else None
        self._pending = None
        if problem:
            self.saved_step = -1
        return problem

    def resume(self) -> CheckpointManifest | None:
        """Load the newest checkpoint that verifies into model, optimizers and random generators.

        Returns:
            Its manifest, or None if the run has none and starts from the beginning.

        Raises:
            CheckpointError: no checkpoint verifies.
            DataError, SpecError: it was trained on other data, or is of another model or optimizer.
            DivergedError: weights or optimizer states are not finite.
        """
        path = self._newest_whole()
        if path is None:
            return None
        manifest = checkpoint.read_manifest(path)
        self._refuse_other_run(path, manifest)
        stored = read_shapes(path)
        state = _state(self._model, self._optimizers)
        own_random = _random_state(self._world)
        tensors = state | {key: value for key, value in own_random.items() if key in stored}
        fp8 = self._fp8_state()
        if all(stored.get(key) == value.shape for key, value in fp8.items()):
            tensors |= fp8
        else:
            log.warning("%s has no amax history of this FP8 recipe and model; it is reset", path)
        _load(path, tensors, stored)
        if broken := self._not_finite(state):
            raise _holds(path, broken)
        if own_random.keys() <= stored.keys():
            torch.set_rng_state(own_random.pop(f"random.cpu.{self._world.rank}"))
            for state in own_random.values():
                torch.cuda.set_rng_state(state, self._world.device)
        else:  # a rank that did not exist in the saving run
            torch.manual_seed(self._spec.seed + (manifest.step << 20) + self._world.rank)
        self.saved_step = manifest.step
        return manifest

    def close(self) -> None:
        self._thread.shutdown(wait=True)

    def _fp8_state(self) -> dict[str, Tensor]:
        return {f"fp8.{key}": value for key, value in self._fp8.state_dict().items()} if self._fp8 else {}

    def _not_finite(self, tensors: dict[str, Tensor]) -> str | None:
        """Name of a tensor that is not finite on some rank, the same on every rank; None if all are finite."""
        found: list[str | None] = [None] * self._world.size
        dist.all_gather_object(found, not_finite(tensors), group=self._world.control)
        return next(filter(None, found), None)

    def _newest_whole(self) -> Path | None:
        """As `checkpoint.latest`; each rank reads a share of the files, so that no rank waits long."""
        found: list[Path] | CheckpointError | SpecError = []
        if self._world.is_main:
            checkpoint.clean_unfinished(self._spec.run_dir)
            try:
                existing = checkpoint.candidates(self._spec.run_dir)
                found = continuable(existing, self._spec)
                if found[:1] != existing[:1]:
                    log.warning(
                        "the run is %d steps long now: it continues from %s, where its learning rate had not "
                        "begun to fall; later training is discarded",
                        self._spec.steps,
                        found[0].name,
                    )
            except (CheckpointError, SpecError) as error:
                found = error
        found = self._world.broadcast(found)
        if isinstance(found, CheckpointError | SpecError):
            raise found
        return checkpoint.first_whole(found, self._verify_together)

    def _verify_together(self, path: Path) -> None:
        problem: CheckpointError | None = None
        try:
            checkpoint.verify(path, share=(self._world.rank, self._world.size))
        except CheckpointError as error:
            problem = error
        problems: list[CheckpointError | None] = [None] * self._world.size
        dist.all_gather_object(problems, problem, group=self._world.control)
        for problem in problems:
            if problem is not None:
                raise problem

    def _refuse_other_run(self, path: Path, manifest: CheckpointManifest) -> None:
        for name, digest in self._digests.items():
            if manifest.digests.get(name) not in {digest, *self._former}:
                raise DataError(
                    f"{path} was trained on {name} {manifest.digests.get(name)}, this run has {digest}; "
                    "use the same data, or another run_dir",
                )
        theirs = parse(ModelSpec, manifest.spec["model"], str(path), manifest.spec.get(VERSION_FIELD, 1))
        if different := _difference("train.model", stored(theirs), stored(self._spec.model)):
            field, theirs, ours = different
            raise SpecError(
                f"{path} holds another model: {field} is {theirs!r} there and {ours!r} in the spec; "
                "use the same model, or another run_dir",
            )
        optimizer, written_by = self._spec.optimizer.name, manifest.spec["optimizer"]["name"]
        if optimizer != written_by:
            raise SpecError(
                f"{path} holds the state of optimizer {written_by}, train.optimizer.name is {optimizer} in the spec; "
                "use the same optimizer, or another run_dir",
            )

    def _copy(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copy to host memory that is allocated once and, with a GPU, pinned, so that copying is fast."""
        pinned = self._world.device.type == "cuda"
        copies = {}
        for key, tensor in tensors.items():
            own, _ = own_rows(tensor)
            if key not in self._copies:
                self._copies[key] = torch.empty(own.shape, dtype=own.dtype, pin_memory=pinned)
            self._copies[key].copy_(own, non_blocking=pinned)
            copies[key] = self._copies[key] if own is tensor else _in_host_memory(tensor, self._copies[key])
        if pinned:
            torch.cuda.synchronize(self._world.device)
        return copies

    def _write(self, manifest: CheckpointManifest, tensors: dict[str, Tensor], began: float) -> str | None:
        """Write, describe and publish; a failure on any rank undoes it on all and is returned as one line."""
        run_dir, step = self._spec.run_dir, manifest.step
        hidden = checkpoint.unfinished_dir(run_dir, step)

        def clear() -> None:
            checkpoint.clean_unfinished(run_dir)
            hidden.mkdir(parents=True, exist_ok=True)  # NFS may keep an open file of an earlier one

        def publish(files: dict[str, checkpoint.CheckpointFile]) -> None:
            checkpoint.publish(run_dir, manifest.model_copy(update={"files": files}))
            keep = self._spec.checkpoint.keep_last
            checkpoint.prune(run_dir, keep, self._spec.decay_begins, self._in_use())
            self._on_published(step, time.monotonic() - began)

        try:
            self._write_files(hidden, tensors, clear, publish)
        except (CheckpointException, _SaveFailed) as error:
            free = shutil.disk_usage(run_dir).free / 2**30
            problem = f"checkpoint of step {step} was not saved: {_first_cause(error)} ({free:.1f} GiB free)"
            if self._world.is_main:
                checkpoint.clean_unfinished(run_dir)
                self._on_failed()
                log.error("%s; training continues, the previous checkpoint stays the newest", problem)
            return problem
        return None

    def _write_files(
        self,
        hidden: Path,
        tensors: dict[str, Tensor],
        clear: Callable[[], None],
        publish: Callable[[dict[str, checkpoint.CheckpointFile]], None],
    ) -> None:
        """Write tensors to `hidden` on all ranks together; before it rank 0 calls `clear`, and at the end `publish`."""
        main = self._world.is_main
        self._together(lambda: clear() if main else None)
        dcp.save(tensors, storage_writer=dcp.FileSystemWriter(hidden), process_group=self._world.background)
        described = self._together(lambda: self._describe_own(hidden))
        files = {name: file for part in described for name, file in part.items()}
        self._together(lambda: publish(files) if main else None)

    def _describe_own(self, hidden: Path) -> dict[str, checkpoint.CheckpointFile]:
        """Each rank reads back the files it wrote (`__<rank>_…`); the main rank also reads the index."""
        names = [entry.name for entry in hidden.glob(f"__{self._world.rank}_*")]
        return checkpoint.describe_files(hidden, [*names, INDEX] if self._world.is_main else names)

    def _together(self, work: Callable[[], Any]) -> list[Any]:
        """Run `work` on every rank; afterwards all ranks know whether all succeeded, and have all results."""
        try:
            mine: tuple[Any, str | None] = (work(), None)
        except OSError as error:
            mine = (None, str(error))
        gathered: list[Any] = [None] * self._world.size
        dist.all_gather_object(gathered, mine, group=self._world.background)
        if problems := [problem for _, problem in gathered if problem]:
            raise _SaveFailed(problems[0])
        return [result for result, _ in gathered]


class _SaveFailed(Exception):
    pass


def _difference(field: str, theirs: Any, ours: Any) -> tuple[str, Any, Any] | None:
    """The first field, with both values, in which a spec differs from a stored one; the latter may have more fields."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        found = (_difference(f"{field}.{key}", theirs.get(key), value) for key, value in sorted(ours.items()))
        return next(filter(None, found), None)
    return None if theirs == ours else (field, theirs, ours)


def load_model_weights(path: str | Path, model: nn.Module) -> checkpoint.CheckpointManifest:
    """Verify a checkpoint and load it into `model` (parameters and buffers) in one process; for evaluation and export.

    Raises:
        CheckpointError, DivergedError: it is damaged or holds another model; weights are not finite.
    """
    manifest = checkpoint.verify(path)
    load_model(path, model)
    return manifest


def load_model(
    path: str | Path, model: nn.Module, *, kept: Callable[[str], bool] | None = None, together: bool = False
) -> None:
    """Load a verified checkpoint into the parameters and buffers of `model`.

    Args:
        kept: whether tensors with this name keep their values if the checkpoint does not have them.
        together: a collective of all ranks, each of which loads what it holds; otherwise no process group is needed.

    Raises:
        CheckpointError, DivergedError: it holds another model; its weights are not finite.
    """
    state, stored = _model_state(model), read_shapes(Path(path))
    if kept:
        state = {key: value for key, value in state.items() if key in stored or not kept(key.removeprefix("model."))}
    _load(Path(path), state, stored, alone=not together)
    if broken := not_finite(state):
        raise _holds(Path(path), broken)


def not_finite(tensors: dict[str, Tensor]) -> str | None:
    """Name of the first tensor with an infinite or NaN element on this rank; waits for the device once."""
    names, extremes = [], []
    for name, tensor in tensors.items():
        own, _ = own_rows(tensor)
        if own.is_floating_point() and own.numel():
            names.append(name)
            extremes.append(torch.stack(own.aminmax()).double())  # NaN passes through; no copy of a tensor is made
    if not extremes:
        return None
    broken = (~torch.stack(extremes).isfinite()).any(1).tolist()
    return next((name for name, bad in zip(names, broken, strict=True) if bad), None)


def _holds(path: Path, broken: str) -> DivergedError:
    """The error for a checkpoint with non-finite values, published by an earlier version."""
    before = checkpoint.newest_until(path.parent.parent, checkpoint.step_of(path) - 1)
    return DivergedError(f"{path}: {broken} is not finite; {checkpoint.how_to_go_back(before)}")


def _model_state(model: nn.Module) -> dict[str, Tensor]:
    return {f"model.{name}": tensor for name, tensor in model.state_dict().items()}


def _state(model: nn.Module, optimizers: Optimizers) -> dict[str, Tensor]:
    """Replicated tensors or DTensors that share memory with model and optimizers, so that loading fills these."""
    return _model_state(model) | {f"optimizer.{name}": tensor for name, tensor in optimizers.state_dict().items()}


def _in_host_memory(tensor: DTensor, own: Tensor) -> DTensor:
    """`own` as this rank's part of a tensor sharded like `tensor`, without communication."""
    mesh = tensor.device_mesh
    on_host = DeviceMesh("cpu", mesh.mesh, mesh_dim_names=mesh.mesh_dim_names, _init_backend=False)
    return DTensor.from_local(
        own, on_host, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def _random_state(world: World) -> dict[str, Tensor]:
    """State of this rank's random generators, under names unique to the rank."""
    state = {f"random.cpu.{world.rank}": torch.get_rng_state()}
    if world.device.type == "cuda":
        state[f"random.cuda.{world.rank}"] = torch.cuda.get_rng_state(world.device)
    return state


def _load(path: Path, tensors: dict[str, Tensor], stored: dict[str, torch.Size], *, alone: bool = False) -> None:
    for key, tensor in tensors.items():
        if stored.get(key) != tensor.shape:
            have = "no such tensor" if key not in stored else f"shape {tuple(stored[key])}"
            raise CheckpointError(
                f"{path}: {key} should have shape {tuple(tensor.shape)}, the checkpoint has {have}; "
                "use the model and the optimizer that it was written with",
            )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # that is what `alone` says
        try:
            dcp.load(dict(tensors), storage_reader=Reader(path), no_dist=alone)
        except CheckpointException as error:  # not an Exception, so no other handler would turn it into one line
            raise CheckpointError(f"{path} cannot be loaded: {_first_cause(error)}") from None
    torch.autograd.graph.increment_version(list(tensors.values()))  # see trainer/ops/narrow.py


def _first_cause(error: BaseException) -> str:
    """One line from DCP's exception, which contains one exception per failed rank."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return in_words(" ".join(str(error).split()) or type(error).__name__)
