# SPDX-License-Identifier: Apache-2.0
"""Llama 3.1 70B, in shape and tokenizer, on 302 G tokens of English web pages.

Command   lm-scale train configs/llama3_70b.py, on each of the 64 hosts, in a folder
          that all share. The tokenizer's licence has to be accepted on the hub before
          (`hf auth login`). The text is best prepared beforehand, on one host, by
          `lm-scale prepare`: its tokens take 1.2 TB, and one process makes them
Hardware  TPU v5p-512 (256 chips): 64 groups of 4, which share the heads, the mlp and,
          between them, the sequence; a group has 16 sequences of 8192 tokens, 2 at a
          time
Memory    61.1 of 95 GiB a chip at the peak of a step, by libtpu 0.0.50, which compiled
          it for a v5p of 4x8x8 chips
Hours     800 at 40 % of the peak FLOP/s, which is a guess
Expected  not run yet: no TPU was at hand
"""

import dataclasses

from llama3_8b import config as small

from lm_scale.models import Compute
from lm_scale.sharding import PRESETS, MeshShape

config = dataclasses.replace(
    small,
    run_dir="runs/llama3_70b",
    model=dataclasses.replace(small.model, layers=80, embed=8192, heads=64, mlp=28_672),
    data=dataclasses.replace(
        small.data,
        corpus=dataclasses.replace(small.data.corpus, subset="sample-350BT"),
        max_train_examples=36_000 * 1024,  # 36,000 steps: 302 G tokens, 4 a weight
    ),
    schedule=dataclasses.replace(small.schedule, peak=1.5e-4),  # as Llama 2 70B
    batch=1024,  # 8,388,608 tokens a step
    slice="v5p-512",
    mesh=MeshShape(data=1, fsdp=-1, tensor=4),
    compute=Compute(rules=PRESETS["fsdp_tp_sp"]),
)
