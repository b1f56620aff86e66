# SPDX-License-Identifier: Apache-2.0
"""roberta-base on Norwegian: the masked-LM example of the old Flax scripts.

Command   lm-scale train configs/roberta_base_norwegian.py
          (by flags, masks drawn one by one: launch/run_mlm_flax.py; docs/migration.md)
Hardware  TPU v3-8 (8 cores), each with 128 sequences of 128 tokens
To beat   loss 1.78, accuracy 0.64 on held-out text after 18 epochs in 15 h 32 min: the
          published run on one TPUv3-8, float32, on OSCAR 2019 (3,229,940 documents, 4.7
          GB), of which nobody can load the script any more. The text here is as many
          documents of FineWeb-2, so the losses are of another text.
Expected  not run yet: no TPU was at hand
"""

from lm_scale.config import DataConfig, RunConfig
from lm_scale.data.corpus import CorpusConfig
from lm_scale.data.tokenizer import TokenizerConfig
from lm_scale.models import Compute, RobertaConfig
from lm_scale.objectives import MaskedLM
from lm_scale.optim import AdamW, Schedule
from lm_scale.sharding import FULLY_SHARDED

config = RunConfig(
    run_dir="runs/roberta_base_norwegian",
    model=RobertaConfig(vocab=50_265),  # all else is roberta-base
    # As many masks in each sequence, so that the head works at these places alone: a
    # fifth of the step less. The original drew each token by itself.
    objective=MaskedLM(probability=0.15, fixed_count=True),
    data=DataConfig(
        corpus=CorpusConfig(
            source="HuggingFaceFW/fineweb-2",
            subset="nob_Latn",
            max_documents=3_229_940,
            validation_fraction=0.05,
        ),
        tokenizer=TokenizerConfig(kind="roberta", vocab_size=50_265, min_frequency=2),
        separator=False,  # the tokenizer puts <s> and </s> around each document
    ),
    optimizer=AdamW(beta1=0.9, beta2=0.98, weight_decay=0.01),
    schedule=Schedule(peak=3e-4, warmup=1000, decay="linear"),
    seq_len=128,
    batch=1024,  # 128 a core: 131,072 tokens a step
    epochs=18,
    slice="v3-8",
    # Each core keeps and updates an eighth of the weights, and gathers the others once
    # a step: 3 % less time than with all of them on each, and 0.9 GB.
    mesh=FULLY_SHARDED,
    # Weights and optimizer are float32, as the original's. Logits of the 19 positions
    # take 0.5 GB a core; the original's, of all 128, took 3.3 GB. Twelve layers one
    # after the other, and not in a loop: 7 % of the step less, and less memory.
    compute=Compute(
        dtype="bfloat16", loss_chunk=20, unroll=12, reshard_after_forward=False
    ),
    log_every=500,
    eval_every=2500,
    save_every=2500,
    sample_prompt="Oslo er hovedstaden i <mask>.",
)
