# SPDX-License-Identifier: Apache-2.0
"""How fast `prepare` tokenizes, and how much memory it and the loader take.

    python -m benchmarks.data.prepare speed           # ratios, each round in turn
    python -m benchmarks.data.prepare memory          # writes memory.json
    python -m benchmarks.data.prepare memory --plot   # makes memory.png (matplotlib)

The text is `python-docs`, the English that ships with CPython, paragraphs in another
order in each copy. The tokenizer is a byte-level BPE of 50,257 tokens trained on it.
"""

import argparse
import functools
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from lm_scale.data.corpus import CorpusConfig
from lm_scale.data.examples import Blocks
from lm_scale.data.loader import TrainBatches
from lm_scale.data.prepare import Most, prepare
from lm_scale.data.python_docs import python_docs
from lm_scale.data.recipe import train_shown
from lm_scale.data.store import TokenStore
from lm_scale.data.tokenizer import TokenizerConfig, load_tokenizer
from lm_scale.objectives import MaskedLM, Vocabulary

HERE = Path(__file__).parent
QUIET = Console(quiet=True)
MB = 10**6
BLOCK = 512  # tokens that the old way groups, and the loader reads
BATCHES = 1000  # that the loader makes
SIZES = (10, 30, 100, 300, 1000)  # MB of text
TICK = 0.05  # s between looks at the memory


def write_text(path: Path, size: int) -> int:
    """A json line a document, until there are `size` bytes; returns how many."""
    documents = [text.split("\n\n") for text in python_docs() if text]
    order, written, shuffle = list(range(len(documents))), 0, random.Random(0)
    with path.open("w") as file:
        while written < size:
            shuffle.shuffle(order)
            for number in order:
                shuffle.shuffle(documents[number])
                text = "\n\n".join(documents[number])
                written += file.write(json.dumps({"text": text}) + "\n")
                if written >= size:
                    break
    return written


def make_tokenizer(folder: Path) -> str:
    texts = (text for text in python_docs() if text)
    train_shown(texts, TokenizerConfig(), console=QUIET).save_pretrained(folder)
    return str(folder)


# --- Speed ----------------------------------------------------------------------------


def bare(file: Path, tokenizer, scratch: Path) -> None:
    """The ceiling: text in memory, one call of the tokenizer a thousand documents."""
    texts = [json.loads(line)["text"] for line in file.read_text().splitlines()]
    with timed(scratch):
        for first in range(0, len(texts), 1000):
            tokenizer.backend_tokenizer.encode_batch(texts[first : first + 1000])


def ours(file: Path, tokenizer, scratch: Path) -> None:
    """From the file to a store on disk."""
    corpus = CorpusConfig(str(file), validation_fraction=0)
    with timed(scratch):
        prepare(corpus, tokenizer, scratch, parts={"train": Most()}, console=QUIET)


def old(file: Path, tokenizer, scratch: Path, *, processes: int | None = None) -> None:
    """As the Flax example scripts: `map` with the tokenizer, `map` to join and cut.

    processes: --preprocessing_num_workers; the published commands do not give it.
    """
    import datasets

    datasets.disable_progress_bars()
    cache = str(scratch / "cache")
    options = {"batched": True, "num_proc": processes}
    with timed(scratch):
        rows = datasets.load_dataset(
            "json", data_files=[str(file)], split="train", cache_dir=cache
        )
        rows = rows.map(
            lambda batch: tokenizer(batch["text"]),
            remove_columns=rows.column_names,
            **options,
        )
        rows.map(grouped, **options)


@contextmanager
def timed(scratch: Path) -> Iterator[None]:
    """Notes the seconds that passed, and those of the CPUs, of children that ended."""
    start, cpu = time.perf_counter(), cpu_seconds()
    yield
    found = {"wall": time.perf_counter() - start, "cpu": cpu_seconds() - cpu}
    (scratch / "seconds.json").write_text(json.dumps(found))


def cpu_seconds() -> float:
    kinds = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
    return sum(sum(resource.getrusage(kind)[:2]) for kind in kinds)


def grouped(batch: dict[str, list]) -> dict[str, list]:
    """All documents of a batch joined and cut; labels are a copy, the rest is lost."""
    joined = {name: [x for row in rows for x in row] for name, rows in batch.items()}
    total = len(joined["input_ids"]) // BLOCK * BLOCK
    cut = {
        name: [values[i : i + BLOCK] for i in range(0, total, BLOCK)]
        for name, values in joined.items()
    }
    return {**cut, "labels": [list(row) for row in cut["input_ids"]]}


WAYS: dict[str, Callable] = {
    "bare": bare,
    "ours": ours,
    "old": old,
    "workers": functools.partial(old, processes=os.cpu_count()),
}


def load(file: Path, tokenizer, scratch: Path) -> None:
    """Masked batches from all over the store that `ours` has left."""
    source = Blocks(TokenStore.open(scratch / "train"), BLOCK)
    vocabulary = Vocabulary(len(tokenizer), (), mask_id=0)
    batches = TrainBatches(source, MaskedLM(), vocabulary, batch=64, seed=0)
    for step in range(BATCHES):
        batches.rows(step, range(64))


def command(name: str, file: Path, tokenizer: str, scratch: str) -> list[str]:
    """A process for `run_way` whose workers need not import this file again."""
    given = name, str(file), tokenizer, scratch
    code = f"from benchmarks.data.prepare import run_way; run_way(*{given!r})"
    return [sys.executable, "-c", code]


def run_way(name: str, file: str, tokenizer: str, scratch: str) -> None:
    way = load if name == "load" else WAYS[name]
    way(Path(file), load_tokenizer(tokenizer), Path(scratch))


def measured(name: str, file: Path, tokenizer: str) -> dict[str, float]:
    """Seconds of one way, in a process of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run(
            command(name, file, tokenizer, scratch),
            check=True, stdout=subprocess.DEVNULL,
            env={**os.environ, "TOKENIZERS_PARALLELISM": "true"},
        )  # fmt: skip
        return json.loads((Path(scratch) / "seconds.json").read_text())


def speed(megabytes: int, rounds: int, tokenizer: str | None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "text.jsonl"
        size = write_text(file, megabytes * MB)
        tokenizer = tokenizer or make_tokenizer(Path(folder) / "tokenizer")
        found: dict[str, list[dict[str, float]]] = {name: [] for name in WAYS}
        for number in range(rounds):
            for name, seconds in found.items():
                seconds.append(measured(name, file, tokenizer))
            line = ", ".join(
                f"{name} {s[-1]['wall']:.1f} s ({s[-1]['cpu']:.1f} s of CPU)"
                for name, s in found.items()
            )
            print(f"round {number + 1}: {line}", flush=True)
    print(f"{size / MB:.0f} MB of text, {os.cpu_count()} CPUs, {rounds} round(s)")
    for name, what in (
        ("bare", "bare encode_batch"),
        ("old", "map and group"),
        ("workers", "map and group with a process a CPU"),
    ):
        for kind in ("wall", "cpu"):
            pairs = zip(found[name], found["ours"], strict=True)
            ratios = sorted(theirs[kind] / mine[kind] for theirs, mine in pairs)
            print(f"by {kind} time, ours is {statistics.median(ratios):.2f} x as fast "
                  f"as {what} ({ratios[0]:.2f} to {ratios[-1]:.2f})")  # fmt: skip


# --- Memory ---------------------------------------------------------------------------


def resident(pid: int) -> dict[int, int]:
    """Bytes in memory, shared pages by their share, of a process and all below it."""
    found = {}
    try:
        smaps = Path(f"/proc/{pid}/smaps_rollup").read_text()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (OSError, ValueError):
        return found  # it has ended
    for line in smaps.splitlines():
        if line.startswith("Pss:"):
            found[pid] = 1024 * int(line.split()[1])
    for child in children:
        found |= resident(int(child))
    return found


def peaks(started: list[str]) -> dict[str, int]:
    """Runs it; the most bytes at once, of all its processes and of the largest.

    And what all had at half the moments that were looked at, or more.
    """
    child = subprocess.Popen(started, stdout=subprocess.DEVNULL)
    ended, most = threading.Event(), {"all": 0, "largest": 0, "processes": 0}
    sums: list[int] = []

    def watch() -> None:
        while not ended.wait(TICK):
            now = resident(child.pid)
            sums.append(sum(now.values()))
            most["largest"] = max(most["largest"], *now.values(), 0)
            most["processes"] = max(most["processes"], len(now))

    watcher = threading.Thread(target=watch)
    watcher.start()
    status = child.wait()
    ended.set()
    watcher.join()
    if status != 0:
        raise SystemExit(f"{' '.join(started)} ended with status {status}")
    return most | {"all": max(sums), "median": int(statistics.median(sums))}


def memory(sizes: list[int], tokenizer: str | None) -> list[dict[str, int]]:
    """What making the store of so many MB takes at most, in a process of its own."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = tokenizer or make_tokenizer(Path(folder) / "tokenizer")
        for megabytes in sizes:
            file = Path(folder) / "text.jsonl"
            write_text(file, megabytes * MB)
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                found = peaks(command("ours", file, tokenizer, scratch))
                loader = peaks(command("load", file, tokenizer, scratch))
                found["loader"] = loader["all"]
            rows.append({"megabytes": megabytes, **found})
            print(f"{megabytes} MB: {found['all'] / MB:.0f} MB at most and "
                  f"{found['median'] / MB:.0f} MB for half the time in "
                  f"{found['processes']} process(es), the largest "
                  f"{found['largest'] / MB:.0f} MB; the loader "
                  f"{found['loader'] / MB:.0f} MB", flush=True)  # fmt: skip
    return rows


def plot(rows: list[dict[str, int]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    sizes = [row["megabytes"] for row in rows]
    for name, line, label in (
        ("all", "o-", "prepare, all processes"),
        ("median", "o:", "the same, for half the time"),
        ("largest", "s--", "the largest of them"),
        ("loader", "^-", "the loader, 1000 batches of 64 x 512 tokens"),
    ):
        axes.plot(sizes, [row[name] / MB for row in rows], line, label=label)
    axes.plot(sizes, sizes, ":", color="gray", label="as large as the text")
    axes.set_xscale("log")
    axes.set_ylim(0, 1.6 * max(row["all"] for row in rows) / MB)
    axes.set_xlabel("text (MB)")
    axes.set_ylabel("memory (MB)")
    axes.set_title("Memory over the size of the text")
    axes.legend()
    figure.savefig(HERE / "memory.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["speed", "memory"])
    parser.add_argument("--megabytes", type=int, nargs="+", help="of text")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokenizer", help="folder or hub name; else one is trained")
    parser.add_argument("--plot", action="store_true", help="of what memory.json holds")
    options = parser.parse_args()
    path = HERE / "memory.json"
    if options.what == "speed":
        speed((options.megabytes or [30])[0], options.rounds, options.tokenizer)
    elif options.plot:
        plot(json.loads(path.read_text()))
    else:
        found = memory(options.megabytes or list(SIZES), options.tokenizer)
        path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
