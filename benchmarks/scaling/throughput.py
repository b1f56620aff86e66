# SPDX-License-Identifier: Apache-2.0
"""Tokens a second on one machine's CPU: devices and processes that share its cores.

    python -m benchmarks.scaling.throughput

Trains the quickstart's model for a few steps in each of the ways in WAYS, in turn and
several times over, and prints the ratios of the pairs in AGAINST within a round:
median, smallest and largest over the rounds.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ROUNDS, STEPS = 3, 12
SKIP = 3  # steps at the start, of which the first compiles
WAYS = {  # processes, simulated devices in each
    "1 process x 1 device": (1, 1),
    "1 process x 2 devices": (1, 2),
    "2 processes x 1 device": (2, 1),
    "1 process x 8 devices": (1, 8),
    "2 processes x 4 devices": (2, 4),
}
AGAINST = (
    ("1 process x 2 devices", "1 process x 1 device"),
    ("1 process x 8 devices", "1 process x 1 device"),
    ("2 processes x 1 device", "1 process x 2 devices"),
    ("2 processes x 4 devices", "1 process x 8 devices"),
)
TRAIN = (
    "configs/quickstart.py", "--log-every", "1", "--steps", str(STEPS),
    "--eval-every", "None", "--no-eval-at-end", "--save-every", "None",
    "--report-to", "--sample-prompt", "None",
)  # fmt: skip


def lm_scale(command: str, processes: int, devices: int, *options: str) -> None:
    """Runs it, and shows what it said if it fails."""
    one = [sys.executable, "-m", "lm_scale", command, *options]
    launcher = [sys.executable, str(ROOT / "launch/local.py"), "-n", str(processes),
                "--devices", str(devices), "--"]  # fmt: skip
    done = subprocess.run(
        [*(launcher if processes > 1 else []), *one], cwd=ROOT, text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(done.stdout)


def speed(processes: int, devices: int, folder: Path) -> float:
    """Tokens a second of a run: the median of its steps, as its metrics say."""
    store = ("--data.store", str(folder / "store"))
    with tempfile.TemporaryDirectory(dir=folder) as run:
        lm_scale("train", processes, devices, *TRAIN, *store, "--run-dir", run)
        lines = (Path(run) / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    return statistics.median(
        step["tokens_per_s"] for step in steps if step["step"] > SKIP
    )


def main() -> None:
    rounds = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lm_scale("prepare", 1, 1, TRAIN[0], "--data.store", str(folder / "store"))
        for _ in range(ROUNDS):
            rounds.append({way: speed(*how, folder) for way, how in WAYS.items()})
            print({way: round(found) for way, found in rounds[-1].items()}, flush=True)
    report(rounds)


def report(rounds: list[dict[str, float]]) -> None:
    for way, base in AGAINST:
        ratios = [speeds[way] / speeds[base] for speeds in rounds]
        middle, low, high = statistics.median(ratios), min(ratios), max(ratios)
        print(f"| {way} | {base} | {middle:.2f} | {low:.2f} to {high:.2f} |")


if __name__ == "__main__":
    main()
