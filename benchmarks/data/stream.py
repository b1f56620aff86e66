# SPDX-License-Identifier: Apache-2.0
"""What training from a stream costs the process that trains.

    python -m benchmarks.data.stream FILE.jsonl TOKENIZER

The batches are made by threads of that process. Two things are measured, in turn: their
CPU time against that of bare `encode_batch` on the same text; and how long the main
thread, which is to dispatch steps, has to wait for Python's lock when it wants it.
"""

import json
import os
import statistics
import sys
import time
from pathlib import Path

from lm_scale.data.ahead import Ahead
from lm_scale.data.corpus import CorpusConfig
from lm_scale.data.encoding import Encoder, Spec, Texts
from lm_scale.data.prepare import end_of_text
from lm_scale.data.shards import Shards
from lm_scale.data.streamed import StreamedBatches
from lm_scale.data.tokenizer import load_tokenizer
from lm_scale.objectives import CausalLM, Vocabulary

BATCH, LENGTH, ROUNDS = 64, 512, 3
STEP = 0.01  # s for which the devices are busy


def encoder(tokenizer) -> Encoder:
    spec = tokenizer.backend_tokenizer.to_str(), end_of_text(tokenizer), "int32"
    return Encoder(Spec(*spec))


def batches(file: str, tokenizer) -> StreamedBatches:
    return StreamedBatches(
        Shards(CorpusConfig(file, validation_fraction=0)), encoder(tokenizer),
        CausalLM(),
        Vocabulary(len(tokenizer), (), None), batch=BATCH, seq_len=LENGTH, seed=0,
        lanes=1, buffer=1000, tokens={},
    )  # fmt: skip


def cpu_of_stream(stream: StreamedBatches, steps: int) -> float:
    start = time.process_time()
    for _ in stream.host_batches(range(BATCH), None, start=0, stop=steps):
        pass
    return time.process_time() - start


def cpu_of_bare(texts: list[str], tokenizer) -> float:
    start = time.process_time()
    for first in range(0, len(texts), 1000):
        tokenizer.backend_tokenizer.encode_batch(texts[first : first + 1000])
    return time.process_time() - start


def waits(steps: int) -> list[float]:
    """Seconds beyond `STEP` that it takes to sleep so long and be back."""
    late = []
    for _ in range(steps):
        start = time.perf_counter()
        time.sleep(STEP)  # without the lock, as when a step is waited for
        late.append(time.perf_counter() - start - STEP)
    return sorted(late)


def main(file: str, name: str) -> None:
    tokenizer = load_tokenizer(name)
    texts = [json.loads(line)["text"] for line in Path(file).read_text().splitlines()]
    tokens = encoder(tokenizer)(Texts(texts)).tokens.size
    steps = tokens // (BATCH * LENGTH)  # an epoch
    print(f"{tokens:,} tokens, {steps} steps, {os.cpu_count()} CPUs")
    ratios = []
    for _ in range(ROUNDS):
        bare = cpu_of_bare(texts, tokenizer)
        ratios.append(cpu_of_stream(batches(file, tokenizer), steps) / bare)
    print(f"CPU time over that of encode_batch: {statistics.median(ratios):.2f} "
          f"({min(ratios):.2f} to {max(ratios):.2f})")  # fmt: skip
    for _ in range(ROUNDS):
        alone = waits(200)
        stream = batches(file, tokenizer).host_batches(
            range(BATCH), None, start=0, stop=10**9
        )
        made = Ahead(stream, 10**9)  # as fast as it can, which is the worst case
        beside = waits(200)
        made.close()
        for what, late in (("alone", alone), ("beside the stream", beside)):
            print(f"{what}: late by {1e3 * statistics.median(late):.2f} ms (median), "
                  f"{1e3 * late[-10]:.2f} ms (95 %)")  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
