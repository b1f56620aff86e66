# SPDX-License-Identifier: Apache-2.0
"""The train step on one GPU beside a good loop in PyTorch: MFU, by one formula.

    python -m benchmarks.step.gpu                  # both models; README.md too
    python -m benchmarks.step.gpu gpt2 --rounds 3

Both in bf16 with float32 weights, flash attention, and AdamW; torch compiles its model,
and its AdamW is fused. The loops take turns on the GPU, which has to hold both. Needs
`pip install "jax[cuda13]" torch`. Five to ten minutes.
"""

import argparse
import statistics
from pathlib import Path

from benchmarks.plan import markdown
from benchmarks.step.turns import Loop, Run, ratio, serve, take_turns
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


def measure(asked: str, rounds: int) -> dict[str, Loop]:
    """Both loops of a model, which took turns."""
    loops = {}
    for name in LOOPS:
        loops[name] = Loop(["-m", "benchmarks.step.gpu", asked, "--loop", name], ENV)
        print(f"{asked}: {name}: began in {loops[name].start:.1f} s", flush=True)
    take_turns(loops, rounds, GPU[asked].tokens)
    return loops


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
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("models", nargs="*", help=f"{', '.join(GPU)}; all by default")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--loop", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.loop:
        serve(make(args.models[0], args.loop))
        return
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("torch finds no GPU here.")
    kind = torch.cuda.get_device_name()
    if kind not in GPU_PEAK:
        raise SystemExit(f"{kind}: not in the table of lm_scale/peaks.py.")
    peak = GPU_PEAK[kind]
    models = args.models or list(GPU)
    lines = []
    for asked in models:
        loops = measure(asked, args.rounds)
        lines += [line(asked, *item, loops["ours"], peak) for item in loops.items()]
    header = ("model", "loop", "start (s)", "tokens/s", "MFU", "ours: times as fast")
    about = f"{kind}, {peak / 1e12:.0f} TFLOP/s, {args.rounds} rounds: the median."
    text = f"{markdown.table(header, lines)}\n\n{about}"
    print(text)
    if models == list(GPU):
        markdown.put(README, "gpu", text)


if __name__ == "__main__":
    main()
