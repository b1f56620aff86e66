# SPDX-License-Identifier: Apache-2.0
"""How fast batches are made, in tokens a second of one core, and against a collator.

    python -m benchmarks.data.loader [--tokens 100_000_000] [--lengths 128 512 2048]

The old scripts' way is there as the baseline: rows gathered from an Arrow table for
each batch, and masked by numpy as transformers' FlaxDataCollatorForLanguageModeling
did. Both make the same batches of the same text, and take turns. Time is that of the
process's CPU, all threads together, so other work on the machine counts little.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from lm_scale.data import store as token_store
from lm_scale.data import token_cache
from lm_scale.data.examples import Blocks, Documents, Pieces, Source
from lm_scale.data.loader import TrainBatches
from lm_scale.data.packing import open_plan
from lm_scale.data.parts import PartWriter
from lm_scale.data.python_docs import python_docs
from lm_scale.data.store import (
    TokenStore,
    manifest_of,
    token_type,
    write_manifest,
)
from lm_scale.data.tokenizer import TokenizerConfig, train_tokenizer
from lm_scale.objectives import CausalLM, MaskedLM, Objective, Vocabulary

ROWS, STEPS, ROUNDS = 64, 30, 3  # of a batch; batches of a measurement; of each way
OBJECTIVES = {"CLM": CausalLM(), "MLM": MaskedLM(),
              "MLM, fixed count": MaskedLM(fixed_count=True)}  # fmt: skip


def write_store(folder: Path, tokens: int) -> tuple[TokenStore, Vocabulary]:
    """Python's documentation again and again, each time with some tokens changed."""
    texts = list(python_docs())
    config = TokenizerConfig(kind="roberta", vocab_size=8192)
    tokenizer = train_tokenizer(texts, config, max_length=1 << 20)
    documents = [
        np.array(ids) for ids in tokenizer(texts, truncation=False)["input_ids"]
    ]
    rng = np.random.default_rng(0)
    special, size = tuple(tokenizer.all_special_ids), len(tokenizer)
    dtype = token_type(size)
    writer = PartWriter(folder, 0, 0, dtype)
    while writer.tokens < tokens:
        for document in documents:
            changed = rng.random(document.size) < 0.1
            changed &= ~np.isin(document, special)
            other = rng.integers(len(special), size, document.size)
            written = np.where(changed, other, document).astype(dtype)
            writer.append(written, np.array([written.size]))
    record = writer.finish(last=True, rows=writer.documents)
    facts = {"tokenizer_hash": "", "separator": None, "source": {}}
    write_manifest(
        folder, manifest_of([record], dtype=dtype.name, vocab_size=size, **facts)
    )
    mask, pad = tokenizer.mask_token_id, tokenizer.pad_token_id
    return TokenStore.open(folder), Vocabulary(size, special, mask, pad)


def ours(source: Source, objective: Objective, vocabulary: Vocabulary) -> Callable:
    batches = TrainBatches(source, objective, vocabulary, batch=ROWS, seed=0)
    return lambda step: batches.rows(step, range(ROWS))["tokens"]


def unread(store: TokenStore, length: int, vocabulary: Vocabulary) -> Callable:
    """As from a store that is far larger than what stays in memory: all is read."""
    cached, token_store.CACHE_BYTES = token_store.CACHE_BYTES, 0
    source = Blocks(TokenStore.open(store.path), length)
    token_store.CACHE_BYTES = cached
    batch = ours(source, CausalLM(), vocabulary)

    def made(step: int) -> np.ndarray:
        kept, token_cache.BYTES = token_cache.BYTES, 0
        try:
            return batch(step)
        finally:
            token_cache.BYTES = kept

    return made


def collator(rows, objective: Objective, vocabulary: Vocabulary) -> Callable:
    """The old scripts' loop: a permutation, rows of lists, masks for each batch."""
    order = np.random.default_rng(0).permutation(len(rows))
    causal = rows.remove_columns("special_tokens_mask")
    masked = rows.remove_columns("labels")

    def batch(step: int) -> np.ndarray:
        numbers = order[(step * ROWS + np.arange(ROWS)) % len(rows)]
        if isinstance(objective, CausalLM):
            found = causal[numbers]
            made = {name: np.array(values) for name, values in found.items()}
            return made["input_ids"]
        samples = [masked[int(number)] for number in numbers]
        names = ("input_ids", "attention_mask", "special_tokens_mask")
        made = {name: np.array([sample[name] for sample in samples]) for name in names}
        return mask_tokens(made["input_ids"], made["special_tokens_mask"], vocabulary)

    return batch


def mask_tokens(tokens, special, vocabulary: Vocabulary) -> np.ndarray:
    """Draws of numpy's global generator for each token, as the collator had them."""
    labels = tokens.copy()
    chances = np.full(labels.shape, 0.15)
    chances[special.astype(bool)] = 0.0
    chosen = np.random.binomial(1, chances).astype(bool)
    labels[~chosen] = -100
    masked = np.random.binomial(1, np.full(labels.shape, 0.8)).astype(bool) & chosen
    tokens[masked] = vocabulary.mask_id
    half = np.random.binomial(1, np.full(labels.shape, 0.5)).astype(bool)
    swapped = half & chosen & ~masked
    words = np.random.randint(vocabulary.size, size=labels.shape, dtype="i4")
    tokens[swapped] = words[swapped]
    return tokens


def arrow_rows(store: TokenStore, folder: Path, length: int, special, count: int):
    """`count` blocks as the old scripts kept them: an Arrow file, mapped to memory."""
    from datasets import Dataset

    def blocks():
        for first in range(0, count, 1000):
            starts = np.arange(first, min(first + 1000, count)) * length
            for row in store.read_blocks(starts, length):
                masks = {"attention_mask": np.ones_like(row, np.int8)}
                masks["special_tokens_mask"] = np.isin(row, special).astype(np.int8)
                yield {"input_ids": row, "labels": row, **masks}

    return Dataset.from_generator(blocks, cache_dir=str(folder / f"arrow-{length}"))


def speed(batch: Callable, length: int) -> float:
    """Tokens a second of CPU time, places of a row counted, padding as well."""
    start = time.process_time()
    for step in range(STEPS):
        assert batch(step).shape == (ROWS, length)
    return STEPS * ROWS * length / (time.process_time() - start)


def compare(ways: dict[str, Callable], length: int) -> dict[str, list[float]]:
    for batch in ways.values():
        for step in range(STEPS):  # what is read once is in memory from then on
            batch(step)
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, batch in ways.items():
            found[name].append(speed(batch, length))
    return found


def measure(store: TokenStore, vocabulary: Vocabulary, folder: Path, length: int):
    """Prints the speeds at one length of rows, and their ratios."""
    count = min(store.num_tokens // length, STEPS * ROWS)
    rows = arrow_rows(store, folder, length, vocabulary.special_ids, count)
    sources: dict[str, Source] = {"blocks": Blocks(store, length)}
    for kind in ("segmented", "packed"):
        start = time.process_time()
        plan = open_plan(store, kind, length, folder / "plans")
        used = plan.tokens / (len(plan) * length)
        print(f"{length}: {kind} plan in {time.process_time() - start:.2f} s of CPU, "
              f"{plan.starts.size:,} pieces, {used:.3%} tokens")  # fmt: skip
        sources[kind] = Pieces(store, length, plan)
    sources["documents"] = Documents(
        store, length, special_ids=vocabulary.special_ids, pad_to_seq_len=True,
        multiple=16,
    )  # fmt: skip
    for name, objective in OBJECTIVES.items():
        ways = {
            kind: ours(source, objective, vocabulary)
            for kind, source in sources.items()
            if kind == "blocks" or name == "CLM"
        }
        if name == "CLM":
            ways["blocks, nothing in memory"] = unread(store, length, vocabulary)
        ways["collator"] = collator(rows, objective, vocabulary)
        found = compare(ways, length)
        base = found.pop("collator")
        for kind, speeds in found.items():
            ratios = [a / b for a, b in zip(speeds, base, strict=True)]
            print(f"{length}: {name}, {kind}: {statistics.median(speeds) / 1e6:.1f} M "
                  f"tokens/s, {statistics.median(ratios):.0f} × the collator "
                  f"({min(ratios):.0f} to {max(ratios):.0f})", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=100_000_000)
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512, 2048])
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store, vocabulary = write_store(folder / "train", given.tokens)
        print(f"{store.num_tokens:,} tokens, {store.num_documents:,} documents")
        for length in given.lengths:
            measure(store, vocabulary, folder, length)


if __name__ == "__main__":
    main()
