# SPDX-License-Identifier: Apache-2.0
"""The loop of a run: steps, and on the way evaluations, saves, and what goes wrong."""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.sharding import Mesh

from lm_scale import distributed
from lm_scale.checkpoint import Saver
from lm_scale.config import RunConfig
from lm_scale.data.loader import EvalBatches, TrainBatches, device_batches
from lm_scale.data.streamed import Place, StreamedBatches, merged
from lm_scale.data.windows import Windows, batch_number
from lm_scale.distributed import Request, Vote
from lm_scale.evaluate import evaluate
from lm_scale.guard import Health, Trouble
from lm_scale.metrics import MetricsLogger
from lm_scale.replicas import Replicas
from lm_scale.signals import Signals
from lm_scale.step import TrainState
from lm_scale.watchdog import Watchdog

Metrics = dict[str, jax.Array]


@dataclass
class Loop:
    """What goes on, step after step, and what it has come to.

    All processes make the same calls in the same order: what one of them alone knows
    (a signal, a failed save) is voted on.
    """

    config: RunConfig
    mesh: Mesh
    batches: TrainBatches | StreamedBatches
    held_out: EvalBatches | None  # None: nothing is evaluated
    steps: int  # of the whole run
    train_step: Callable[[TrainState, dict], tuple[TrainState, Metrics]]
    eval_step: Callable
    saver: Saver
    metrics: MetricsLogger
    signals: Signals
    watchdog: Watchdog
    publish: Callable[[TrainState], None]  # called with each state that is to be saved
    left_out: Windows = ()  # batch numbers that training passes over
    trouble: Trouble | None = None  # why it ended early, if it was not told to
    losses: dict[int, float] = field(default_factory=dict)  # held-out, by step

    def __post_init__(self):
        self.health = Health(self.config.guard)
        self.vote = Vote(self._wanted, self.mesh)
        self.replicas = Replicas(self.config.guard.check_replicas)
        self._pending: tuple[int, Metrics] | None = None

    def run(self, state: TrainState) -> TrainState:
        """Makes steps until the last one, a signal, or trouble."""
        config, step = self.config, int(state.step)
        last = min(self.steps, config.stop_at or self.steps)
        for batch in self.metrics.timed(self._source(step, last)):
            self.watchdog.begin("a train step", batch["tokens"].shape)
            state, values = self.train_step(state, batch)
            step += 1
            # Not before: until then nothing is lost by ending at once.
            self.signals.at_once = None
            # The metrics of the step before are read only now, with this step under
            # way, so that the devices never wait for the host.
            self._log()
            self._pending = (step, values)
            self.replicas.ask(step, state.params)
            self.saver.poll()
            self._pause(state, step)
            request = self.vote()
            if request is Request.SAVE and distributed.from_first(self.saver.idle):
                self._save(state)
            if request is Request.STOP or (
                request is Request.ROLL_BACK and self._agree_on_trouble()
            ):
                break
        self._log()
        self._agree_on_trouble()
        return state

    def _source(self, start: int, stop: int) -> Iterator[dict[str, jax.Array]]:
        """The batches of these steps, on the mesh."""
        mesh, rules = self.mesh, self.config.compute.rules
        span: Any = {"start": start, "stop": stop, "left_out": self.left_out}
        if not isinstance(self.batches, StreamedBatches):
            return device_batches(self.batches, mesh, rules, **span)
        self.batches.shards.tell = self.metrics.print

        def wait() -> None:
            self.watchdog.begin("waiting for the text of a stream")

        return self.batches.device_batches(mesh, rules, patience=wait, **span)

    def _stream(self) -> Place | None:
        """Where the stream of all processes, if it is one, goes on after this step."""
        reached = self.batches.reached
        return None if reached is None else merged(distributed.everyone(reached))

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """The held-out loss and the rest of it; empty if a signal came meanwhile."""
        assert self.held_out is not None  # config.evaluates
        results = evaluate(
            self.eval_step, state.params, self.held_out, self.mesh,
            self.config.compute.rules, lambda: self.vote() is Request.STOP,
            self.watchdog,
        )  # fmt: skip
        if results:
            self.losses[int(state.step)] = results["loss"]
        return results

    def finish(self, state: TrainState) -> dict[str, float]:
        """Saves the last state and, if it is the run's last, evaluates it.

        Returns when it is on disk. Empty if there is nothing to evaluate, or a signal
        came meanwhile.
        """
        step, results = int(state.step), {}
        self.watchdog.begin("saving the last checkpoint")
        if not self.config.keep_best:  # which wants to know first how good it is
            self.saver.wait()
            self.saver.save(state, left_out=self.left_out, stream=self._stream())
        if step == self.steps and self.config.eval_at_end:
            results = self.evaluate(state)
        self.watchdog.begin("saving the last checkpoint")
        self.saver.finish(
            state, eval_loss=self.losses.get(step), left_out=self.left_out,
            stream=self._stream(),
        )  # fmt: skip
        if results and not self.metrics.has_eval(step):
            self.metrics.log_eval(step, results)
        return results

    def go_back(self, step: int, left_out: Windows, place: Place | None) -> None:
        """From here on the run goes on from an earlier step, without these batches."""
        self.left_out, self.trouble, self.batches.reached = left_out, None, place
        self.losses = {at: loss for at, loss in self.losses.items() if at <= step}
        self.saver.forget_after(step)
        self.metrics.go_back(step)
        self.health.reset()
        self.vote.reset()

    def _pause(self, state: TrainState, step: int) -> None:
        """Evaluates and saves, if that is due after this step."""
        config = self.config
        eval_due = config.eval_every and step % config.eval_every == 0
        eval_due = eval_due and not (step == self.steps and config.eval_at_end)
        save_due = config.save_every and step % config.save_every == 0
        if not (eval_due or save_due):
            return
        self._log()  # waits for the step: its time is the step's, not the pause's
        with self.metrics.pause():
            if eval_due and (results := self.evaluate(state)):
                self.metrics.log_eval(step, results)
            if save_due:  # after it: a run that goes on from here has both
                self._save(state)

    def _save(self, state: TrainState) -> None:
        """Starts to save a state that nothing is known to be wrong with."""
        self._log()
        if distributed.from_first(self.trouble is not None):
            return
        self.watchdog.begin("saving a checkpoint")
        self.saver.save(
            state, eval_loss=self.losses.get(int(state.step)), left_out=self.left_out,
            stream=self._stream(),
        )  # fmt: skip
        self.publish(state)

    def _log(self) -> None:
        """Reads the metrics of the step that is pending, and judges them."""
        if self._pending is None:
            return
        (step, values), self._pending = self._pending, None
        numbers = {name: float(value) for name, value in values.items()}
        self.replicas.read()
        self.trouble = self.trouble or self.health.observe(step, numbers)
        write = step % self.config.log_every == 0 or step == self.steps
        write = write or (step == 1 and self.config.log_first)
        if write:
            # Batches that were left out on the way count as seen.
            seen = self.batches.epochs(batch_number(step - 1, self.left_out) + 1)
            numbers |= {f"epochs/{name}": x for name, x in seen.items() if name}
        self.metrics.log_step(step, numbers, write=write)

    def _wanted(self) -> Request:
        """What this process wants of all."""
        if self.signals.told.is_set() or self.batches.error is not None:
            return Request.STOP
        if self.trouble is not None:
            return Request.ROLL_BACK
        return Request.SAVE if self.saver.due else Request.NONE

    def _agree_on_trouble(self) -> bool:
        """Lets all processes have the trouble that one of them has seen, if any."""
        own = None if self.trouble is None else dataclasses.asdict(self.trouble)
        found = [told for told in distributed.everyone(own) if told]
        self.trouble = Trouble(**found[0]) if found else None
        return self.trouble is not None
