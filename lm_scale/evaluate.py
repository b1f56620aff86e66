# SPDX-License-Identifier: Apache-2.0
"""Evaluation: exact sums over a held-out split, whatever the batch size or the mesh."""

import math
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh

from lm_scale.data.examples import Source
from lm_scale.data.loader import EvalBatches, device_batches
from lm_scale.data.mixed import Mixed, stores_of
from lm_scale.losses import IGNORE, Sums
from lm_scale.sharding import Params, Rules
from lm_scale.watchdog import Watchdog

UNIGRAM_TOKENS = 20_000_000  # how many training tokens are counted for the baseline


def evaluate(
    eval_step: Callable[[Params, dict], Sums],
    params: Params,
    batches: EvalBatches,
    mesh: Mesh,
    rules: Rules,
    stop: Callable[[], bool] | None = None,
    watchdog: Watchdog | None = None,
) -> dict[str, float]:
    """loss (nats a label), perplexity, accuracy (share of right guesses) and labels.

    The sums of the batches (f32) are added in float64 and divided once; the rows that
    fill up the last batch have no labels and weigh nothing. All but `labels` are NaN if
    there are no labels. Empty if `stop`, asked at each batch, says so before the end.
    `watchdog` ends a run that hangs in one of the batches.
    """
    totals = {"loss": 0.0, "correct": 0.0, "count": 0.0}
    running: Sums | None = None
    for batch in device_batches(batches, mesh, rules, start=0, stop=len(batches)):
        if stop is not None and stop():
            return {}
        if watchdog is not None:
            watchdog.begin("an evaluation's batch", batch["tokens"].shape)
        ready, running = running, eval_step(params, batch)
        _add(totals, ready)  # read one batch late, so that the devices never wait
    _add(totals, running)
    count = totals["count"] or math.nan
    loss = totals["loss"] / count
    return {
        "loss": loss,
        "perplexity": math.inf if loss > 700 else math.exp(loss),
        "accuracy": totals["correct"] / count,
        "labels": int(totals["count"]),
    }


def _add(totals: dict[str, float], sums: Sums | None) -> None:
    for name, value in jax.device_get(sums or {}).items():
        totals[name] += float(value)


def unigram_loss(train: Source | Mixed, batches: EvalBatches, vocab: int) -> float:
    """Loss (nats) of guessing by token frequency alone, on the same held-out labels.

    Frequencies are counted on (the first 20 M tokens of) the training split, plus one
    for each token of the vocabulary. What a model must beat to have learnt anything.
    Of a mixture the first tokens of each source count, as many as is its share, until
    one has no more.
    """
    counts, stores = np.ones(vocab, np.int64), stores_of(train).values()
    most = min(UNIGRAM_TOKENS, *(store.num_tokens / share for store, share in stores))
    for store, share in stores:
        end = round(most * share)
        for start in range(0, end, 1_000_000):
            tokens = store.read(start, min(1_000_000, end - start))
            counts += np.bincount(tokens, minlength=vocab)
    surprise = -np.log(counts / counts.sum())
    total, labels = 0.0, 0
    for number in range(len(batches)):
        batch = batches.rows(number, range(batches.batch))["labels"]
        targets = batch[batch != IGNORE]
        total, labels = total + surprise[targets].sum(), labels + targets.size
    return float(total / labels) if labels else math.nan
