"""The training loop. `train` reads top to bottom: prepare, then steps of data → gradients → update → record →
validate → save.

Everything is reduced over ranks exactly once: gradients by `Mesh.summing_gradients`, and loss, expert loads and stop
requests in one vector per step. So all ranks always make the same decision at the same step.

Until the last kernel of a step is launched nothing is read from the device; then everything is, once (`outcome.read`).
So the device has work while the host decides and launches.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from trainer import distributed
from trainer.checkpoints import checkpoint
from trainer.data.loader import MicroBatch, StepBatch
from trainer.distributed import World
from trainer.errors import DivergedError, LaunchError, VolumeError
from trainer.optim import clip_gradients, learning_rate_factor
from trainer.outcome import Outcome, Totals, Update, agree, no_update, read, reduce_totals, why_skipped
from trainer.prepare import Run, prepare, scaler_state
from trainer.process import exclusive
from trainer.process.stopping import StopWish
from trainer.process.watchdog import Watchdog
from trainer.recording.recorder import StepRecord
from trainer.spec import MAX_SKIPPED_STEPS, TrainSpec

log = logging.getLogger(__name__)


def train(spec: TrainSpec) -> int:
    """Train from the newest checkpoint, or the start, to `spec.steps`; every rank calls this.

    Returns:
        0 if all steps are done; 75, 130 or 143 if it was stopped, with a checkpoint of the last step.

    Raises:
        ForeseenError: see trainer/errors.py; 69 while another process trains in the run directory.
    """
    stop = StopWish()
    started = time.time()
    world = distributed.start(spec.runtime, spec.seed)
    with Watchdog(spec.runtime.hang_timeout_seconds) as watchdog, only_training(spec, world):
        run = prepare(spec, world, started)
        watchdog.doing = run.recorder.doing
        watchdog.beat()

        def beat() -> None:
            watchdog.beat()
            run.recorder.beat()

        code = 0
        for step in range(run.first_step, spec.steps):
            with run.recorder.phase("data"):
                batch = next(run.loader)
            with run.recorder.phase("forward_backward"):
                totals = forward_backward(run, batch, stop.code())
            with run.recorder.phase("optimizer"):
                update = apply_gradients if batch.num_labels else nothing_to_learn
                updated = update(run, step, batch, totals)
            if run.fp8:
                run.fp8.finish_step()
            with run.recorder.phase("device"):
                outcome = read(totals, updated, batch)
            if batch.num_labels:
                judge(run, step, outcome)
            if run.fp8:
                run.recorder.fp8(step + 1, run.fp8)
            run.recorder.step(step_record(run, step, batch, outcome), run.loader.epochs(), batch.seq_len)
            watchdog.beat()
            last = step + 1 == spec.steps
            code = 0 if last else outcome.stop_code
            if run.validation and run.validation.is_due(step + 1) and not code:
                with run.recorder.phase("validation"):
                    tokens = sum(batch.tokens_by_source.values())
                    scores = run.validation.measure(step + 1, tokens, batch.seq_len, beat)
                run.recorder.validated(scores)
                watchdog.beat()
            if last or code or (step + 1) % spec.checkpoint.every_steps == 0:
                with run.recorder.phase("checkpoint"):
                    save_checkpoint(run, step + 1, batch)
                watchdog.beat()
            if code:
                log.info("stopping after step %d: %s", step + 1, stop.reason or "another rank was told to")
                break
        code = finish(run, stop, code, beat)
    return int(code)


@contextmanager
def only_training(spec: TrainSpec, world: World) -> Iterator[None]:
    """Rank 0 locks the run directory for all ranks; if it cannot, no rank trains."""
    with ExitStack() as held:
        problem: LaunchError | VolumeError | None = None
        if world.is_main:
            try:
                held.enter_context(exclusive.held(spec.run_dir))
            except (LaunchError, VolumeError) as error:
                problem = error
        if problem := world.broadcast(problem):
            raise problem
        yield


def forward_backward(run: Run, batch: StepBatch, stop_code: int) -> Totals:
    """Gradients of the global step's mean loss, accumulated over micro-batches and averaged over ranks."""
    device, size = run.world.device, run.world.size
    model = run.spec.model
    sums = torch.zeros(2 + 2 * (model.mtp.depth if model.mtp else 0), dtype=torch.float64, device=device)
    expert_load_LE: Tensor | None = None
    for number, micro_batch in enumerate(batch.micro_batches, start=1):
        with run.mesh.summing_gradients(run.step_model, last=number == len(batch.micro_batches)):
            ids_BT, labels_BT, seq_idx_BT = on_device(micro_batch, device)
            with run.recorder.own.measured(), run.precision.autocast(device.type):
                output = run.step_model(ids_BT, seq_idx_BT, labels_BT, micro_batch.num_documents)
            ce_sum = output.ce_sum + model.mtp_factor * output.mtp_ce_sum_K.sum()
            # Divided by counts of the whole step, so that the sum over ranks is the mean; the mean over ranks divides
            # by `size`.
            loss = size * (ce_sum / max(batch.num_labels, 1) + output.aux_sum / batch.num_rows)
            (run.scaler.scale(loss) if run.scaler else loss).backward()
        parts = (output.ce_sum[None], output.aux_sum[None], output.mtp_ce_sum_K, output.mtp_labels_K)
        sums += torch.cat([part.detach().double() for part in parts])
        load_LE = output.expert_load_LE
        expert_load_LE = load_LE if expert_load_LE is None else expert_load_LE + load_LE
    return reduce_totals(sums, expert_load_LE, stop_code)


def nothing_to_learn(run: Run, step: int, batch: StepBatch, totals: Totals) -> Update:
    """Skip a step without any label, which only sources with `loss: answers` can have.

    Otherwise momentum, weight decay and router balance would move the weights, and a loss of 0 would enter the spike
    guard's window. All ranks know the number of labels of the whole step. The step does not count towards divergence.
    """
    run.optimizers.set_learning_rate_factor(rate_factor(run, step))
    run.optimizers.zero_grad()
    return no_update(totals)


def rate_factor(run: Run, step: int) -> float:
    spec = run.spec
    return learning_rate_factor(
        step, spec.steps, spec.schedule, run.optimizers.peak_learning_rate, spec.begun_with_steps
    )


def apply_gradients(run: Run, step: int, batch: StepBatch, totals: Totals) -> Update:
    """Clip, update weights and router biases; non-finite steps and spikes (trainer/spikes.py) are skipped: launched
    like others, but they change nothing."""
    optimizers, spec = run.optimizers, run.spec
    optimizers.set_learning_rate_factor(rate_factor(run, step))
    if run.scaler:
        optimizers.unscale(run.scaler)
    norm, clipped = clip_gradients(optimizers.parameters, spec.optimizer.clip_norm)
    update = Update(norm, clipped, agree(why_skipped(totals.loss(batch.num_labels), norm, run.guard.limits())))
    optimizers.step(update.skip)
    run.model.update_router_bias(totals.expert_load_LE.masked_fill(update.skip, 0))  # equal loads move no bias
    if run.scaler:
        run.scaler.update()
    optimizers.zero_grad()
    return update


def judge(run: Run, step: int, outcome: Outcome) -> None:
    """Count skipped steps, and take the step's numbers into the spike guard's window.

    Raises:
        DivergedError: too many consecutive skipped steps.
    """
    run.guard.enter(outcome.loss, outcome.grad_norm)
    run.skipped_in_a_row = run.skipped_in_a_row + 1 if outcome.skipped else 0
    if run.skipped_in_a_row >= MAX_SKIPPED_STEPS:
        run.checkpoints.wait()  # it may be the checkpoint to go back to
        before = checkpoint.newest_until(run.spec.run_dir, step + 1 - run.skipped_in_a_row)
        raise DivergedError(
            f"{MAX_SKIPPED_STEPS} steps in a row were skipped, the last one, step {step + 1}, for {outcome.skipped}; "
            f"lower the learning rates, or pass over the data by train.skip; {checkpoint.how_to_go_back(before)}",
        )


def step_record(run: Run, step: int, batch: StepBatch, outcome: Outcome) -> StepRecord:
    seconds = run.recorder.step_seconds()
    return StepRecord(
        step=step + 1,
        loss=outcome.loss,
        auxiliary=outcome.auxiliary,
        grad_norm=outcome.grad_norm,
        learning_rate=run.optimizers.learning_rate,
        tokens=sum(batch.tokens_by_source.values()),  # an earlier part of the run may have had other settings
        tokens_per_second=run.spec.batch.tokens_per_step / seconds,
        seconds=seconds,
        clipped=outcome.clipped,
        skipped=outcome.skipped,
        expert_load_max_ratio=outcome.expert_load_max_ratio,
        expert_starved_ratio=outcome.expert_starved_ratio,
        by_source=batch.tokens_by_source,
        trained_share=batch.num_labels / (batch.num_rows * batch.seq_len) if batch.answers_only else None,
    )


def save_checkpoint(run: Run, step: int, batch: StepBatch) -> None:
    run.recorder.sync()
    scalars = {
        "seconds": run.recorder.seconds(),
        checkpoint.SKIPPED_IN_A_ROW: float(run.skipped_in_a_row),
    } | run.guard.state()
    if run.scaler:
        scalars |= {f"scaler.{name}": float(value) for name, value in scaler_state(run.scaler.state_dict()).items()}
    run.checkpoints.save(step, batch.cursor.to_dict(), scalars)


def finish(run: Run, stop: StopWish, code: int, beat: Callable[[], None]) -> int:
    """Wait for the last checkpoint and the exports, write the result, and exit together with the other ranks.

    A run that is stopped does not wait for exports; they are made when it is resumed.

    Returns:
        `code`, or that of a stop while this waits.
    """

    def wait_on(working: bool) -> bool:
        nonlocal code
        beat()
        working, code = run.world.broadcast((working, code or (stop.code() if working else 0)))
        return working and not code

    with run.recorder.phase("checkpoint"):
        problem = run.checkpoints.wait()
        if run.spec.exporting.initial or run.spec.exporting.checkpoints:
            run.exports.finish(wait_on)
    if problem:
        raise VolumeError(f"{problem}; free space or fix the volume, then resume")
    run.loader.close()
    path = checkpoint.step_dir(run.spec.run_dir, run.checkpoints.saved_step)
    if run.checkpoints.saved_step >= run.spec.steps and not code:
        run.recorder.result(path, checkpoint.read_manifest(path))
    run.recorder.close()
    run.checkpoints.close()
    run.world.barrier()  # an elastic job succeeds when the first worker exits 0, so all must exit at once
    distributed.stop()
    return code


def on_device(micro_batch: MicroBatch, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    tensors = (micro_batch.ids_BT, micro_batch.labels_BT, micro_batch.seq_idx_BT)
    return tuple(tensor.to(device, non_blocking=True) for tensor in tensors)
