# SPDX-License-Identifier: Apache-2.0
"""GPT-2 (124 M) on Norwegian: the causal-LM example of the old Flax scripts.

Command   lm-scale train configs/gpt2_norwegian.py
          (the same by flags: launch/run_clm_flax.py; docs/migration.md)
Hardware  TPU v3-8 (8 cores), each with 64 sequences of 512 tokens
To beat   loss 3.24, perplexity 25.72 on held-out text after 20 epochs in about 21 h:
          the published run on one TPUv3-8, float32, on OSCAR 2019; see
          roberta_base_norwegian.py for the text here
Expected  not run yet: no TPU was at hand
"""

import dataclasses

from roberta_base_norwegian import config as masked

from lm_scale.config import RunConfig
from lm_scale.data.tokenizer import TokenizerConfig
from lm_scale.models import Compute, GPT2Config
from lm_scale.objectives import CausalLM
from lm_scale.optim import AdamW, Schedule
from lm_scale.sharding import FULLY_SHARDED

config = RunConfig(
    run_dir="runs/gpt2_norwegian",
    model=GPT2Config(embed_dropout=0.0, attention_dropout=0.0, residual_dropout=0.0),
    objective=CausalLM(),
    data=dataclasses.replace(
        masked.data,
        tokenizer=TokenizerConfig(kind="gpt2", vocab_size=50_257, min_frequency=2),
        separator=True,  # <|endoftext|> between documents; the original had none
    ),
    optimizer=AdamW(beta1=0.9, beta2=0.98, weight_decay=0.01),
    schedule=Schedule(peak=5e-3, warmup=1000, decay="linear"),
    seq_len=512,
    batch=512,  # 64 a core: 262,144 tokens a step
    epochs=20,
    slice="v3-8",
    mesh=FULLY_SHARDED,  # see roberta_base_norwegian.py
    # All layers one after the other: a twentieth of the step less than in a loop.
    compute=Compute(
        dtype="bfloat16", loss_chunk=64, unroll=12, reshard_after_forward=False
    ),
    log_every=500,
    eval_every=2500,
    save_every=2500,
    sample_prompt="Det var en gang",
)
