# SPDX-License-Identifier: Apache-2.0
"""The train step on one GPU beside a good loop in PyTorch: MFU, by one formula.

    python -m benchmarks.step.gpu                  # both models; README.md too
    python -m benchmarks.step.gpu gpt2 --rounds 3

Both in bf16 with float32 weights, flash attention, and AdamW; torch compiles its model,
and its AdamW is fused. The loops take turns on the GPU, which has to hold both. Needs
`pip install "jax[cuda13]" torch`. Five to ten minutes.
"""

import statistics
from pathlib import Path

from benchmarks.plan import markdown
from benchmarks.step.turns import Loop, Run, arguments, measure, ratio
from benchmarks.step.work import GPU, Work
from lm_scale.peaks import GPU_PEAK

README = Path(__file__).with_name("README.md")
LOOPS = ("ours", "torch, compiled")
# Neither takes the whole memory for itself.
ENV = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


def make(asked: str, name: str) -> Run:
    """The loop of that name; imports what it alone needs."""
    if name == "ours":
        from benchmarks.step import loop_of_ours

        return loop_of_ours.on_gpu(GPU[asked])
    from benchmarks.step import loop_of_torch

    return loop_of_torch.make(GPU[asked], compiled=True, device="cuda")


def line(asked: str, name: str, loop: Loop, ours: Loop, peak: float) -> list[str]:
    """Of the table."""
    work: Work = GPU[asked]
    speed = work.tokens * statistics.median(loop.turns)
    mfu = speed * work.model.train_flops_per_token(work.seq_len) / peak
    return [
        asked, name, f"{loop.start:.0f}", f"{speed:,.0f}", f"{mfu:.0%}",
        "" if loop is ours else ratio(ours, loop),
    ]  # fmt: skip


def main() -> None:
    models, rounds = arguments(__doc__, GPU, make)
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("torch finds no GPU here.")
    kind = torch.cuda.get_device_name()
    if kind not in GPU_PEAK:
        raise SystemExit(f"{kind}: not in the table of lm_scale/peaks.py.")
    peak = GPU_PEAK[kind]
    lines = []
    for asked in models:
        loops = measure("benchmarks.step.gpu", asked, GPU[asked], LOOPS, ENV, rounds)
        lines += [line(asked, *item, loops["ours"], peak) for item in loops.items()]
    header = ("model", "loop", "start (s)", "tokens/s", "MFU", "ours: times as fast")
    about = f"{kind}, {peak / 1e12:.0f} TFLOP/s, {rounds} rounds: the median."
    text = f"{markdown.table(header, lines)}\n\n{about}"
    print(text)
    if models == list(GPU):
        markdown.put(README, "gpu", text)


if __name__ == "__main__":
    main()
