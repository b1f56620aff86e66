# SPDX-License-Identifier: Apache-2.0
"""A run so small that a test can make it: 30 steps take a second, once compiled."""

import dataclasses
from pathlib import Path

from lm_scale.config import DataConfig, RunConfig
from lm_scale.data.corpus import CorpusConfig
from lm_scale.data.tokenizer import TokenizerConfig
from lm_scale.models import Compute, GPT2Config, RobertaConfig
from lm_scale.objectives import MaskedLM
from lm_scale.optim import AdamW, Schedule

WORDS = "the cat sat on a mat and saw one dog that had no hat but two fine red shoes"


def write_corpus(folder: Path, lines: int = 400) -> Path:
    """A text with something to learn: words follow one another at a fixed stride."""
    words = WORDS.split()

    def phrase(i: int) -> list[str]:
        return [words[(i + j * (1 + i % 3)) % len(words)] for j in range(6)]

    text = "".join(
        " ".join(phrase(i) + phrase(i // 2 + 5)) + "\n" for i in range(lines)
    )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "corpus.txt"
    path.write_text(text)
    return path


def causal_run(folder: Path, **changes) -> RunConfig:
    """A GPT-2 with dropout and accumulation."""
    config = RunConfig(
        run_dir=str(folder / "run"),
        model=GPT2Config(vocab=300, positions=24, layers=2, embed=32, heads=4, mlp=48),
        data=DataConfig(
            corpus=CorpusConfig(source=str(write_corpus(folder))),
            tokenizer=TokenizerConfig(vocab_size=300),
        ),
        optimizer=AdamW(weight_decay=0.1, clip=1.0),
        schedule=Schedule(peak=1e-2, warmup=5),
        seq_len=16,
        batch=16,
        accumulate=2,
        steps=30,
        compute=Compute(dtype="float32", remat="none"),
        log_every=1,
        eval_every=20,
        save_every=10,
        sample_prompt="the cat",
    )
    return dataclasses.replace(config, **changes)


def masked_run(folder: Path, **changes) -> RunConfig:
    """A RoBERTa with dropout."""
    config = causal_run(
        folder,
        model=RobertaConfig(
            vocab=300, positions=24, layers=2, embed=32, heads=4, mlp=48
        ),
        objective=MaskedLM(),
        accumulate=1,
        sample_prompt="the <mask> sat",
    )
    tokenizer = TokenizerConfig(kind="roberta", vocab_size=300)
    data = dataclasses.replace(config.data, tokenizer=tokenizer)
    return dataclasses.replace(config, **{"data": data, **changes})
