# SPDX-License-Identifier: Apache-2.0
"""What products in 8 bits do to a loss: the quickstart's run, with and without.

    python -m benchmarks.step.low_precision

The four runs differ in `compute.quantize` alone, or in the seed, which tells how much a
difference means. On a CPU, which is slow in 8 bits: it is the loss that counts here.
Writes the table of README.md, and low_precision.png (matplotlib).
"""

import json
import tempfile
from pathlib import Path

from benchmarks.plan import markdown
from benchmarks.scaling.throughput import lm_scale

HERE = Path(__file__).parent
CONFIG = "configs/quickstart.py"
RUNS = {
    "float32": (),
    "float32, another seed": ("--seed", "1"),
    "int8": ("--compute.quantize", "int8"),
    "float8": ("--compute.quantize", "float8"),
}
MEAN_OF = 40  # steps; the training loss of one is that of 1024 tokens
AT = (100, 200, 300, 420)


def train(store: str, run: str, *options: str) -> tuple[dict[int, float], float]:
    """The loss of each step, and that of the held-out text at the end."""
    lm_scale(
        "train", 1, 1, CONFIG, "--data.store", store, "--run-dir", run,
        "--log-every", "1", "--save-every", "None", "--sample-prompt", "None", *options,
    )  # fmt: skip
    lines = (Path(run) / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    losses = {one["step"]: one["loss"] for one in found if one["kind"] == "train"}
    return losses, [one["loss"] for one in found if one["kind"] == "eval"][-1]


def smooth(losses: dict[int, float], step: int) -> float:
    """The mean of the losses up to a step."""
    last = [losses[n] for n in losses if step - MEAN_OF < n <= step]
    return sum(last) / len(last)


def plot(curves: dict[str, dict[int, float]]) -> None:
    """Each run's loss less that of the first."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(
        2, figsize=(8, 6), sharex=True, layout="constrained"
    )
    base = next(iter(curves.values()))
    steps = [n for n in base if n >= MEAN_OF]
    for name, losses in curves.items():
        style = dict(label=name, ls="--" if "seed" in name else "-", lw=1.2)
        mean = [smooth(losses, n) for n in steps]
        above.plot(steps, mean, **style)
        less = [a - smooth(base, n) for a, n in zip(mean, steps, strict=True)]
        below.plot(steps, less, **style)
    above.set_ylabel(f"loss, mean of {MEAN_OF} steps")
    below.set_ylabel("less that in float32")
    below.set_xlabel("step")
    above.legend()
    figure.savefig(HERE / "low_precision.png", dpi=120)


def main() -> None:
    curves, rows = {}, []
    with tempfile.TemporaryDirectory() as folder:
        store = f"{folder}/store"
        lm_scale("prepare", 1, 1, CONFIG, "--data.store", store)
        for number, (name, options) in enumerate(RUNS.items()):
            curves[name], held_out = train(store, f"{folder}/{number}", *options)
            means = [f"{smooth(curves[name], step):.3f}" for step in AT]
            rows.append([name, *means, f"{held_out:.3f}"])
            print(*rows[-1], flush=True)
    plot(curves)
    header = ("products", *(f"step {step}" for step in AT), "held-out, at the end")
    markdown.put(HERE / "README.md", "low precision", markdown.table(header, rows))


if __name__ == "__main__":
    main()
