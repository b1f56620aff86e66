# SPDX-License-Identifier: Apache-2.0
"""A RoBERTa-shaped masked LM on the documentation of Python itself.

Command   lm-scale train configs/quickstart_mlm.py
Hardware  any; a CPU is simulated as 8 devices
"""

from lm_scale.config import DataConfig, RunConfig
from lm_scale.data.corpus import CorpusConfig
from lm_scale.data.tokenizer import TokenizerConfig
from lm_scale.models import Compute, RobertaConfig
from lm_scale.objectives import MaskedLM
from lm_scale.optim import AdamW, Schedule

config = RunConfig(
    run_dir="runs/quickstart_mlm",
    model=RobertaConfig(
        vocab=8192,
        positions=128,
        layers=4,
        embed=256,
        heads=4,
        mlp=1024,
        dropout=0.0,  # one pass over the text: nothing to overfit
        attention_dropout=0.0,
    ),
    objective=MaskedLM(),
    data=DataConfig(
        corpus=CorpusConfig(source="python-docs", validation_fraction=0.05),
        tokenizer=TokenizerConfig(kind="roberta", vocab_size=8192),
    ),
    optimizer=AdamW(beta2=0.98, weight_decay=0.1, clip=1.0),
    schedule=Schedule(peak=2e-3, warmup=50, decay="cosine", final=0.1),
    seq_len=128,
    batch=8,
    steps=480,  # nearly one epoch
    compute=Compute(dtype="float32", remat="none"),
    simulated_devices=8,
    log_every=10,
    eval_every=120,
    save_every=120,
    sample_prompt="Return the <mask> of the object.",
)
