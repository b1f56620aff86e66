# SPDX-License-Identifier: Apache-2.0
"""Llama 3.2 1B, in shape and tokenizer, on 26 G tokens of English web pages.

Meta's was cut out of the 8 B and taught by larger ones; this one learns from text.

Command   lm-scale train configs/llama_1b.py, on each of the 4 hosts, in a folder that
          all share. The tokenizer's licence has to be accepted on the hub before
          (`hf auth login`). The text is best prepared beforehand, on one host, by
          `lm-scale prepare`: its tokens take 105 GB, and one process makes them
Hardware  TPU v5e-16 (16 chips), each with 16 sequences of 4096 tokens, 2 at a time
Memory    10.8 of 15.75 GiB a chip at the peak of a step, by libtpu 0.0.50, which
          compiled it for a v5e of 4x4 chips
Hours     48 at 40 % of the peak FLOP/s, which is a guess
Expected  not run yet: no TPU was at hand
"""

import dataclasses

from llama3_8b import config as large

from lm_scale.models.rotary import FrequencyScaling

config = dataclasses.replace(
    large,
    run_dir="runs/llama_1b",
    model=dataclasses.replace(
        large.model,
        layers=16,
        embed=2048,
        head_dim=64,
        mlp=8192,
        tied=True,
        rope_scaling=FrequencyScaling(
            kind="llama3", factor=32.0, low=1.0, high=4.0, original=8192
        ),
    ),
    data=dataclasses.replace(
        large.data,
        max_train_examples=25_000 * 256,  # 25,000 steps: 26 G tokens, 21 a weight
    ),
    schedule=dataclasses.replace(large.schedule, peak=4e-4),  # as TinyLlama's 1.1 B
    seq_len=4096,
    batch=256,  # 1,048,576 tokens a step
    slice="v5e-16",
)
