# SPDX-License-Identifier: Apache-2.0
"""A GPT-2-shaped causal LM of 5.3 M weights on the documentation of Python itself.

Command   ./launch/quickstart   (or: lm-scale train configs/quickstart.py)
Hardware  any; a CPU is simulated as 8 devices; about 6 minutes on 2 cores
Expected  held-out loss about 5.6, that of a unigram model 6.7
"""

from lm_scale.config import DataConfig, RunConfig
from lm_scale.data.corpus import CorpusConfig
from lm_scale.data.tokenizer import TokenizerConfig
from lm_scale.models import Compute, GPT2Config
from lm_scale.objectives import CausalLM
from lm_scale.optim import AdamW, Schedule
from lm_scale.sharding import FULLY_SHARDED

config = RunConfig(
    run_dir="runs/quickstart",
    model=GPT2Config(
        vocab=8192,
        positions=128,
        layers=4,
        embed=256,
        heads=4,
        mlp=1024,
        embed_dropout=0.0,  # one pass over the text: nothing to overfit
        attention_dropout=0.0,
        residual_dropout=0.0,
    ),
    objective=CausalLM(),
    data=DataConfig(
        corpus=CorpusConfig(source="python-docs", validation_fraction=0.05),
        tokenizer=TokenizerConfig(kind="gpt2", vocab_size=8192),
    ),
    optimizer=AdamW(beta2=0.98, weight_decay=0.1, clip=1.0),
    schedule=Schedule(peak=1e-3, warmup=50, decay="cosine", final=0.1),
    seq_len=128,
    batch=8,
    steps=420,  # about 0.8 epochs: 5 minutes on 2 cores
    mesh=FULLY_SHARDED,  # on simulated devices: one Adam in all, not one a device
    compute=Compute(dtype="float32", remat="none"),
    simulated_devices=8,
    log_every=10,
    eval_every=140,
    save_every=140,
    sample_prompt="The function returns",
)
