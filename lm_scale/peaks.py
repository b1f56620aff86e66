# SPDX-License-Identifier: Apache-2.0
"""What the accelerators could do at most, by their makers' tables."""

from typing import Any

# Dense bf16 FLOP/s by `device_kind`; for TPUs of one TensorCore, because a JAX device
# is one core (v2, v3, 7x) or a whole chip of two (v5p; v4 by default: "megacore").
# TPUs: cloud.google.com/tpu/docs/<generation>, "Peak compute per chip" (bf16).
TPU_CORE_PEAK = {
    "TPU v2": 45e12 / 2,  # 45 a chip of two cores
    "TPU v3": 123e12 / 2,  # 123 a chip of two cores
    "TPU v4": 275e12 / 2,  # 275 a chip of two cores
    "TPU v5 lite": 197e12,  # v5e, one core
    "TPU v5e": 197e12,
    "TPU v5": 459e12 / 2,  # v5p, 459 a chip of two cores
    "TPU v5p": 459e12 / 2,
    "TPU v6 lite": 918e12,  # v6e, one core
    "TPU v6e": 918e12,
    "TPU7x": 2307e12 / 2,  # 2307 a chip of two cores
}
# GPUs: NVIDIA's data sheets; from the H100 on they state twice this, "with sparsity".
GPU_PEAK = {
    "NVIDIA A100-PCIE-40GB": 312e12,  # A100 data sheet
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 PCIe": 1513e12 / 2,  # H100 data sheet
    "NVIDIA H100 NVL": 1671e12 / 2,
    "NVIDIA H100 80GB HBM3": 1979e12 / 2,  # the SXM5 board
    "NVIDIA H200": 1979e12 / 2,  # H200 data sheet
    "NVIDIA L4": 242e12 / 2,  # L4 data sheet
    "NVIDIA L40S": 733e12 / 2,  # L40S data sheet
}


def peak_flops(device: Any) -> float | None:
    """The bf16 peak of one JAX device in FLOP/s; None if its kind is not known."""
    kind = device.device_kind
    if kind in TPU_CORE_PEAK:
        return TPU_CORE_PEAK[kind] * getattr(device, "num_cores", 1)
    return GPU_PEAK.get(kind)
