# SPDX-License-Identifier: Apache-2.0
"""Watches the numbers of a run, and says when to go back.

An update whose loss or gradients are not finite is not made: step.py sees to that, the
same on all devices. What is here reads the metrics of each step on the host. They are
sums over all devices, so that every process comes to the same answer by itself.
"""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lm_scale.data.windows import Windows, leave_out
from lm_scale.errors import InputError


@dataclass(frozen=True)
class Guard:
    """What happens if the loss or the gradients are not finite, or the loss jumps up.

    An update that is not made still uses up its batch and its step.
    """

    # off: updates are made with whatever comes. skip: an update is not made if the loss
    # or a gradient is not finite. rollback: as skip, and the run goes back to the last
    # good checkpoint, and leaves batches out, if many were skipped or the loss jumps.
    policy: Literal["off", "skip", "rollback"] = "skip"
    patience: int = 10  # updates skipped in a row, at which it rolls back, or ends
    # rollback: how far the loss of a batch may be above the median of those before it,
    # in standard deviations of their noise, robustly estimated; None: no matter. With
    # 10, noise alone will not do it; 0.04 nats of it and a jump of half a nat do.
    spike: float | None = 10.0
    window: int = 200  # rollback: batches left out, the offending one the last of them
    rollbacks: int = 3  # so many at most, then the run ends
    # Steps after which devices that hold the same weights compare them, by a hash; a
    # run whose copies differ ends. They do so at each save, too; None: only then.
    check_replicas: int | None = None

    def __post_init__(self):
        for name in ("patience", "window", "rollbacks", "check_replicas"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(
                    f"guard.{name} = {getattr(self, name)}: expected a number above 0."
                )
        if self.spike is not None and not 0 < self.spike < math.inf:
            raise InputError(
                f"guard.spike = {self.spike}: expected a number of deviations above 0, "
                f"or None for no such test."
            )
        if self.policy == "rollback" and self.window < self.patience:
            raise InputError(
                f"guard.window = {self.window} is less than guard.patience = "
                f"{self.patience}: the first of so many bad batches would come again. "
                f"Change one of the two."
            )


@dataclass(frozen=True)
class Trouble:
    """Why a run cannot go on as it is.

    Steps are those of the logs, counted from 1: step n trains on the n-th batch.
    """

    what: str  # for the log, without step numbers
    first: int  # the first offending step; states saved before it are good
    noticed: int  # the last offending step


# The median is that of so many losses at most: enough for a steady estimate, few enough
# that a loss which falls by itself does not leave it far behind.
HISTORY = 100
# With fewer, no loss is judged: so it is after a start, a resume and a rollback.
ENOUGH = 25
# A deviation is at least so many nats, and that share of the median. Of losses that
# hardly vary (one batch again and again, learning rate 0) any change would be a jump.
FLOOR = 0.01
# Standard deviations in a median absolute deviation, if what deviates is normal.
NORMAL = 1.4826


class Health:
    """Judges the metrics of one step after the other.

    It starts with no history: make a new one after a rollback, or `reset` it. Neither
    the losses nor the skipped updates before a resume are known to it.
    """

    def __init__(self, guard: Guard):
        self.guard = guard
        self.losses: deque[float] = deque(maxlen=HISTORY)
        self.skipped = 0  # updates, in a row up to now

    def reset(self) -> None:
        """Forgets all steps, as the run goes back before them."""
        self.losses.clear()
        self.skipped = 0

    def observe(self, step: int, values: Mapping[str, float]) -> Trouble | None:
        """What is wrong after this step (counted from 1), if anything.

        values: the step's metrics `loss` and, unless the guard is off, `skipped`. To be
        called for each step, in order. By policy "skip" only skipped updates count.
        """
        if self.guard.policy == "off":
            return None
        if values["skipped"]:
            return self._skip(step)
        self.skipped = 0
        if self.guard.policy == "skip":
            return None
        return self._judge(step, values["loss"])

    def _skip(self, step: int) -> Trouble | None:
        """Its loss, even if it is finite, does not enter the history."""
        self.skipped += 1
        if self.skipped < self.guard.patience:
            return None
        what = f"{self.skipped} updates in a row had a loss or gradients not finite"
        return Trouble(what, first=step - self.skipped + 1, noticed=step)

    def _judge(self, step: int, loss: float) -> Trouble | None:
        """A loss that has jumped does not enter the history either."""
        if self.guard.spike is not None and len(self.losses) >= ENOUGH:
            median, deviation = level_and_noise(self.losses)
            if loss > median + self.guard.spike * deviation:
                far, number = (loss - median) / deviation, len(self.losses)
                what = (
                    f"the loss of {loss:.4f} is {far:.1f} deviations of "
                    f"{deviation:.4f} above {median:.4f}, the median of {number} "
                    f"before it"
                )
                return Trouble(what, first=step, noticed=step)
        self.losses.append(loss)
        return None


def level_and_noise(losses: deque[float]) -> tuple[float, float]:
    """Their median, and the standard deviation of their noise, `FLOOR` at least.

    The noise is that of each loss's difference from the one before it, which varies by
    the root of two more. From the median, losses that fall or rise deviate by their
    trend: a threshold by that is blind while they fall, and a slow divergence moves it.
    """
    values = np.array(losses, np.float64)
    median = float(np.median(values))
    noise = NORMAL * float(np.median(np.abs(np.diff(values)))) / math.sqrt(2)
    return median, max(noise, FLOOR, FLOOR * median)


def after_rollback(
    left_out: Windows, trouble: Trouble, *, checkpoint: int, window: int
) -> Windows:
    """What is left out from then on: the last `window` batches that were trained on.

    But none from before the checkpoint, the step that the run goes back to: these have
    made its state. `left_out`: as it was until now. Raises ValueError if the checkpoint
    is of an offending step, or a later one.
    """
    if checkpoint >= trouble.first:
        raise ValueError(
            f"The checkpoint of step {checkpoint} is not from before the trouble, "
            f"which began at step {trouble.first}."
        )
    first = max(checkpoint, trouble.noticed - window)  # as counted from 0
    return leave_out(left_out, first, trouble.noticed)
