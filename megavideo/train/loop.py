"""The training loop: steps, and what is due between them."""

from contextlib import closing
from dataclasses import dataclass

from megavideo.config.schema import Config
from megavideo.data.batch import BatchStream
from megavideo.engine.engine import Engine, StepResult
from megavideo.engine.errors import RunFailed
from megavideo.engine.snapshot import save_checkpoint
from megavideo.log import log, progress
from megavideo.train.evaluate import held_out_loss
from megavideo.train.record import Recorder
from megavideo.train.stop import StopRequest, stop_on_signals


@dataclass
class Run:
    """One training run.

    Attributes:
        training, validation: the streams; without `validation` nothing is evaluated.
        saved_step: the newest checkpoint's.
        diverging_steps: skipped in a row because loss or gradient was not finite.
    """

    config: Config
    engine: Engine
    training: BatchStream
    validation: BatchStream | None
    recorder: Recorder
    saved_step: int
    diverging_steps: int = 0

    @property
    def step(self) -> int:
        """Steps done."""
        return self.engine.progress.step


def train(run: Run) -> None:
    """Train until recipe.steps or a signal, then save.

    Raises:
        RunFailed: if the loss stays without a finite value, or a frozen weight changed.
    """
    engine, steps = run.engine, run.config.recipe.steps
    replica = engine.world.mesh.dp
    batches = run.training.micro_batches(
        engine.progress.consumed_samples, replica.rank, replica.size
    )
    with (
        closing(run.recorder) as recorder,
        closing(batches),  # type: ignore[type-var]  # a generator: closing it stops its threads
        stop_on_signals() as stop,
        progress("training", steps) as advance,
    ):
        advance(run.step)
        while run.step < steps and not _stop_requested(run, stop):
            result = engine.train_batch(batches)
            recorder.add(result)
            advance(note=_note(result))
            _check_divergence(run, result)
            _do_what_is_due(run)
        if run.saved_step != run.step:
            _save(run)


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
        run.recorder.write_steps(run.step, run.training.bad_samples)
    with run.recorder.paused():
        if due(settings.evaluate_every):
            _evaluate(run)
        if due(settings.save_every):
            _save(run)


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
    save_checkpoint(run.engine, run.config, run.training.fingerprint)
    run.saved_step = run.step


def _note(result: StepResult) -> str:
    return (
        f"loss {result.loss:.4f}  grad norm {result.grad_norm:.3f}  lr {result.learning_rate:.2e}"
    )
