# SPDX-License-Identifier: Apache-2.0
"""What `cpu.py` and `gpu.py` train: models, batches, and the tokens in them."""

from dataclasses import dataclass

import numpy as np

from lm_scale.models import GPT2Config, LlamaConfig, ModelConfig, RobertaConfig
from lm_scale.objectives import IGNORE, MaskedLM

# Of every loop, AdamW's.
LEARNING_RATE, BETAS, WEIGHT_DECAY = 3e-4, (0.9, 0.98), 0.01
MASK, FIRST_WORD = 4, 5  # tokens


@dataclass(frozen=True)
class Work:
    """A model and its batch."""

    model: ModelConfig
    rows: int
    seq_len: int

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.rows * self.seq_len

    @property
    def masked(self) -> int | None:
        """Masked places of a row; None: a causal model, which learns from all."""
        if not isinstance(self.model, RobertaConfig):
            return None
        return round(MaskedLM().probability * self.seq_len)

    def batch(self) -> dict[str, np.ndarray]:
        """As the train step takes it, int32; even draws, the same in every step."""
        rng = np.random.default_rng(0)
        shape = (self.rows, self.seq_len)
        tokens = rng.integers(FIRST_WORD, self.model.vocab, shape, dtype=np.int32)
        if self.masked is None:
            ends = np.full((self.rows, 1), IGNORE, np.int32)
            return {"tokens": tokens, "labels": np.hstack([tokens[:, 1:], ends])}
        some = np.argsort(rng.random(shape), axis=1)[:, : self.masked]
        places = np.sort(some, axis=1).astype(np.int32)
        labels = np.full(shape, IGNORE, np.int32)
        np.put_along_axis(labels, places, np.take_along_axis(tokens, places, 1), 1)
        np.put_along_axis(tokens, places, MASK, 1)
        return {"tokens": tokens, "labels": labels, "masked_positions": places}


SMALL = dict(vocab=8192, layers=4, embed=256, heads=4, mlp=1024)
CPU = {
    "gpt2": Work(GPT2Config(positions=256, **SMALL), rows=8, seq_len=256),
    "roberta": Work(RobertaConfig(positions=128, **SMALL), rows=16, seq_len=128),
}
GPU = {
    # 124 M weights, the vocabulary filled up to a multiple of 64; no dropout, which
    # flash attention of jax does without.
    "gpt2": Work(
        GPT2Config(
            vocab=50_304, embed_dropout=0.0, attention_dropout=0.0, residual_dropout=0.0
        ),
        rows=32,
        seq_len=1024,
    ),
    # The shape of configs/llama_1b.py.
    "llama": Work(
        LlamaConfig(
            vocab=128_256, layers=16, embed=2048, heads=32, kv_heads=8, mlp=8192,
            tied=True, rope_theta=500_000.0,
        ),
        rows=8,
        seq_len=2048,
    ),
}  # fmt: skip
