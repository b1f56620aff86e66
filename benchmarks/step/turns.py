# SPDX-License-Identifier: Apache-2.0
"""Training loops that take turns, each in a process of its own."""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from benchmarks.step.work import Work

SECONDS = 8.0  # that a turn is to take
Run = Callable[[int], float]  # trains so many steps, and gives the last one's loss


@dataclass
class Loop:
    """A process that trains when it is told to; it runs `serve`."""

    command: list[str]  # arguments for Python
    env: Mapping[str, str]
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


def arguments(
    doc: str | None, works: Iterable[str], make: Callable[[str, str], Run]
) -> tuple[list[str], int]:
    """The models to measure (all, if none is named), and how many rounds.

    Where a `Loop` started this process, it serves `make(model, loop)`, and ends.
    """
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    parser.add_argument("models", nargs="*", help=f"{', '.join(works)}; all by default")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--loop", help=argparse.SUPPRESS)
    args = parser.parse_args()
    models = args.models or list(works)
    for model in models:
        if model not in works:
            parser.error(f"{model!r}: there are {', '.join(works)}.")
    if args.loop:
        serve(make(models[0], args.loop))
        raise SystemExit(0)
    return models, args.rounds


def measure(
    module: str, name: str, work: Work, names: Iterable[str], env: Mapping[str, str],
    rounds: int,
) -> dict[str, Loop]:  # fmt: skip
    """All loops of a model: one at work while the others wait, so many times over."""
    loops = {}
    for loop in names:
        loops[loop] = Loop(["-m", module, name, "--loop", loop], env)
        print(f"{name}: {loop}: began in {loops[loop].start:.1f} s", flush=True)
    for _ in range(rounds):
        for loop in loops.values():
            loop.turn()
        speeds = {x: round(work.tokens * loop.turns[-1]) for x, loop in loops.items()}
        print("tokens/s:", speeds, flush=True)
    for loop in loops.values():
        loop.end()
    return loops


def ratio(of: Loop, to: Loop) -> str:
    """How many times as fast: the median of the rounds, and least to most."""
    found = [a / b for a, b in zip(of.turns, to.turns, strict=True)]
    return f"{statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})"
