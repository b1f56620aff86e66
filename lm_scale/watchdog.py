# SPDX-License-Identifier: Apache-2.0
"""No run hangs for ever: what takes too long is ended, having shown where it stands."""

import threading
from collections import defaultdict, deque
from collections.abc import Hashable

from lm_scale.distributed import end_run

TICK = 1.0  # s
LEAST = 60.0  # s that a step may always take, if its limit is found by observation
TIMES = 20  # so many times the slowest of the recent ones
RECENT = 100  # steps, or batches of an evaluation
# Metrics are read a step late, the first ones after a pause two. Until then a process
# that is through with something long may be waiting for one that is not.
LATE = 2
HANG = 75  # exit status, as after a signal: run the same command again


class Watchdog:
    """Ends all processes of the run if one piece of work takes longer than its limit.

    Enter it around the work, and call `begin` where a piece begins: it lasts until the
    next one. Past its limit, every process prints the stacks of its threads and exits
    with status 75: a hang is most often a machine's fault, and the run goes on from its
    newest checkpoint.

    Time is counted in ticks of a thread of its own, not by the clock. So a process that
    was suspended, stopped by a debugger or starved is not judged for that time. If it
    hangs with Python's lock held, the other processes find it, but not itself.

    Args:
        step_limit: s that a step, or a batch of an evaluation, may take; 0: no limit;
            None: 20 times the slowest of the last 100 of its kind, at least 60 s.
        wait_limit: s that any other piece of work may take; 0: no limit.
    """

    def __init__(self, step_limit: float | None, wait_limit: float):
        self.step_limit = step_limit
        self.wait_limit = wait_limit and max(wait_limit, step_limit or 0)
        self._ticks = 0
        self._seen: set[tuple[str, Hashable]] = set()
        self._recent: dict[str, deque[float]] = defaultdict(
            lambda: deque(maxlen=RECENT)
        )
        self._since_long = 0  # pieces since the last one that `wait_limit` held for
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog")
        self._thread.daemon = True

    def __enter__(self) -> "Watchdog":
        self.begin("setting up")
        if self.step_limit != 0 or self.wait_limit != 0:
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._left.set()
        if self._thread.is_alive():
            self._thread.join()  # for ever, if it is ending the process

    def begin(self, work: str, shape: Hashable = None) -> None:
        """Says what is being done from now on, such as "saving a checkpoint".

        With a shape, of its batch, it is one of many of its kind and has `step_limit`;
        but `wait_limit` if it is the first of this shape, which is compiled, or the
        first or second after anything long.
        """
        if self._since_long > LATE:
            former, _, start = self._work
            self._recent[former].append((self._ticks - start) * TICK)
        long = shape is None or (work, shape) not in self._seen
        self._seen.add((work, shape))
        self._since_long = 0 if long else self._since_long + 1
        limit = self.wait_limit
        if self._since_long > LATE:
            limit = self._step_limit(work)
        self._work = work, limit, self._ticks  # in one: the thread reads it

    def _step_limit(self, work: str) -> float:
        if self.step_limit is not None:
            return self.step_limit
        recent = self._recent[work]
        return max(LEAST, TIMES * max(recent)) if recent else self.wait_limit

    def _watch(self) -> None:
        while not self._left.wait(TICK):
            self._ticks += 1
            work, limit, start = self._work
            passed = (self._ticks - start) * TICK
            if limit and passed > limit:
                self._end(work, passed, limit)

    def _end(self, work: str, passed: float, limit: float) -> None:
        message = (
            f"{work} has not ended after {passed:.0f} s, its limit is {limit:g} s "
            f"(`step_limit`, `wait_limit`). Where each thread hangs is below. It is "
            f"most often a machine's fault: run the same command to go on."
        )
        end_run(message, HANG, told=f"hangs: {message}", stacks=True)
