# SPDX-License-Identifier: Apache-2.0
"""Kills a small training again and again, at random moments, and looks for a trace.

    python -m benchmarks.faults.kill_anywhere [--kills 100] [--seed 0]
        [--folder F] [--minutes M]

A GPT-2 with dropout and accumulation on 8 simulated devices, saved every few steps, is
trained undisturbed, and then killed (SIGKILL) and started again until it is through; so
another time, and another, until there were so many kills. What is left of each run,
every array of the last checkpoint, the exported weights and every line of its metrics,
is compared bit for bit with the undisturbed one. Exit status 1 if anything differs.

All processes are forks of this one, which has imported everything and touched no
device; so a start takes a second, not ten. They write to files, by which, and by what
is on disk, is told what they were at when they were killed.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

# Before numpy and jax are imported: they read these once.
os.environ["OPENBLAS_NUM_THREADS"] = "1"  # its threads would not outlive a fork
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.pop("JAX_NUM_CPU_DEVICES", None)  # the config says how many

STEPS, SAVE_EVERY, EVAL_EVERY = 60, 3, 20
CONFIG = f"""
from lm_scale.config import DataConfig, RunConfig
from lm_scale.data.corpus import CorpusConfig
from lm_scale.data.tokenizer import TokenizerConfig
from lm_scale.models import Compute, GPT2Config
from lm_scale.optim import AdamW, Schedule
from lm_scale.sharding import FULLY_SHARDED

config = RunConfig(
    run_dir="run",
    model=GPT2Config(vocab=320, positions=24, layers=2, embed=32, heads=4, mlp=64),
    data=DataConfig(
        corpus=CorpusConfig(source={{text!r}}),
        tokenizer=TokenizerConfig(vocab_size=320),
    ),
    optimizer=AdamW(weight_decay=0.1, clip=1.0),
    schedule=Schedule(peak=1e-2, warmup=5),
    seq_len=16,
    batch=16,
    accumulate=2,
    steps={STEPS},
    mesh=FULLY_SHARDED,
    compute=Compute(dtype="float32", remat="none"),
    simulated_devices=8,
    log_every=1,
    report_to=(),
    eval_every={EVAL_EVERY},
    save_every={SAVE_EVERY},
    keep=2,
)
"""
POLL = 0.002  # s
LIMIT = 300.0  # s that a process may live
# When a process is killed: a moment of its set-up, of the steps after its first one, or
# of one of its first saves. One that has made the last step, at a moment after it.
PLANS = ("set-up", "steps", "save", "save")
SAVES = 2
STEP_LINE = re.compile(r"^step (\d+)/\d+ \| loss", re.MULTILINE)
RESUMED = re.compile(r"^Going on from step (\d+) in", re.MULTILINE)


class Wrong(Exception):
    """A process ended as none should; the message says how."""


# --- One process ----------------------------------------------------------------------


@dataclass
class Life:
    """A process that trains, as seen from outside."""

    run: Path
    log: Path
    pid: int = 0
    born: float = field(default_factory=time.monotonic)
    text: str = ""
    first: float | None = None  # s after its birth: its first step was told of
    last: float | None = None  # the same, of the last step of the run
    saves: dict[str, list[float]] = field(default_factory=dict)  # seen first, last

    def __post_init__(self):
        self._before = set(unfinished(self.run))

    @property
    def age(self) -> float:
        return time.monotonic() - self.born

    @property
    def steps(self) -> list[int]:
        return [int(step) for step in STEP_LINE.findall(self.text)]

    @property
    def resumed(self) -> int | None:
        """The step it said it goes on from."""
        found = RESUMED.search(self.text)
        return None if found is None else int(found[1])

    def look(self) -> None:
        """Takes in what it has written since."""
        self.text = self.log.read_text(errors="replace")
        steps, now = self.steps, self.age
        if steps and self.first is None:
            self.first = now
        if self.last is None and STEPS in (*steps[-1:], self.resumed):
            self.last = now
        if steps:  # it has removed what another had left
            for name in unfinished(self.run):
                self.saves.setdefault(name, [now, now])[1] = now

    def ended(self) -> int | None:
        """Its exit status, if it has ended."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if pid else None

    def kill(self) -> int:
        """Returns its exit status: it may have been faster."""
        os.kill(self.pid, signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        return os.waitstatus_to_exitcode(status)

    def phase(self) -> str:
        """What it was at when it was killed."""
        left = unfinished(self.run)
        deleting = list((self.run / "checkpoints").glob("*.deleting"))
        if self.first is None and self.last is None:
            return "set-up" if self.resumed is None else "restored, no step yet"
        if any((self.run / "checkpoints" / x / "manifest.json").exists() for x in left):
            return "save, sealed but not named"
        if left:
            return "save, not sealed"
        if deleting:
            return "deletion of an old checkpoint"
        return "steps" if self.last is None else "end"


def unfinished(run: Path) -> list[str]:
    """The checkpoints that have no name yet."""
    try:
        names = os.listdir(run / "checkpoints")
    except FileNotFoundError:
        return []
    return [name for name in names if ".orbax-checkpoint-tmp" in name]


def start(config: Path, run: Path, log: Path, *options: str) -> Life:
    """`lm-scale train` in a fork of this process."""
    from lm_scale.__main__ import main

    if len(os.listdir("/proc/self/task")) > 1:
        raise RuntimeError("this process has threads: what they hold, no fork can free")
    log.parent.mkdir(parents=True, exist_ok=True)
    log.touch()
    life = Life(run, log)
    sys.stdout.flush()
    life.pid = os.fork()
    if life.pid:
        return life
    status = 1
    try:
        file = os.open(log, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        status = main(["train", str(config), "--run-dir", str(run), *options])
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def live(life: Life, until=lambda: False) -> bool:
    """Watches it till its end, or kills it when `until` says so; True: killed.

    Raises Wrong if it ends by itself and not well.
    """
    try:
        while (status := life.ended()) is None:
            life.look()
            if until():
                status = life.kill()
                break
            if life.age > LIMIT:
                raise Wrong(f"It was still there after {LIMIT:.0f} s.")
            time.sleep(POLL)
    except BaseException:  # Ctrl-C, SIGTERM: none is left behind
        life.kill()
        raise
    life.look()
    if status not in (0, -signal.SIGKILL):
        raise Wrong(f"It ended with status {status}.")
    return status != 0


# --- One run --------------------------------------------------------------------------


@dataclass
class Tally:
    """What is counted over all runs."""

    kills: Counter = field(default_factory=Counter)  # by phase
    resumes: int = 0
    trained: int = 0  # steps, of all processes
    read: int = 0  # committed checkpoints that were read after a kill, and their bytes
    read_bytes: int = 0
    bytes_lost: int = 0
    aside: int = 0  # checkpoints that were set aside
    warnings: int = 0
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Times:
    """How long it takes, in s, as the undisturbed run was seen to."""

    set_up: float
    save: float
    end: float


def deadline(life: Life, times: Times, dice: random.Random):
    """The moment to kill a process: a function that says when it has come."""
    plan, share, number = dice.choice(PLANS), dice.random(), dice.randint(1, SAVES)

    def come() -> bool:
        if life.last is not None and plan != "set-up":
            return life.age > life.last + share * times.end
        if plan == "set-up":
            return life.age > share * times.set_up
        if plan == "steps":
            wait = share * SAVES * times.save
            return life.first is not None and life.age > life.first + wait
        begun = sorted(first for first, _ in life.saves.values())
        return len(begun) >= number and life.age > begun[number - 1] + share * (
            1.5 * times.save
        )

    return come


def disturbed(
    config: Path,
    run: Path,
    kills: int,
    end: float,
    times: Times,
    dice: random.Random,
    tally: Tally,
) -> None:
    """One run to its end, killed at most so many times, and not after `end`."""
    newest, lives = None, 0
    while True:
        lives += 1
        life = start(config, run, run.with_suffix(".logs") / f"{lives}")
        come = deadline(life, times, dice)
        try:
            more = kills > 0 and time.monotonic() < end
            killed = live(life, come if more else lambda: False)
        except Wrong as error:
            raise Wrong(
                f"{error} The end of {life.log}:\n{life.text[-3000:]}"
            ) from None
        tally.trained += len(life.steps)
        tally.warnings += life.text.count("WARNING")
        if life.resumed is not None:
            tally.resumes += 1
        if life.resumed != newest and (life.steps or life.resumed is not None):
            tally.problems.append(
                f"{life.log}: step {newest} was on disk, it went on from {life.resumed}"
            )
        newest = check_committed(run, newest, tally)
        if not killed:
            break
        kills -= 1
        phase = life.phase()
        tally.kills[phase] += 1
        print(
            f"{run.name}: kill {tally.kills.total()} after {life.age:.2f} s, "
            f"{phase}; from step {life.resumed}, {len(life.steps)} steps, "
            f"newest {newest}", flush=True,
        )  # fmt: skip
    tally.aside += sum(
        not re.fullmatch(r"\d+", path.name) for path in (run / "checkpoints").iterdir()
    )


def check_committed(run: Path, before: int | None, tally: Tally) -> int | None:
    """Reads every byte of what has the name of a checkpoint; returns the newest step.

    before: the newest step at the last look, which cannot be gone for nothing.
    """
    from lm_scale import manifest
    from lm_scale.checkpoint_folder import CheckpointFolder

    folder = CheckpointFolder(run / "checkpoints")
    good = []
    for step in folder.steps():
        size = sum(path.stat().length for path in manifest.walk(folder / step))
        tally.read += 1
        tally.read_bytes += size
        try:
            manifest.check_files(folder.manifest(step), folder / step)
            good.append(step)
        except ValueError as error:
            tally.bytes_lost += size
            tally.problems.append(f"{folder / step}: {error}")
    newest = max(good, default=None)
    if before is not None and (newest is None or newest < before):
        tally.problems.append(f"{folder}: step {before} was there, now it is {newest}")
    return newest


# --- Comparing ------------------------------------------------------------------------


def arrays(run: Path) -> dict[str, bytes]:
    """All that is in the last checkpoint, and the exported weights."""
    from lm_scale.checkpoint import open_array
    from lm_scale.checkpoint_folder import CheckpointFolder

    folder = CheckpointFolder(run / "checkpoints")
    found = {
        name: open_array(folder / STEPS, name).read().result().tobytes()
        for name in folder.manifest(STEPS).arrays
    }
    return {**found, "exported": (run / "model.safetensors").read_bytes()}


def metrics(run: Path) -> list[dict]:
    """The lines of metrics.jsonl, but for what the clock says."""
    clock = (
        "unix_time", "time", "first_step_s", "step_time_s", "tokens_per_s", "data_wait",
    )  # fmt: skip
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [
        {name: value for name, value in json.loads(line).items() if name not in clock}
        for line in lines
    ]


def compare(run: Path, want: Path) -> dict[str, int]:
    """How many arrays and lines differ; 0 each, if the kills have left no trace."""
    here, there = arrays(run), arrays(want)
    lines, wanted = metrics(run), metrics(want)
    count = Counter((line["kind"], line["step"]) for line in lines)
    count.subtract((line["kind"], line["step"]) for line in wanted)
    files = {path.name for path in run.iterdir()}
    return {
        "arrays compared": len(there),
        "arrays that differ": sum(
            here.get(name) != there.get(name) for name in {*here, *there}
        ),
        "lines compared": len(wanted),
        "lines doubled": sum(n for n in count.values() if n > 0),
        "lines missing": -sum(n for n in count.values() if n < 0),
        "lines that differ": sum(a != b for a, b in zip(lines, wanted, strict=False)),
        "files left over": len(files - {path.name for path in want.iterdir()}),
    }


# --- All of it ------------------------------------------------------------------------


def write_text(path: Path, lines: int = 400) -> None:
    """Words that follow one another at a fixed stride: something to learn."""
    words = "the cat sat on a mat and saw one dog that had no hat but two red shoes"
    pool = words.split()
    path.write_text(
        "".join(
            " ".join(pool[(i + j * (1 + i % 3)) % len(pool)] for j in range(12)) + "\n"
            for i in range(lines)
        )
    )


def undisturbed(config: Path, folder: Path) -> Times:
    """Trains without a kill, into `undisturbed`.

    Another run first, stopped and gone on with, to fill the compilation cache.
    """
    for stop in ("5", "9"):
        log = folder / f"cache{stop}.log"
        again = start(config, folder / "cache", log, "--stop-at", stop)
        live(again)
    shutil.rmtree(folder / "cache")
    life = start(config, folder / "undisturbed", folder / "undisturbed.log")
    live(life)
    assert again.first is not None
    assert life.first is not None and life.last is not None
    saves = [last - first for first, last in life.saves.values()]
    return Times(again.first, statistics.median(saves), life.age - life.last)


def run_all(folder: Path, kills: int, seed: int, minutes: float) -> dict:
    """The report, in the order in which it is read."""
    import jax
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    import lm_scale.trainer

    # Imported once, for all forks.
    _ = lm_scale.trainer, AutoTokenizer, PreTrainedTokenizerFast

    jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    write_text(folder / "text.txt")
    config = folder / "config.py"
    config.write_text(CONFIG.format(text=str(folder / "text.txt")))
    begun = time.monotonic()
    times = undisturbed(config, folder)
    print(f"undisturbed: {times}", flush=True)
    dice, tally, runs = random.Random(seed), Tally(), []
    end = begun + 60 * minutes
    while (left := kills - tally.kills.total()) > 0 and time.monotonic() < end:
        runs.append(folder / f"run{len(runs) + 1}")
        disturbed(config, runs[-1], left, end, times, dice, tally)
    # Only now, as it takes threads.
    found = sum((Counter(compare(x, folder / "undisturbed")) for x in runs), Counter())
    names = compare(folder / "undisturbed", folder / "undisturbed")
    needed = STEPS * len(runs)
    return {
        "kills": tally.kills.total(),
        "kills by phase": dict(tally.kills.most_common()),
        "runs": len(runs),
        "resumes": tally.resumes,
        "steps of the runs": needed,
        "steps trained": tally.trained,
        "steps repeated": tally.trained - needed,
        "share repeated": round((tally.trained - needed) / needed, 3),
        "checkpoints read after kills": tally.read,
        "bytes read": tally.read_bytes,
        "bytes lost": tally.bytes_lost,
        "checkpoints set aside": tally.aside,
        "warnings": tally.warnings,
        **{name: found[name] for name in names},
        "problems": tally.problems,
        "seconds": round(time.monotonic() - begun),
    }


def is_clean(report: dict) -> bool:
    """If the kills have left no trace in what the runs are."""
    zeros = (
        "bytes lost", "checkpoints set aside", "warnings", "arrays that differ",
        "lines doubled", "lines missing", "lines that differ",
    )  # fmt: skip
    return not report["problems"] and not any(report[name] for name in zeros)


def show(report: dict) -> None:
    print(json.dumps(report, indent=1))
    for name, value in report.items():
        if isinstance(value, dict):
            for part, number in value.items():
                print(f"| – {part} | {number} |")
        elif not isinstance(value, list):
            print(f"| {name} | {value} |")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--minutes", type=float, default=60, help="no kills after them")
    parser.add_argument("--folder", help="an empty one, to be kept; else a temporary")
    options = parser.parse_args()
    folder = Path(options.folder or tempfile.mkdtemp(prefix="kill_anywhere"))
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        parser.error(f"{folder} is not empty")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        report = run_all(folder, options.kills, options.seed, options.minutes)
    except Wrong as error:
        print(error, file=sys.stderr)
        print(f"All that there was is in {folder}", file=sys.stderr)
        return 1
    show(report)
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    clean = is_clean(report)
    if clean and not options.folder:
        shutil.rmtree(folder)
    elif not clean:
        print(f"All that there was is in {folder}", file=sys.stderr)
    return 0 if clean else 1


if __name__ == "__main__":
    sys.exit(main())
