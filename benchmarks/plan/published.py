# SPDX-License-Identifier: Apache-2.0
"""Published runs on TPUs: what was trained, on what, and how fast it is said to be.

Where a shape or a batch is not published, `assumed` says what is taken for it.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from lm_scale.config import RunConfig, load_config
from lm_scale.models import Compute, GPT2Config, LlamaConfig
from lm_scale.objectives import MaskedLM
from lm_scale.optim import AdamW
from lm_scale.planning.accelerators import find_slice
from lm_scale.sharding import FULLY_SHARDED, PRESETS

CONFIGS = Path(__file__).parents[2] / "configs"
FSDP = PRESETS["fsdp"]


@dataclass(frozen=True)
class Published:
    """A run, planned as nearly as our step can be like theirs."""

    who: str
    model: str
    slice: str
    config: RunConfig
    given: str  # the figure, as published
    speed: tuple[float, float]  # tokens/s of all devices that follow from it
    source: str
    assumed: str  # what is not published, or differs here

    @property
    def name(self) -> str:
        return f"{self.who}, {self.model}, {self.slice}"


def of_file(name: str, dtype: str) -> RunConfig:
    """A shipped config: bfloat16 as it is, float32 as the old scripts computed.

    With the head at all places, as theirs.
    """
    words = ["--compute.dtype", dtype]
    config = load_config(str(CONFIGS / f"{name}.py"), words, prog="benchmarks.plan")
    if isinstance(config.objective, MaskedLM):
        config = dataclasses.replace(config, objective=MaskedLM())
    return config


def fsdp(model, rows: int, length: int, chips: str, compute: Compute) -> RunConfig:
    """`rows` sequences a device, weights and optimizer cut over all of them."""
    devices = find_slice(chips).devices
    return RunConfig(
        run_dir="runs/published", model=model, seq_len=length, batch=rows * devices,
        steps=1000, optimizer=AdamW(clip=1.0), mesh=FULLY_SHARDED, compute=compute,
        slice=chips,
    )  # fmt: skip


def llama(name: str) -> LlamaConfig:
    """The shape of a shipped config; its positions those that are trained."""
    model = load_config(str(CONFIGS / f"{name}.py"), [], prog="benchmarks.plan").model
    assert isinstance(model, LlamaConfig)
    return dataclasses.replace(model, positions=8192)


LLAMA2_70B = LlamaConfig(
    vocab=32_000, positions=4096, layers=80, embed=8192, heads=64, kv_heads=8,
    head_dim=128, mlp=28_672,
)  # fmt: skip


def gpt2(layers: int, embed: int, heads: int, length: int, vocab: int) -> GPT2Config:
    """Of a width, with an MLP of four times that and no dropout."""
    return GPT2Config(
        vocab=vocab, positions=length, layers=layers, embed=embed, heads=heads,
        mlp=4 * embed, embed_dropout=0.0, attention_dropout=0.0, residual_dropout=0.0,
    )  # fmt: skip


def maxtext(
    model: LlamaConfig, name: str, chips: str, rows: int, length: int, compute: Compute,
    *, each: tuple[float, float], source: str, assumed: str,
) -> Published:  # fmt: skip
    """A row of MaxText's, which gives tokens/s of a chip: the least and the most."""
    config, number = fsdp(model, rows, length, chips, compute), find_slice(chips).chips
    given = "–".join(f"{x:,.0f}" for x in sorted(set(each))) + " tokens/s/chip"
    return Published("MaxText", name, chips, config, given,
                     (each[0] * number, each[1] * number), source, assumed)  # fmt: skip


def levanter(
    model: GPT2Config, name: str, rows: int, mfu: float, assumed: str
) -> Published:
    """A row of Levanter's 1.0 release: MFU on a v3-256.

    Theirs counts each query with all keys, as if nothing were masked; ours sees half of
    them: (T + 1) / 2, which is T at a length of 2 T - 1.
    """
    chips, length = "v3-256", model.positions
    slice_ = find_slice(chips)
    compute = Compute(rules=FSDP, remat="full", loss_chunk=length)
    flops = model.train_flops_per_token(2 * length - 1)
    speed = mfu * slice_.generation.peak * slice_.devices / flops
    return Published(
        "Levanter", name, chips, fsdp(model, rows, length, chips, compute),
        f"MFU {mfu:.1%}, attention counted whole", (speed, speed),
        "docs/Levanter-1.0-Release.md of stanford-crfm/levanter, mid-2023", assumed,
    )  # fmt: skip


OFFLOADED = Compute(rules=FSDP, remat="attention", offload=True)
THEIR_REMAT = (
    "they offload the layer's input and the four projections of attention to the host; "
    "here the attention's output is offloaded, and the projections are made again"
)


def published() -> list[Published]:
    """All rows; the shapes of Levanter's are those of config/gpt2_*.yaml there."""
    flax = "examples/flax/language-modeling/README.md of transformers, 2021"
    words = "tokens a word, taken as 1.25 to 1.45, and so the run's tokens"
    recipes = (
        ("roberta-base, 128 x 128 a core", "roberta_base_norwegian",
         "18 epochs in 15 h 32 min", (310e3, 360e3), words),
        ("GPT-2 124M, 64 x 512 a core", "gpt2_norwegian",
         "20 epochs in less than about 21 h", (250e3, 290e3),
         f"{words}; a lower limit"),
    )  # fmt: skip
    trillium = "tpu-recipes of AI-Hypercomputer, training/trillium/Llama3.1-8B-MaxText"
    tiers = "docs/reference/models/tiering.md of MaxText"
    small, large = llama("llama3_8b"), llama("llama3_70b")
    no_dropout = "no dropout (theirs is not stated)"
    return [
        *[
            Published("Flax scripts", f"{model}, {dtype}", "v3-8", of_file(name, dtype),
                      f"{given}, float32", speed, flax, assumed)
            for model, name, given, speed, assumed in recipes
            for dtype in ("bfloat16", "float32")
        ],
        maxtext(small, "Llama 3.1 8B, 3 x 8192 a chip", "v6e-8", 3, 8192, OFFLOADED,
                each=(7139, 7139), source=f"{trillium}/v6e-8", assumed=THEIR_REMAT),
        maxtext(small, "Llama 3.1 8B, 4 x 8192 a chip", "v6e-256", 4, 8192, OFFLOADED,
                each=(7207, 7756), source=f"{tiers}; {trillium}/v6e-256",
                assumed=THEIR_REMAT),
        maxtext(large, "Llama 3.1 70B, 4 x 8192 a chip", "v6e-256", 4, 8192, OFFLOADED,
                each=(960, 960), source=tiers, assumed="the batch: 4 or 5 a chip in "
                f"versions of maxtext_trillium_model_configs.py; {THEIR_REMAT}"),
        maxtext(LLAMA2_70B, "Llama 2 70B, 4 x 4096 a chip", "v5p-512", 4, 4096,
                Compute(rules=FSDP, remat="full"), each=(692, 692), source=tiers,
                assumed="256 chips, as in configs/v5p/llama2_70b.sh (the page says 512 "
                "chips); they keep all products but two of the MLP, here a layer is "
                "made again"),
        levanter(gpt2(24, 1024, 16, 1024, 50_257), "GPT-2 345M, 2 x 1024 a core", 2,
                 0.351, f"the batch; {no_dropout}"),
        levanter(gpt2(48, 1536, 24, 1024, 50_257), "GPT-2 1.4B, 2 x 1024 a core", 2,
                 0.417, f"the batch; {no_dropout}"),
        levanter(gpt2(32, 4096, 32, 2048, 50_280), "GPT-2 6.7B, 4 x 2048 a core", 4,
                 0.473, "the batch, of config/gpt2_7b.yaml; the vocabulary "
                 "(GPT-NeoX's, whose 50,277 are filled up)"),
    ]  # fmt: skip
