# SPDX-License-Identifier: Apache-2.0
"""What a run tells a person (progress) and a machine (metrics.jsonl, TensorBoard)."""

import contextlib
import json
import logging
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

# Dense bf16 FLOP/s by `device_kind`; for TPUs of one TensorCore, because a JAX device
# is one core (v2, v3, 7x) or a whole chip of two (v5p; v4 by default: "megacore").
# TPUs: cloud.google.com/tpu/docs/<generation>, "Peak compute per chip" (bf16).
TPU_CORE_PEAK = {
    "TPU v2": 45e12 / 2,  # 45 a chip of two cores
    "TPU v3": 123e12 / 2,  # 123 a chip of two cores
    "TPU v4": 275e12 / 2,  # 275 a chip of two cores
    "TPU v5 lite": 197e12,  # v5e, one core
    "TPU v5e": 197e12,
    "TPU v5": 459e12 / 2,  # v5p, 459 a chip of two cores
    "TPU v5p": 459e12 / 2,
    "TPU v6 lite": 918e12,  # v6e, one core
    "TPU v6e": 918e12,
    "TPU7x": 2307e12 / 2,  # 2307 a chip of two cores
}
# GPUs: NVIDIA's data sheets; from the H100 on they state twice this, "with sparsity".
GPU_PEAK = {
    "NVIDIA A100-PCIE-40GB": 312e12,  # A100 data sheet
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 PCIe": 1513e12 / 2,  # H100 data sheet
    "NVIDIA H100 NVL": 1671e12 / 2,
    "NVIDIA H100 80GB HBM3": 1979e12 / 2,  # the SXM5 board
    "NVIDIA H200": 1979e12 / 2,  # H200 data sheet
    "NVIDIA L4": 242e12 / 2,  # L4 data sheet
    "NVIDIA L40S": 733e12 / 2,  # L40S data sheet
}


def peak_flops(device: Any) -> float | None:
    """The bf16 peak of one JAX device in FLOP/s; None if its kind is not known."""
    kind = device.device_kind
    if kind in TPU_CORE_PEAK:
        return TPU_CORE_PEAK[kind] * getattr(device, "num_cores", 1)
    return GPU_PEAK.get(kind)


class MetricsLogger:
    """Writes a run's metrics and shows its progress; enter it around the loop.

    `run_dir/metrics.jsonl` holds one JSON object a line: `step` (optimizer steps done),
    `time` (Unix, s), `kind` ("train" or "eval") and the metrics; what is not finite is
    null. Train lines add, measured since the line before:

    - `step_time_s`: mean seconds a step, pauses and the first step left out
    - `tokens_per_s`: tokens_per_step / step_time_s, of all devices together
    - `mfu`: flops_per_step / (step_time_s * devices * peak of a device), if known
    - `tokens_seen`: step * tokens_per_step, from the start of the run
    - `first_step_s`, once: what the process's first step took, its compilation included

    `run_dir/tensorboard` holds the same as scalars `train_<name>` and `eval_<name>`.
    Entering drops what an earlier process logged after `start_step`: work that was lost
    when it ended after its last checkpoint, and about to be done again.

    Args:
        start_step: steps done before this process (0, or those of the checkpoint).
        tokens_per_step: of the whole batch, on all hosts.
        flops_per_step: the model's, forward and backward, without rematerialization.
        devices: all the devices that share a step, on all hosts.
        enabled: False makes every method do nothing: on all processes but one.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        start_step: int,
        total_steps: int,
        tokens_per_step: int,
        flops_per_step: float | None,
        devices: Sequence[Any],
        enabled: bool = True,
    ):
        self.run_dir = Path(run_dir)
        self.start_step = start_step
        self.total_steps = total_steps
        self.tokens_per_step = tokens_per_step
        self.enabled = enabled
        peaks = [peak_flops(device) for device in devices]
        self.flops_share = None  # of all devices' peak, that one step a second takes
        if flops_per_step is not None and peaks and None not in peaks:
            self.flops_share = flops_per_step / math.fsum(p for p in peaks if p)
        self.progress: Progress | None = None  # none: plain lines

    def __enter__(self) -> "MetricsLogger":
        self.window_steps = 0  # since the last written line
        self.first_step_s: float | None = None  # not None: to be in the next line
        self.first_done: tuple[int, float] | None = None  # the first step, its time
        if self.enabled:
            self._open()
        self.window_start = perf_counter()  # pauses are added to it, and so left out
        return self

    def _open(self) -> None:
        # tensorboardX takes a moment to import, which `lm-scale --help` need not wait.
        from tensorboardX import SummaryWriter

        # It logs a warning for each NaN, which is a value like any other here.
        logging.getLogger("tensorboardX.x2num").setLevel(logging.ERROR)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        path = self.run_dir / "metrics.jsonl"
        drop_lines_after(path, self.start_step)
        self.jsonl = path.open("a", encoding="utf-8")
        self.tensorboard = SummaryWriter(
            str(self.run_dir / "tensorboard"),
            purge_step=self.start_step + 1,  # hides the lost work's points
            flush_secs=10,
            # File names hold whole seconds: a quick resume must not truncate the last.
            filename_suffix=f".from{self.start_step}",
        )
        console = Console(file=sys.stdout)
        # isatty too: FORCE_COLOR, set on many CI machines, makes rich think it is one.
        if sys.stdout.isatty() and console.is_interactive:
            progress = Progress(
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(),
                TextColumn("{task.fields[text]}", markup=False),
                console=console,
            )
            self.bar = progress.add_task(
                "", total=self.total_steps, completed=self.start_step, text="compiling"
            )
            progress.start()
            self.progress = progress

    def __exit__(self, *exception: object) -> None:
        if self.enabled:
            if self.progress is not None:
                self.progress.stop()
            self.jsonl.close()
            self.tensorboard.close()

    def log_step(self, step: int, metrics: dict[str, float], *, write: bool) -> None:
        """Notes that a train step is done, so call it for each; `write` logs it too."""
        if not self.enabled:
            return
        now = perf_counter()
        if self.first_done is None:
            self.first_step_s = now - self.window_start
            self.first_done = (step, now)
            self.window_start = now
        else:
            self.window_steps += 1
        speed = self._speed(now)
        text = self._describe(step, now, {**metrics, **speed})
        if self.progress is not None:
            self.progress.update(self.bar, completed=step, text=text)
        if not write:
            return

        seen = {"tokens_seen": step * self.tokens_per_step}
        first = {}
        if self.first_step_s is not None:
            first = {"first_step_s": self.first_step_s}
            text += f" | first step {self.first_step_s:.1f} s"
        self._write(step, "train", {**metrics, **speed, **seen, **first})
        if self.progress is None:
            self.print(f"step {step}/{self.total_steps} | {text}")
        self.window_start, self.window_steps, self.first_step_s = now, 0, None

    def log_eval(self, step: int, metrics: dict[str, float]) -> None:
        """Logs and prints what an evaluation after `step` train steps gave."""
        if self.enabled:
            self._write(step, "eval", metrics)
            text = " | ".join(f"{name} {number(x)}" for name, x in metrics.items())
            self.print(f"step {step}/{self.total_steps} | eval: {text}")

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Time inside (an evaluation, a checkpoint) does not count as training.

        Block on the last dispatched step first: what of it runs inside goes uncounted,
        and the speed comes out too high. Not to be nested.
        """
        start = perf_counter()
        try:
            yield
        finally:
            self.window_start += perf_counter() - start

    def print(self, text: str) -> None:
        """Prints a text, above the bar if there is one."""
        if not self.enabled:
            return
        if self.progress is not None:
            self.progress.console.print(text, markup=False, highlight=False)
        else:
            print(text, flush=True)

    def _speed(self, now: float) -> dict[str, float]:
        if self.window_steps == 0:
            return {}
        step_time = (now - self.window_start) / self.window_steps
        speed = {
            "step_time_s": step_time,
            "tokens_per_s": self.tokens_per_step / step_time,
        }
        if self.flops_share is not None:
            speed["mfu"] = self.flops_share / step_time
        return speed

    def _describe(self, step: int, now: float, values: dict[str, float]) -> str:
        parts = []
        if "loss" in values:
            parts.append(f"loss {values['loss']:.4f}")
        if "learning_rate" in values:
            parts.append(f"lr {values['learning_rate']:.2e}")
        if "tokens_per_s" in values:
            parts.append(f"tokens/s {values['tokens_per_s']:,.0f}")
        if "mfu" in values:
            parts.append(f"mfu {values['mfu']:.1%}")
        # At the pace so far, pauses and all: they will come again.
        first_step, first_time = self.first_done or (step, now)
        if step > first_step:
            pace = (now - first_time) / (step - first_step)
            parts.append(f"left {clock((self.total_steps - step) * pace)}")
        return " | ".join(parts)

    def _write(self, step: int, kind: str, metrics: dict[str, float]) -> None:
        line: dict[str, Any] = {"step": step, "time": time.time(), "kind": kind}
        for name, value in metrics.items():
            value = value if isinstance(value, int) else float(value)  # or numpy's
            line[name] = value if math.isfinite(value) else None  # JSON has no NaN
            self.tensorboard.add_scalar(f"{kind}_{name}", value, step)
        self.jsonl.write(json.dumps(line, allow_nan=False) + "\n")
        self.jsonl.flush()  # a killed run keeps its lines


def drop_lines_after(path: Path, step: int) -> None:
    """Rewrites a metrics file without the lines of later steps and without torn ones.

    Through a temporary file: a crash meanwhile leaves the old one whole.
    """
    if not path.exists():
        return

    def keep(line: str) -> bool:
        try:
            return json.loads(line)["step"] <= step
        except (ValueError, KeyError, TypeError):
            return False  # the process died while it wrote this line

    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(line + "\n" for line in lines if keep(line)), "utf-8")
    os.replace(temporary, path)


def number(value: float) -> str:
    """A count with separators, anything else with four decimals."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def clock(seconds: float) -> str:
    """Seconds as m:ss, or h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02}:{seconds:02}"
    return f"{minutes:02}:{seconds:02}"
