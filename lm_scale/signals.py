# SPDX-License-Identifier: Apache-2.0
"""SIGINT and SIGTERM: the first one stops a run, saved; the second one ends it."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from lm_scale.distributed import end_run, prefix

STOPPED = 75  # exit status: run the same command to go on
NUMBERS = (signal.SIGINT, signal.SIGTERM)
# Slurm sends SIGTERM twice in the same second when it preempts a job: to the step, and
# to all that the batch script has started. That is one wish, not two.
ECHO = 1.0  # s


class Signals:
    """What a first signal does to the run, which sets it as it goes on."""

    def __init__(self):
        # Set by a signal: stop when this step is done, and save.
        self.told = threading.Event()
        # Why a first signal may end all processes at once; None: it only sets `told`,
        # as there are steps that no checkpoint holds.
        self.at_once: str | None = "nothing to save yet"

    def listen(self, pipe: int) -> None:
        """Reads the numbers of signals, a byte each, until a 0."""
        first, echo_until = True, 0.0
        while number := os.read(pipe, 1)[0]:
            if number == signal.SIGTERM and time.monotonic() < echo_until:
                continue
            if number in NUMBERS:
                if first and number == signal.SIGTERM:
                    echo_until = time.monotonic() + ECHO
                self._hear(signal.Signals(number).name, first)
                first = False

    def _hear(self, name: str, first: bool) -> None:
        if not first or self.at_once is not None:
            why = self.at_once if first else "a second signal, so at once"
            text = f"stopped by {name}, {why}: run the same command to go on."
            end_run(text, STOPPED, told=f"was {text}")
        self.told.set()
        text = f"{name}: stopping when this step is done; a second one ends at once."
        # Not print(): the main thread may have stopped in the middle of one.
        os.write(2, f"\n{prefix()}{text}\n".encode())


@contextmanager
def stop_on_signals() -> Iterator[Signals]:
    """Hears SIGINT and SIGTERM: a first one stops all processes, a second ends them.

    Python calls a handler in the main thread, between two of its own instructions: that
    may be minutes away while XLA compiles. So a thread reads what the signal itself
    writes into a pipe. Not in the main thread of the program nothing is heard.
    """
    signals = Signals()
    if threading.current_thread() is not threading.main_thread():
        yield signals  # as Python has it
        return
    read, write = os.pipe()
    os.set_blocking(write, False)
    listener = threading.Thread(target=signals.listen, args=(read,), daemon=True)
    listener.start()
    former_pipe = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    # A handler there must be. The main thread need not wait for the other one.
    former = {
        number: signal.signal(number, lambda *_: signals.told.set())
        for number in NUMBERS
    }

    def let_go() -> None:
        signal.set_wakeup_fd(former_pipe)
        for number, handler in former.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: not Python's

    _inherited.append(let_go)
    try:
        yield signals
    finally:
        _inherited.remove(let_go)
        let_go()
        os.write(write, b"\0")
        listener.join()  # for ever, if it is ending the process
        os.close(read)
        os.close(write)


# What a forked process does first: pools end their workers by SIGTERM, which would be
# heard here, through the pipe that both have.
_inherited: list = []
os.register_at_fork(after_in_child=lambda: [let_go() for let_go in _inherited])
