"""The training loop: steps, and what is due between them."""

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass

import torch

from megavideo.config.schema import Config
from megavideo.data.batch import Batch, BatchStream
from megavideo.engine.engine import Engine, StepResult
from megavideo.engine.errors import RunFailed
from megavideo.engine.snapshot import Saved, Saver
from megavideo.log import log, progress
from megavideo.train.evaluate import held_out_loss
from megavideo.train.metrics import Row
from megavideo.train.record import Recorder
from megavideo.train.stop import StopRequest, stop_on_signals

# So many saves in a row may fail before a run stops: weights in memory are worth more than a clean
# stop while somebody may still make room, but not to train on for days without a checkpoint.
FAILED_SAVES = 3


@dataclass
class Run:
    """One training run.

    Attributes:
        training, validation: the streams; without `validation` nothing is evaluated.
        saver: its checkpoints.
        saved_step: the newest checkpoint's.
        save_tried: the step of the newest that was begun.
        failed_saves: in a row.
        diverging_steps: skipped in a row because loss or gradient was not finite.
    """

    config: Config
    engine: Engine
    training: BatchStream
    validation: BatchStream | None
    recorder: Recorder
    saver: Saver
    saved_step: int
    save_tried: int
    failed_saves: int = 0
    diverging_steps: int = 0

    @property
    def step(self) -> int:
        """Steps done."""
        return self.engine.progress.step


def train(run: Run) -> None:
    """Train until recipe.steps or a signal, then save.

    Raises:
        RunFailed: if the loss stays without a finite value, a frozen weight changed, or the last
            checkpoint could not be written.
    """
    replica = run.engine.world.mesh.dp
    batches = run.training.micro_batches(
        run.engine.progress.consumed_samples, replica.rank, replica.size
    )
    with (
        closing(run.recorder),
        closing(batches),  # type: ignore[type-var]  # a generator: closing it stops its threads
        stop_on_signals() as stop,
        progress("training", run.config.recipe.steps) as advance,
    ):
        advance(run.step)
        try:
            _train_steps(run, batches, stop, advance)
        except RunFailed:  # which all ranks raise alike
            _note_saved(run, run.saver.finish())
            raise
        if run.save_tried != run.step:
            _save(run)
        _note_saved(run, run.saver.finish())
        while run.failed_saves:  # up to FAILED_SAVES: no later step will try again
            _save(run)
            _note_saved(run, run.saver.finish())


def _train_steps(
    run: Run, batches: Iterator[Batch], stop: StopRequest, advance: Callable[..., None]
) -> None:
    while run.step < run.config.recipe.steps and not _stop_requested(run, stop):
        result = run.engine.train_batch(batches)
        run.recorder.add(result)
        advance(note=_note(result))
        _check_divergence(run, result)
        with run.recorder.paused():
            _note_saved(run, run.saver.poll())
        _do_what_is_due(run)


def _stop_requested(run: Run, stop: StopRequest) -> bool:
    """Whether any rank got a signal: all agree on the step to stop at."""
    if not run.engine.world.any(stop.signal_name is not None):
        return False
    who = stop.signal_name or "a signal on another rank"
    log.info("%s: saving and stopping at step %d; run it again to go on", who, run.step)
    return True


def _check_divergence(run: Run, result: StepResult) -> None:
    limit = run.config.recipe.nonfinite_limit
    if not result.skipped:
        run.diverging_steps = 0
    elif result.diverging:
        run.diverging_steps += 1
        values = f"loss {result.loss}, grad norm {result.grad_norm}"
        log.warning("step %d was skipped: %s", run.step, values)
    if run.diverging_steps >= limit:
        raise RunFailed(
            f"loss or gradient was not finite in {limit} steps in a row, up to step {run.step} "
            f"(recipe.nonfinite_limit); none of them changed the weights, and the last checkpoint "
            f"is step {run.saved_step}. Lower recipe.optimizer.lr, or look at the samples before "
            f"number {run.engine.progress.consumed_samples}"
        )


def _do_what_is_due(run: Run) -> None:
    settings, last = run.config.run, run.step == run.config.recipe.steps

    def due(every: int) -> bool:
        return every > 0 and (run.step % every == 0 or last)

    if due(settings.log_every):
        run.recorder.write_steps(run.step, _data_counts(run))
    with run.recorder.paused():
        if due(settings.evaluate_every):
            _evaluate(run)
        if due(settings.save_every):
            _save(run)


def _data_counts(run: Run) -> Row:
    """Damaged samples that were replaced, and texts that were cut, on all replicas so far."""
    own = torch.tensor([run.training.bad_samples, run.training.cut_texts])
    bad_samples, cut_texts = run.engine.world.total(own).tolist()
    return {"bad_samples": bad_samples, "cut_texts": cut_texts}


def _evaluate(run: Run) -> None:
    assert run.validation is not None, "config refuses evaluate_every without data.validation"
    engine, world = run.engine, run.engine.world
    replica, recipe = world.mesh.dp, run.config.recipe
    batches = run.validation.held_out_batches(
        run.config.run.evaluate_samples, recipe.micro_batch, replica.rank, replica.size
    )
    with engine.evaluating():
        held_out = held_out_loss(engine.frame_losses, batches, world)
    log.info("step %d: held-out loss %.4f", run.step, held_out.loss)
    run.recorder.write_held_out(run.step, held_out)


def _save(run: Run) -> None:
    """Save, in the background if run.async_save; one save waits for the one before."""
    _note_saved(run, run.saver.finish())
    run.save_tried = run.step
    run.saver.save()
    if not run.config.run.async_save:
        _note_saved(run, run.saver.finish())


def _note_saved(run: Run, saved: Saved | None) -> None:
    """Write down how a save ended; one that failed is tried again when the next is due.

    Raises:
        RunFailed: if several in a row failed.
    """
    if saved is None:
        return
    run.recorder.write_saved(run.step, saved)
    if saved.problem is None:
        run.saved_step, run.failed_saves = saved.step, 0
        return
    run.failed_saves += 1
    if run.engine.world.rank == 0:
        log.error("step %d was NOT saved: %s", saved.step, saved.problem)
    if run.failed_saves == FAILED_SAVES:
        raise _unsaved(run)


def _unsaved(run: Run) -> RunFailed:
    return RunFailed(
        f"step {run.save_tried} could not be saved, for the reason above. The newest checkpoint is "
        f"step {run.saved_step}: run it again to go on from there"
    )


def _note(result: StepResult) -> str:
    return (
        f"loss {result.loss:.4f}  grad norm {result.grad_norm:.3f}  lr {result.learning_rate:.2e}"
    )
