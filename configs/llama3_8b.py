# SPDX-License-Identifier: Apache-2.0
"""Llama 3.1 8B, in shape and tokenizer, on 84 G tokens of English web pages.

Meta trained on 15,000 G tokens; this is what a small slice does in nine days.

Command   lm-scale train configs/llama3_8b.py, on each of the 8 hosts, in a folder that
          all share. The tokenizer's licence has to be accepted on the hub before
          (`hf auth login`). The text is best prepared beforehand, on one host, by
          `lm-scale prepare`: its tokens take 340 GB, and one process makes them
Hardware  TPU v5p-64 (32 chips), each with 16 sequences of 8192 tokens, 2 at a time
Memory    55.0 of 95 GiB a chip at the peak of a step, by libtpu 0.0.50, which compiled
          it for a v5p of 2x4x4 chips
Hours     200 at 40 % of the peak FLOP/s, which is a guess
Expected  not run yet: no TPU was at hand
"""

from lm_scale.config import DataConfig, RunConfig
from lm_scale.data.corpus import CorpusConfig
from lm_scale.data.tokenizer import TokenizerConfig
from lm_scale.models import Compute, LlamaConfig
from lm_scale.models.rotary import FrequencyScaling
from lm_scale.objectives import CausalLM
from lm_scale.optim import AdamW, Schedule
from lm_scale.sharding import FULLY_SHARDED, PRESETS

config = RunConfig(
    run_dir="runs/llama3_8b",
    model=LlamaConfig(
        vocab=128_256,
        positions=131_072,  # as published; trained here on the first 8192
        layers=32,
        embed=4096,
        heads=32,
        kv_heads=8,
        head_dim=128,
        mlp=14_336,
        rope_theta=500_000.0,
        rope_scaling=FrequencyScaling(
            kind="llama3", factor=8.0, low=1.0, high=4.0, original=8192
        ),
    ),
    objective=CausalLM(),
    data=DataConfig(
        corpus=CorpusConfig(
            source="HuggingFaceFW/fineweb-edu",
            subset="sample-100BT",
            validation_fraction=0.001,
        ),
        tokenizer=TokenizerConfig(path="meta-llama/Llama-3.1-8B"),
        max_train_examples=20_000 * 512,  # 20,000 steps: 84 G tokens, 10 a weight
        max_eval_examples=1024,
    ),
    # Betas, decay, clipping and schedule of Llama 2 (arXiv:2307.09288, section 2.2).
    optimizer=AdamW(beta2=0.95, weight_decay=0.1, clip=1.0),
    schedule=Schedule(peak=3e-4, warmup=2000, decay="cosine", final=0.1),
    seq_len=8192,
    batch=512,  # 4,194,304 tokens a step
    accumulate=8,
    epochs=1,
    slice="v5p-64",
    mesh=FULLY_SHARDED,
    compute=Compute(rules=PRESETS["fsdp"]),
    eval_every=1000,
    save_every=500,
    sample_prompt="The most important discovery in the history of science was",
)
