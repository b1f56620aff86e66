# SPDX-License-Identifier: Apache-2.0
"""The train step on a CPU beside a plain one in PyTorch and one in Flax.

    python -m benchmarks.step.cpu                 # both models; README.md too
    python -m benchmarks.step.cpu gpt2 --rounds 3

Each loop is a process of its own; they start one after the other, and then take turns.
Needs torch. About a quarter of an hour on two cores.
"""

from pathlib import Path

from benchmarks.plan import markdown
from benchmarks.step.turns import Loop, Run, arguments, measure, ratio
from benchmarks.step.work import CPU
from lm_scale.cpus import cpus

README = Path(__file__).with_name("README.md")
OURS = ("ours, 1 device", "ours, 8 devices")
OTHERS = ("torch", "torch, compiled", "flax, 1 device", "flax, 8 devices")
# Threads of torch that wait for work are to leave the cores to the others.
ENV = {"JAX_PLATFORMS": "cpu", "OMP_WAIT_POLICY": "passive"}


def make(asked: str, name: str) -> Run:
    """The loop of that name; imports what it alone needs."""
    kind, _, how = name.partition(", ")
    if kind == "torch":
        from benchmarks.step import loop_of_torch

        return loop_of_torch.make(CPU[asked], compiled=bool(how), device="cpu")
    devices = int(how.split()[0])
    if kind == "flax":
        from benchmarks.step import loop_of_flax

        return loop_of_flax.make(CPU[asked], devices)
    from benchmarks.step import loop_of_ours

    return loop_of_ours.on_cpu(CPU[asked], devices)


def table(found: dict[str, dict[str, Loop]]) -> str:
    """Ratios of ours to each other loop."""
    lines = []
    for asked, loops in found.items():
        for name, loop in loops.items():
            others = name in OTHERS
            ours = [ratio(loops[one], loop) if others else "" for one in OURS]
            lines.append([asked, name, f"{loop.start:.0f}", *ours])
    ours = [f"{name}: times as fast" for name in OURS]
    return markdown.table(("model", "loop", "start (s)", *ours), lines)


def main() -> None:
    models, rounds = arguments(__doc__, CPU, make)
    found = {
        asked: measure(
            "benchmarks.step.cpu", asked, CPU[asked], OURS + OTHERS, ENV, rounds
        )
        for asked in models
    }
    about = f"{cpus()} cores, {rounds} rounds: the median (least to most)."
    text = f"{table(found)}\n\n{about}"
    print(text)
    if models == list(CPU):
        markdown.put(README, "cpu", text)


if __name__ == "__main__":
    main()
