# SPDX-License-Identifier: Apache-2.0
"""What the host costs: the loop of a run, with all that goes on, beside its step alone.

    python -m benchmarks.step.host

The run is `lm_scale train` as it is, of a RoBERTa of 25 M weights: loader with masks,
metrics, TensorBoard, the guard, and once without and once with a checkpoint every 200
steps. Only its step is not: it takes the batch, and then a fixed time of one core in
one thread, as a TPU would take it elsewhere. What remains of two cores is the host's.
Steps and batches are those of RoBERTa-base on a TPU v3-8: 1024 rows of 128 tokens in
0.208 s.
"""

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from rich.console import Console

from lm_scale import trainer
from lm_scale.assemble import Parts, make_parts
from lm_scale.config import DataConfig, RunConfig
from lm_scale.data.corpus import CorpusConfig
from lm_scale.data.tokenizer import TokenizerConfig
from lm_scale.models import Model, RobertaConfig
from lm_scale.objectives import MaskedLM
from lm_scale.step import Batch, TrainState

SECONDS = 0.208  # of a step
FIRST, LAST = 20, 420  # steps that are timed; two checkpoints among them
ROUNDS = 3
LINES = 160_000  # of the text


def config(folder: Path, save_every: int | None) -> RunConfig:
    """The run, in a folder of its own."""
    text = folder / "text.txt"
    words = [f"word{number % 4001} and {number * 7 % 911}," for number in range(LINES)]
    text.write_text("\n".join(" ".join(words[n : n + 20]) for n in range(LINES)))
    return RunConfig(
        run_dir=str(folder / "run"),
        model=RobertaConfig(
            vocab=2048, positions=130, layers=2, embed=1024, heads=16, mlp=4096
        ),
        objective=MaskedLM(),
        data=DataConfig(
            corpus=CorpusConfig(source=str(text), validation_fraction=0.0),
            tokenizer=TokenizerConfig(kind="roberta", vocab_size=2048),
        ),
        seq_len=128, batch=1024, steps=LAST + 20, log_every=10, save_every=save_every,
        keep=1, eval_at_end=False,
    )  # fmt: skip


def spun(turns: int, start: jax.Array) -> jax.Array:
    """0, after so many turns of a loop that one core makes, and no other helps with."""
    end = jax.lax.fori_loop(0, turns, lambda _, x: x * 1.0000001 + 1e-9, start)
    return jnp.where(end < 0, 1.0, 0.0)


def make_step(turns: int) -> Callable:
    """A step that takes time, and changes but its number.

    The weights never pass through it. Donated to it while a checkpoint is written they
    would be copied: on a CPU that is written from the arrays themselves. A TPU's have
    been copied to the host by then, for which the loop waits.
    """

    @jax.jit
    def spin(number: jax.Array, batch: Batch):
        seen = sum(jnp.sum(x) for x in batch.values()) % 2
        zero = spun(turns, seen.astype(jnp.float32) + 1.0)
        loss = 5.0 + zero
        values = {
            "loss": loss, "grad_norm": loss, "learning_rate": zero, "labels": loss,
            "skipped": zero, "skipped_total": zero,
        }  # fmt: skip
        return number + 1 + zero.astype(jnp.int32), values

    def step(state: TrainState, batch: Batch):
        number, values = spin(state.step, batch)
        return dataclasses.replace(state, step=number), values

    return step


def turns_for(seconds: float) -> int:
    """How many turns of the loop take so long."""
    spin = jax.jit(spun, static_argnums=0)
    turns = 1_000_000
    spin(turns, jnp.ones(())).block_until_ready()
    took = []
    for _ in range(5):
        began = time.perf_counter()
        spin(turns, jnp.ones(())).block_until_ready()
        took.append(time.perf_counter() - began)
    return round(turns * seconds / min(took))


def of_a_run(
    folder: Path, step: Callable, save_every: int | None
) -> tuple[float, Batch]:
    """Seconds a step of a whole run, and a batch of it."""
    calls: list[float] = []
    batches: list[Batch] = []

    def called(state: TrainState, batch: Batch):
        calls.append(time.perf_counter())
        if not batches:
            batches.append(batch)
        return step(state, batch)

    def parts(config: RunConfig, model: Model, steps: int, options: dict) -> Parts:
        return Parts(make_parts(config, model, steps, options).optimizer, called)

    trainer.make_parts = parts
    try:
        trainer.train(config(folder, save_every), Console(quiet=True))
    finally:
        trainer.make_parts = make_parts
    return (calls[LAST] - calls[FIRST]) / (LAST - FIRST), batches[0]


def alone(step: Callable, batch: Batch) -> float:
    """Seconds a step of a loop that does nothing else, on one batch."""
    state = TrainState(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32), {}, ())
    state, values = step(state, batch)
    values["loss"].block_until_ready()
    began = time.perf_counter()
    for _ in range(LAST - FIRST):
        state, values = step(state, batch)
    values["loss"].block_until_ready()
    return (time.perf_counter() - began) / (LAST - FIRST)


def main() -> None:
    step = make_step(turns_for(SECONDS))
    for save_every in (None, 200):
        shares = []
        for _ in range(ROUNDS):
            with tempfile.TemporaryDirectory() as folder:
                whole, batch = of_a_run(Path(folder), step, save_every)
            bare = alone(step, batch)
            shares.append(bare / whole)
            times = f"{bare * 1e3:.2f} ms alone, {whole * 1e3:.2f} ms in a run"
            print(f"{times}: {shares[-1]:.1%} of the speed", flush=True)
        saves = f"a checkpoint every {save_every} steps" if save_every else "none saved"
        print(f"{saves}: median {statistics.median(shares):.1%}", flush=True)


if __name__ == "__main__":
    main()
