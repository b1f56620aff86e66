# SPDX-License-Identifier: Apache-2.0
"""Training loops that take turns, each in a process of its own."""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

SECONDS = 8.0  # that a turn is to take
Run = Callable[[int], float]  # trains so many steps, and gives the last one's loss


@dataclass
class Loop:
    """A process that trains when it is told to; it runs `serve`."""

    command: list[str]  # arguments for Python
    env: Mapping[str, str] = field(default_factory=dict)
    start: float = 0.0  # seconds from its start to the end of its second step
    step: float = 0.0  # seconds, a first guess
    turns: list[float] = field(default_factory=list)  # steps a second, of each turn

    def __post_init__(self) -> None:
        began = time.perf_counter()
        self.process = subprocess.Popen(
            [sys.executable, *self.command],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, **self.env},
        )  # fmt: skip
        self.ask(2)
        self.start = time.perf_counter() - began
        self.step = self.ask(2) / 2

    def ask(self, steps: int) -> float:
        """Seconds that so many steps take."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"{' '.join(self.command)} has ended; see above.")
        return float(answer)

    def turn(self) -> None:
        """Trains for about `SECONDS`."""
        steps = max(1, round(SECONDS / self.step))
        self.turns.append(steps / self.ask(steps))

    def end(self) -> None:
        """It ends as there is no more to read."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def serve(run: Run) -> None:
    """Runs as many steps as each line of standard input says, and says how long."""
    for line in sys.stdin:
        began = time.perf_counter()
        loss = run(int(line))
        print(time.perf_counter() - began, flush=True)
        if not 0 < loss < 20:  # nats; of even draws from the vocabulary some 9 to 11
            raise SystemExit(f"a loss of {loss}")


def take_turns(loops: Mapping[str, Loop], rounds: int, tokens: int) -> None:
    """One at work while the others wait, so many times over; then all end."""
    for _ in range(rounds):
        for loop in loops.values():
            loop.turn()
        speeds = {name: round(tokens * loop.turns[-1]) for name, loop in loops.items()}
        print("tokens/s:", speeds, flush=True)
    for loop in loops.values():
        loop.end()


def ratio(of: Loop, to: Loop) -> str:
    """How many times as fast: the median of the rounds, and least to most."""
    found = [a / b for a, b in zip(of.turns, to.turns, strict=True)]
    return f"{statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})"
