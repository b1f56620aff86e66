# SPDX-License-Identifier: Apache-2.0
"""A Llama of 160 M weights on English web pages.

Command   lm-scale train configs/llama_160m.py
Hardware  TPU v3-8 (8 cores), each with 32 sequences of 2048 tokens, 8 at a time
Memory    6.5 of 15.5 GiB a core at the peak of a step, by libtpu 0.0.50, which
          compiled it for a v3 of 2x2 chips
Hours     4 at 40 % of the peak FLOP/s, which is a guess, and the text's preparation
Expected  not run yet: no TPU was at hand
"""

from lm_scale.config import DataConfig, RunConfig
from lm_scale.data.corpus import CorpusConfig
from lm_scale.data.tokenizer import TokenizerConfig
from lm_scale.models import Compute, LlamaConfig
from lm_scale.objectives import CausalLM
from lm_scale.optim import AdamW, Schedule
from lm_scale.sharding import PRESETS

config = RunConfig(
    run_dir="runs/llama_160m",
    model=LlamaConfig(
        vocab=49_152,
        positions=2048,
        layers=12,
        embed=768,
        heads=12,
        kv_heads=12,
        head_dim=64,
        mlp=2048,  # 8/3 of the width: three matrices as large as two of 4 times it
    ),
    objective=CausalLM(),
    data=DataConfig(
        corpus=CorpusConfig(
            source="HuggingFaceFW/fineweb-edu",
            subset="sample-10BT",
            validation_fraction=0.001,
        ),
        tokenizer=TokenizerConfig(path="HuggingFaceTB/SmolLM2-135M"),
        max_train_examples=6_000 * 256,  # 6,000 steps: 3.1 G tokens, 20 a weight
        max_eval_examples=1024,
    ),
    optimizer=AdamW(beta2=0.95, weight_decay=0.1, clip=1.0),
    # The rate of the smallest GPT-3, whose batches had as many tokens.
    schedule=Schedule(peak=6e-4, warmup=500, decay="cosine", final=0.1),
    seq_len=2048,
    batch=256,  # 524,288 tokens a step
    accumulate=4,
    epochs=1,
    slice="v3-8",
    compute=Compute(rules=PRESETS["zero1"]),  # weights whole, one Adam among all
    eval_every=500,
    save_every=500,
    sample_prompt="The most important discovery in the history of science was",
)
