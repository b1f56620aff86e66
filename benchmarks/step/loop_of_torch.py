# SPDX-License-Identifier: Apache-2.0
"""A plain training loop in PyTorch, with the models of transformers."""

import torch
import transformers

from benchmarks.step import work
from benchmarks.step.turns import Run


def make(asked: work.Work, *, compiled: bool, device: str) -> Run:
    """On a GPU in bf16 (autocast), else in float32."""
    torch.manual_seed(0)
    gpu = device == "cuda"
    torch.set_float32_matmul_precision("high" if gpu else "highest")
    hf = asked.model.to_hf()
    kind = hf.pop("model_type")
    (architecture,) = hf["architectures"]
    outside = {"bos_token_id": None, "eos_token_id": None}  # of a small vocabulary
    config = transformers.AutoConfig.for_model(kind, **hf, **outside, use_cache=False)
    config._attn_implementation = "sdpa"  # flash attention on a GPU
    model = getattr(transformers, architecture)(config).to(device).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=work.LEARNING_RATE, betas=work.BETAS,
        weight_decay=work.WEIGHT_DECAY, fused=True,
    )  # fmt: skip
    batch = {
        name: torch.tensor(array, dtype=torch.long, device=device)
        for name, array in asked.batch().items()
    }

    def loss_of(tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=gpu):
            logits = model(input_ids=tokens).logits
        return torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100
        )

    if compiled:
        loss_of = torch.compile(loss_of)

    def run(steps: int) -> float:
        for _ in range(steps):
            loss = loss_of(batch["tokens"], batch["labels"])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return run
