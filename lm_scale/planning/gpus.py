# SPDX-License-Identifier: Apache-2.0
"""The GPUs of a plan: this machine's own, or stand-ins for those that are not here.

XLA compiles for a GPU only where there is one. A stand-in has what is asked of a device
before a program is compiled: a mesh can be made of it, and a step traced for it.
"""

from dataclasses import dataclass
from typing import Any

import jax

from lm_scale.planning.accelerators import Slice

CAPABILITIES = {
    "a100": "8.0", "a100-80gb": "8.0", "h100": "9.0", "h200": "9.0", "l4": "8.9",
    "l40s": "8.9",
}  # fmt: skip


@dataclass(frozen=True)
class AbsentGpu:
    """A GPU that is not here."""

    id: int
    device_kind: str
    compute_capability: str
    platform: str = "gpu"
    process_index: int = 0


def gpu_devices(chosen: Slice) -> list[Any]:
    """So many GPUs of that kind: those that are here, or stand-ins."""
    generation = chosen.generation
    here = [gpu for gpu in _gpus() if gpu.device_kind == generation.kind]
    if len(here) >= chosen.chips:
        return here[: chosen.chips]
    capability = CAPABILITIES[generation.name]
    return [
        AbsentGpu(number, generation.kind, capability) for number in range(chosen.chips)
    ]


def _gpus() -> list[Any]:
    try:
        return jax.devices("gpu")
    except RuntimeError:  # jax has no such backend here
        return []
