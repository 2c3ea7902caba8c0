"""Training by Megatron-LM: the counterpart of trainer/loop.py. `train` reads top to bottom.

Each rank joins the process group and runs the same checks as under our own engine, then runs Megatron's own
pretrain_gpt.py in this process, with our arguments; Megatron uses the group that is there. What it prints becomes the
run's records (recording.py). After the last step the weights become a checkpoint of the run, so that evaluation, export
and everything else need not know Megatron.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import runpy
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

from trainer import distributed
from trainer.checkpoints.checkpoint import MEGATRON_FOLDER, MEGATRON_TRACKER, megatron_step, read_manifest
from trainer.data.manifest import Manifest
from trainer.distributed import World, device_bytes
from trainer.errors import DivergedError, SpecError
from trainer.exitcodes import ExitCode
from trainer.files import atomic_write
from trainer.fp8 import te
from trainer.loop import only_training
from trainer.megatron.arguments import BEGIN, BLEND, Dtype, arguments
from trainer.megatron.blend import blend
from trainer.megatron.check import Mesh, check
from trainer.megatron.compat import checkpoints_outlive_signals, name_the_format
from trainer.megatron.memory import refuse_too_large
from trainer.megatron.program import find_program
from trainer.megatron.recording import Recording
from trainer.megatron.relay import Relay, Tee
from trainer.precision import BF16_CAPABILITY, device_capability
from trainer.preflight.ranks import of_ranks
from trainer.prepare import read_data
from trainer.process import limits
from trainer.process.watchdog import Watchdog
from trainer.recording.recorder import Recorder
from trainer.spec import BackendsSpec, TrainSpec
from trainer.specbase import to_stored_yaml

log = logging.getLogger(__name__)

FUSED_GRADIENTS = "fused_weight_gradient_mlp_cuda"  # of APEX
NOT_FINITE = "Unexpected result"  # of Megatron's check of each micro-batch's loss, which ends the process
NO_ROWS = "no samples left to consume"  # of its sampler, when it resumes
NO_GPU = "requires CUDA"  # of its initialisation
LOOK_SECONDS = 1.0


def train(spec: TrainSpec) -> int:
    """Train from Megatron's newest checkpoint, or the start, to `spec.steps`; every rank calls this.

    Returns:
        0 if all steps are done; 75, 130 or 143 if it was stopped, with a checkpoint of the last step.

    Raises:
        ForeseenError: see trainer/errors.py; 69 while another process trains in the run directory.
    """
    started = time.time()
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron demands it; read when CUDA begins
    program = find_program()
    # Megatron's signal handler knows nccl and gloo, but not the name of a group that has both.
    world = distributed.start(spec.runtime, spec.seed, one_backend=True)
    with Watchdog(spec.runtime.hang_timeout_seconds) as watchdog, only_training(spec, world):
        recorder = Recorder(spec, world, started)
        recorder.preflight(of_ranks(spec.runtime.preflight, world))
        mesh = agreed_mesh(spec, world)
        dtype = agreed_dtype(spec, world)
        shards, _, _ = read_data(spec, world)
        available = {name: shards.counts(name, "train").tokens for name in spec.tokens.mix}
        recording = Recording(spec, world, recorder, watchdog, available)
        watchdog.doing = recording.doing
        write_inputs(spec, world, shards)
        recording.begin(build_info(world, mesh, dtype))
        code = 0
        if recording.step < spec.steps:
            command = arguments(
                spec, mesh, dtype, fused_gradients=importlib.util.find_spec(FUSED_GRADIENTS) is not None
            )
            with Relay(world, recording.take, watchdog.beat) as relay:
                code = run(program, command, relay)
            if recording.diverged:
                raise DivergedError(
                    f"{recording.diverged}; lower train.optimizer.adamw.learning_rate, or go back to an older "
                    f"checkpoint in {Path(spec.run_dir) / MEGATRON_FOLDER}"
                )
        world.barrier()
        if code:
            log.info("stopped after step %d", recording.step)
        recorder.sync()
        distributed.stop()  # the other ranks' GPUs are free while rank 0 converts the weights
        if not code and world.is_main:
            watchdog.doing = lambda: "conversion of the weights"
            finish(spec, recorder)
        recorder.close()
    return int(code)


def agreed_mesh(spec: TrainSpec, world: World) -> Mesh:
    """The mesh of all ranks.

    Raises:
        SpecError: Megatron cannot train this here; all ranks raise.
    """
    if world.device.type != "cuda" and spec.runtime.device != "cpu":
        raise SpecError("train.engine megatron needs a GPU for each rank, and there is none here that works")
    mesh = check(spec, world.size)
    least = min((size for size in world.gather(device_bytes(world.device)) if size is not None), default=None)
    if least is not None:
        refuse_too_large(spec, mesh, least, "a GPU's")
    log.info("mesh: %s, %d micro-batches each per step", mesh, mesh.micro_batches)
    return mesh


def agreed_dtype(spec: TrainSpec, world: World) -> Dtype:
    """FP8 if every rank can, else BF16, with the reason in one line.

    Raises:
        SpecError: FP8 was asked for by name and a rank cannot, or a GPU has no BF16.
    """
    precision, capability = spec.precision, device_capability(world.device)
    if capability is not None and capability < BF16_CAPABILITY:
        raise SpecError("train.engine megatron: this GPU has no BF16; use a newer one, or train.engine yaongi")
    if precision.dtype == "bf16":
        log.info("precision: bf16 (asked for)")
        return "bf16"
    problems = world.gather(te.problem(precision.fp8, capability))
    problem = next((each for each in problems if each), None)
    if problem is None:
        log.info("precision: fp8 (%s scaling, by Transformer Engine)", precision.fp8.recipe)
        return "fp8"
    if precision.dtype == "fp8":
        raise SpecError(f"train.precision.dtype fp8: {problem}; write bf16 or auto")
    log.info("precision: bf16, as FP8 cannot be had: %s", problem)
    return "bf16"


def write_inputs(spec: TrainSpec, world: World, shards: Manifest) -> None:
    """Write what Megatron reads besides the shards: the blend, and the weights to begin with.

    Raises:
        DataError, SpecError: as `blend`; CheckpointError: the model of `init_from` is damaged.
    """
    run_dir, files = Path(spec.run_dir), blend(spec, shards)
    begin, tracker = run_dir / BEGIN, run_dir / BEGIN / MEGATRON_TRACKER
    wanted = spec.init_from is not None and not megatron_step(run_dir)
    if world.is_main:
        (run_dir / BLEND).parent.mkdir(parents=True, exist_ok=True)
        atomic_write(run_dir / BLEND, json.dumps(files, indent=1).encode())
        if not (file := run_dir / "train.yaml").exists():
            atomic_write(file, to_stored_yaml(spec))
        if wanted:
            from trainer.megatron.weights import from_model

            from_model(spec, begin)
    while wanted and not tracker.exists():  # a barrier would time out before tens of gigabytes are written
        time.sleep(LOOK_SECONDS)
    world.barrier()


def run(program: Path, command: Sequence[str], relay: Relay) -> int:
    """Run Megatron in this process; returns 0, or the exit code of a stop.

    Raises:
        DivergedError: the loss is not a number.
        SpecError: this release of Megatron does not know an argument, or there is no GPU.
    """
    log.info("starting %s %s", program, " ".join(command))
    sys.argv = [str(program), *command]
    sys.path.insert(0, str(program.parent))
    name_the_format()
    try:
        tee = Tee(sys.stdout, relay.line)
        with checkpoints_outlive_signals(), interrupts_stop() as interrupted, redirect_stdout(tee):
            runpy.run_path(str(program), run_name="__main__")
    except SystemExit as ended:
        if ended.code in (None, 0):  # a checkpoint was saved after a stop signal; of any rank, perhaps not this one
            return _stop_code(interrupted)
        if ended.code == ExitCode.SPEC:
            raise SpecError("Megatron's parser refused an argument; its line above says which") from None
        raise RuntimeError(f"Megatron ended with exit code {ended.code}") from ended
    except AssertionError as error:
        if NO_GPU in str(error):
            raise SpecError("train.engine megatron needs a GPU, and train.runtime.device is cpu; write auto") from None
        if NO_ROWS in str(error):
            raise SpecError(
                "train.evaluate: Megatron has validated on more rows already than these every_steps and "
                "every_max_tokens give; write the former ones, or every_steps null"
            ) from None
        raise
    except RuntimeError as error:
        if NOT_FINITE in str(error):
            raise DivergedError(
                f"{' '.join(str(error).split())[:200]}; lower train.optimizer.adamw.learning_rate, or go back to an "
                "older checkpoint"
            ) from error
        raise
    return 0


@contextmanager
def interrupts_stop() -> Iterator[list[int]]:
    """SIGINT acts as SIGTERM, on which Megatron saves and ends; the list then has its number."""
    seen: list[int] = []

    def pass_on(number: int, _frame: object) -> None:
        seen.append(number)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGINT, pass_on)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)


def _stop_code(interrupted: list[int]) -> int:
    if limits.told():
        return ExitCode.LIMIT
    return ExitCode.INTERRUPTED if interrupted else ExitCode.TERMINATED


def finish(spec: TrainSpec, recorder: Recorder) -> None:
    """Make a checkpoint of the run from Megatron's last one, and write the result.

    Raises:
        CheckpointError: Megatron's checkpoint is damaged, or of another model.
    """
    from trainer.megatron.weights import to_checkpoint

    path = to_checkpoint(spec, Path(spec.run_dir) / MEGATRON_FOLDER)
    recorder.result(path, read_manifest(path))


def build_info(world: World, mesh: Mesh, dtype: Dtype) -> dict[str, str]:
    """Labels of the metric build_info; Megatron chooses its own implementations."""
    operations = dict.fromkeys(BackendsSpec.model_fields, "megatron")
    return {"device": world.device.type, "mesh": str(mesh), "precision": dtype, **operations}
