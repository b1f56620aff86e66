# SPDX-License-Identifier: Apache-2.0
"""What a run tells a person (progress) and programs (JSON, TensorBoard, wandb)."""

import contextlib
import json
import logging
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from lm_scale.errors import InputError
from lm_scale.peaks import peak_flops
from lm_scale.wandb_run import WandbRun

T = TypeVar("T")

REPORTERS = ("tensorboard", "wandb")


def check_reporters(report_to: Sequence[str]) -> None:
    """InputError if one of the names is not known, or needs what is not installed."""
    for name in report_to:
        if name not in REPORTERS:
            raise InputError(
                f"report_to names {name!r}: expected {' or '.join(REPORTERS)}, both or "
                f"none."
            )
    if "wandb" in report_to:
        try:
            import wandb  # pyright: ignore[reportMissingImports]

            _ = wandb.init  # a mere folder of that name can be imported too
        except Exception as error:  # its dependencies raise other things as well
            raise InputError(
                f"report_to names wandb, which cannot be imported ({error}): "
                f"pip install wandb, or leave it out of report_to."
            ) from error


class MetricsLogger:
    """Writes a run's metrics and shows its progress; enter it around the loop.

    `run_dir/metrics.jsonl` holds one JSON object a line: `step` (optimizer steps done),
    `unix_time` (s), `kind` ("train" or "eval") and the metrics; what is not finite is
    null. Train lines add:

    - `time`: seconds in train steps from the start of the run, compilation included,
      pauses left out; a resumed run goes on from the last line that is kept
    - `tokens_seen`: step * tokens_per_step, from the start of the run
    - `epochs/NAME`: how often each source of a mixture has been seen
    - `first_step_s`, once: what the process's first step took, its compilation included

    and, measured since the line before:

    - `step_time_s`: mean seconds a step, pauses and the first step left out
    - `tokens_per_s`: tokens_per_step / step_time_s, of all devices together
    - `mfu`: flops_per_step / (step_time_s * devices * peak of a device), if known
    - `data_wait`: the share of that time that the loop waited for a batch

    wandb gets the same as `train_<name>` and `eval_<name>`, and so do TensorBoard's
    files, in `run_dir` itself, with the metrics that `log_step` is given at each step.
    Entering drops what an earlier process logged after `start_step`: work that was lost
    when it ended after its last checkpoint, and about to be done again.

    Args:
        start_step: steps done before this process (0, or those of the checkpoint).
        tokens_per_step: of the whole batch, on all hosts.
        flops_per_step: the model's, forward and backward, without rematerialization.
        devices: all the devices that share a step, on all hosts.
        report_to: "tensorboard", "wandb", both or none; see `check_reporters`.
        config: what wandb shows as the run's settings.
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
        report_to: Sequence[str] = ("tensorboard",),
        config: Mapping[str, Any] | None = None,
        enabled: bool = True,
    ):
        self.run_dir = Path(run_dir)
        self.start_step = start_step
        self.total_steps = total_steps
        self.tokens_per_step = tokens_per_step
        self.report_to = report_to
        self.config = config
        self.enabled = enabled
        peaks = [peak_flops(device) for device in devices]
        self.flops_share = None  # of all devices' peak, that one step a second takes
        if flops_per_step is not None and peaks and None not in peaks:
            self.flops_share = flops_per_step / math.fsum(p for p in peaks if p)
        self.progress: Progress | None = None  # none: plain lines

    def __enter__(self) -> "MetricsLogger":
        self.train_time = 0.0  # s, up to window_start
        self.window_steps = 0  # since the last written line
        self.waited = 0.0  # s, for batches, in the same time
        self.first_step_s: float | None = None  # not None: to be in the next line
        self.first_done: tuple[int, float] | None = None  # the first step, its time
        self.eval_steps: set[int] = set()  # of which metrics.jsonl has an eval line
        if self.enabled:
            self._open()
        self.window_start = perf_counter()  # pauses are added to it, and so left out
        return self

    def _open(self) -> None:
        self.run_dir.mkdir(parents=True, exist_ok=True)
        path = self.run_dir / "metrics.jsonl"
        for line in drop_lines_after(path, self.start_step):
            self.train_time = line.get("time", self.train_time)
            if line.get("kind") == "eval":
                self.eval_steps.add(line["step"])
        self.jsonl = path.open("a", encoding="utf-8")
        self.tensorboard = self.wandb = None
        if "tensorboard" in self.report_to:
            # It takes a moment to import, which `lm-scale --help` need not wait.
            from tensorboardX import SummaryWriter

            # It logs a warning for each NaN, which is a value like any other here.
            logging.getLogger("tensorboardX.x2num").setLevel(logging.ERROR)
            self.tensorboard = SummaryWriter(
                str(self.run_dir),
                purge_step=self.start_step + 1,  # hides the lost work's points
                flush_secs=10,
                # File names hold whole seconds: a quick resume must not truncate one.
                filename_suffix=f".from{self.start_step}",
            )
        if "wandb" in self.report_to:
            resumed = self.start_step > 0
            self.wandb = WandbRun(self.run_dir, self.config, resumed, self.print)
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
            if self.tensorboard is not None:
                self.tensorboard.close()
            if self.wandb is not None:  # last: it may wait for the network
                self.wandb.finish(failed=exception[0] is not None)

    def log_step(self, step: int, metrics: dict[str, float], *, write: bool) -> None:
        """Logs a train step, so call it for each: to TensorBoard and the bar.

        `write` logs it to metrics.jsonl, wandb and the console too, with the speed.
        """
        if not self.enabled:
            return
        now = perf_counter()
        if self.first_done is None:
            self.first_step_s = now - self.window_start
            self.first_done = (step, now)
            self.waited = 0.0
            self.train_time += self.first_step_s
            self.window_start = now
        else:
            self.window_steps += 1
        speed = self._speed(now)
        text = self._describe(step, now, {**metrics, **speed})
        if self.progress is not None:
            self.progress.update(self.bar, completed=step, text=text)
        self._plot(step, "train", metrics)
        if not write:
            return

        self.train_time += now - self.window_start
        totals = {
            "time": self.train_time,
            "tokens_seen": step * self.tokens_per_step,
        }
        seen = [(x, metrics[x]) for x in metrics if x.startswith("epochs/")]
        if seen:
            text += " | epochs"
        for name, value in seen:
            text += f" {name.removeprefix('epochs/')} {value:.2f}"
        first = {}
        if self.first_step_s is not None:
            first = {"first_step_s": self.first_step_s}
            text += f" | first step {self.first_step_s:.1f} s"
        measured = {**speed, **totals, **first}
        self._plot(step, "train", measured)
        self._write(step, "train", {**metrics, **measured})
        if self.progress is None:
            self.print(f"step {step}/{self.total_steps} | {text}")
        self.window_start, self.window_steps, self.first_step_s = now, 0, None
        self.waited = 0.0

    def log_eval(self, step: int, metrics: dict[str, float]) -> None:
        """Logs and prints what an evaluation after `step` train steps gave."""
        if self.enabled:
            self.eval_steps.add(step)
            self._plot(step, "eval", metrics)
            self._write(step, "eval", metrics)
            text = " | ".join(f"{name} {number(x)}" for name, x in metrics.items())
            self.print(f"step {step}/{self.total_steps} | eval: {text}")

    def timed(self, batches: Iterator[T]) -> Iterator[T]:
        """The same batches; what each makes the loop wait is told as `data_wait`."""
        while True:
            start = perf_counter()
            batch = next(batches, None)
            self.waited += perf_counter() - start
            if batch is None:
                return
            yield batch

    def go_back(self, step: int) -> None:
        """The run goes on from an earlier step: what was logged after it is dropped."""
        self.__exit__(None, None, None)
        self.start_step = step
        self.__enter__()

    def log_rollback(self, step: int, facts: Mapping[str, Any]) -> None:
        """Writes to metrics.jsonl that the run has gone back to `step`, and why."""
        if self.enabled:
            line = {"step": step, "unix_time": time.time(), "kind": "rollback", **facts}
            self._append(line)

    def has_eval(self, step: int) -> bool:
        """If the run, this process or a former one, has logged an evaluation there."""
        return step in self.eval_steps

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
            "data_wait": self.waited / (now - self.window_start),
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
        if "data_wait" in values:
            parts.append(f"data wait {values['data_wait']:.1%}")
        # At the pace so far, pauses and all: they will come again.
        first_step, first_time = self.first_done or (step, now)
        if step > first_step:
            pace = (now - first_time) / (step - first_step)
            parts.append(f"left {clock((self.total_steps - step) * pace)}")
        return " | ".join(parts)

    def _plot(self, step: int, kind: str, metrics: dict[str, float]) -> None:
        if self.tensorboard is not None:
            for name, value in metrics.items():
                self.tensorboard.add_scalar(f"{kind}_{name}", float(value), step)

    def _append(self, line: Mapping[str, Any]) -> None:
        try:
            self.jsonl.write(json.dumps(line, allow_nan=False) + "\n")
            self.jsonl.flush()  # a killed run keeps its lines
        except OSError as error:  # training is worth more than a line about it
            self.print(f"WARNING: metrics.jsonl lacks step {line['step']}: {error}")

    def _write(self, step: int, kind: str, metrics: dict[str, float]) -> None:
        line: dict[str, Any] = {"step": step, "unix_time": time.time(), "kind": kind}
        scalars = {}
        for name, value in metrics.items():
            value = value if isinstance(value, int) else float(value)  # or numpy's
            line[name] = value if math.isfinite(value) else None  # JSON has no NaN
            scalars[f"{kind}_{name}"] = value
        self._append(line)
        if self.wandb is not None:
            self.wandb.log(scalars, step)


def drop_lines_after(path: Path, step: int) -> list[dict[str, Any]]:
    """Rewrites a metrics file without the lines of later steps and without torn ones.

    Through a temporary file: a crash meanwhile leaves the old one whole. Returns what
    the lines that are kept hold.
    """
    if not path.exists():
        return []
    kept = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
            if line["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            pass  # the process died while it wrote this line
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), "utf-8")
    os.replace(temporary, path)
    return kept


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
