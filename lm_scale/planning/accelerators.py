# SPDX-License-Identifier: Apache-2.0
"""TPU slices and GPUs by name: the compiler's topology, what their makers publish.

A figure that is not published is None, and what would follow from it is left out.
"""

import re
from dataclasses import dataclass

from lm_scale.errors import InputError
from lm_scale.peaks import GPU_PEAK, TPU_CORE_PEAK

GIB = 2**30
NODE = 8  # GPUs that NVLink joins


@dataclass(frozen=True)
class Generation:
    """What the slices of a generation have in common; figures are of one chip."""

    name: str  # as libtpu names topologies
    prefixes: tuple[str, ...]  # of slices' names
    counts_cores: bool  # the number in a slice's name: of TensorCores, or of chips
    cores: int  # TensorCores of a chip
    devices: int  # JAX devices of a chip, as libtpu compiles for it
    kind: str  # `device_kind`
    dimensions: int  # of the torus or mesh that the chips make; 0: they are GPUs
    hbm: float  # bytes
    usable: float | None  # bytes of a device's HBM that programs get
    hbm_bandwidth: float | None  # bytes/s
    ici_bandwidth: float | None  # bytes/s that a chip sends, over all ICI or NVLink
    clock: float | None  # Hz
    note: str = ""  # what one should know of how libtpu compiles for it

    @property
    def is_gpu(self) -> bool:
        """If XLA compiles for it only where there is one."""
        return self.dimensions == 0

    @property
    def peak(self) -> float:
        """FLOP/s of a JAX device, dense bf16."""
        if self.is_gpu:
            return GPU_PEAK[self.kind]
        return TPU_CORE_PEAK[self.kind] * self.cores / self.devices


# HBM, its bandwidth: cloud.google.com/tpu/docs/<generation>, "HBM capacity and
# bandwidth" (per chip). v2: Norrie et al. 2021, "The design process for Google's
# training chips: TPUv2 and TPUv3", IEEE Micro 41(2): 16 GiB, 700 GB/s.
# ICI: the same pages. v5p: half of "bidirectional ICI bandwidth per chip" (1200 GB/s);
# v3, v4, v5e and v6e: "all-reduce bandwidth per Pod" by its chips, which for v5e is
# half of the bidirectional 400 GB/s as well.
# Usable HBM: what libtpu 0.0.42 says is available when a program is too large for it.
# Clock. v2, v3: Norrie et al.; v4: Jouppi et al. 2023, "TPU v4", table 4. Not published
# for those after: the peak by the FLOPs that the matrix units do a cycle, 2 x 128 x 128
# each, 4 a core (v5e, v5p); v6e's are four times as large. Their number follows from
# what libtpu reckons for a product of 4096 x 4096 matrices: 127 k, 252 k and 456 k
# FLOPs a cycle, for units of 131 k, 262 k and 524 k. (v2 to v4: 32 k, 62 k and 117 k
# for units of 33 k, 66 k and 131 k.)
# TPU7x: of its page only the capacity was at hand.
GENERATIONS = (
    Generation("v2", ("v2",), True, 2, 2, "TPU v2", 2,
               16 * GIB, 7.48 * GIB, 700e9, None, 700e6),
    Generation("v3", ("v3",), True, 2, 2, "TPU v3", 2,
               32 * GIB, 15.48 * GIB, 900e9, 340e12 / 1024, 940e6),
    Generation("v4", ("v4",), True, 2, 2, "TPU v4", 3,
               32 * GIB, 15.25 * GIB, 1200e9, 1.1e15 / 4096, 1050e6,
               "a device is one core here, with half of a chip's memory; on Cloud the "
               "two cores of a v4 are one device (megacore), the mesh half as large"),
    Generation("v5e", ("v5e", "v5litepod"), False, 1, 1, "TPU v5 lite", 2,
               16 * GIB, 15.75 * GIB, 819e9, 51.2e12 / 256, 197e12 / 2**17),
    Generation("v5p", ("v5p",), True, 2, 1, "TPU v5", 3,
               95 * GIB, 95.74 * GIB, 2765e9, 600e9, 459e12 / 2**18),
    Generation("v6e", ("v6e",), False, 1, 1, "TPU v6 lite", 2,
               32 * GIB, 31.25 * GIB, 1600e9, 102.4e12 / 256, 918e12 / 2**19),
    Generation("tpu7x", ("tpu7x", "7x"), True, 2, 2, "TPU7x", 3,
               192 * GIB, None, None, None, None),
)  # fmt: skip
# NVIDIA's data sheets: A100 (both SXM boards), H100 (SXM5), H200, L4, L40S. Of NVLink
# they tell both directions together: half is what a GPU sends. Memory: what the driver
# shows of it; JAX takes three quarters unless XLA_PYTHON_CLIENT_MEM_FRACTION says
# otherwise.
FRACTION = 0.75
FRACTION_NOTE = (
    f"JAX gives programs {FRACTION:.0%} of a GPU's memory, unless "
    f"XLA_PYTHON_CLIENT_MEM_FRACTION=.92, say, is set"
)


def _gpu(
    name: str, kind: str, hbm: float, bandwidth: float, nvlink: float | None
) -> Generation:
    return Generation(
        name, (name,), False, 1, 1, kind, 0, hbm * GIB, FRACTION * hbm * GIB, bandwidth,
        nvlink, None, FRACTION_NOTE,
    )  # fmt: skip


GPUS = (
    _gpu("a100", "NVIDIA A100-SXM4-40GB", 39.6, 1555e9, 300e9),
    _gpu("a100-80gb", "NVIDIA A100-SXM4-80GB", 79.6, 2039e9, 300e9),
    _gpu("h100", "NVIDIA H100 80GB HBM3", 79.6, 3350e9, 450e9),
    _gpu("h200", "NVIDIA H200", 139.8, 4800e9, 450e9),
    _gpu("l4", "NVIDIA L4", 22.5, 300e9, None),
    _gpu("l40s", "NVIDIA L40S", 44.9, 864e9, None),
)
# Chips along each dimension; the pages' tables of slices.
SQUARES = {
    1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16",
    256: "16x16", 512: "16x32", 1024: "32x32",
}  # fmt: skip
CUBES = {
    4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8",
    256: "4x8x8", 512: "8x8x8", 1024: "8x8x16", 2048: "8x16x16", 4096: "16x16x16",
    6144: "16x16x24",
}  # fmt: skip
LARGEST = {"v2": 256, "v3": 1024, "v4": 4096, "v5e": 256, "v5p": 6144, "v6e": 256,
           "tpu7x": 4096}  # fmt: skip  # chips of a slice
EXAMPLES = "v3-8, v4-128, v5e-256 (or v5litepod-256), v5p-512, v6e-64, tpu7x-128"
GPU_EXAMPLES = "a100-8, a100-80gb-8, h100-8, h200-8, l4-1, l40s-4"


@dataclass(frozen=True)
class Slice:
    """So many chips of a generation, all connected with one another; or GPUs."""

    name: str
    generation: Generation
    chips: int

    @property
    def topology(self) -> str:
        """As `jax.experimental.topologies` takes it; none of GPUs."""
        if self.generation.is_gpu:
            return ""
        shapes = SQUARES if self.generation.dimensions == 2 else CUBES
        return f"{self.generation.name}:{shapes[self.chips]}"

    @property
    def devices(self) -> int:
        """JAX devices."""
        return self.chips * self.generation.devices

    @property
    def hbm(self) -> float:
        """Bytes of a device."""
        return self.generation.hbm / self.generation.devices

    @property
    def usable_hbm(self) -> float:
        """Bytes of a device that programs get; all, where that is not known."""
        return self.generation.usable or self.hbm

    @property
    def hbm_bandwidth(self) -> float | None:
        """Bytes/s of a device."""
        return self._share(self.generation.hbm_bandwidth)

    @property
    def ici_bandwidth(self) -> float | None:
        """Bytes/s that a device can send to others of the slice, all links together.

        None where nodes of GPUs are joined by a network of which nothing is known.
        """
        if self.generation.is_gpu and self.chips > NODE:
            return None
        return self._share(self.generation.ici_bandwidth)

    def _share(self, of_chip: float | None) -> float | None:
        return None if of_chip is None else of_chip / self.generation.devices


def find_slice(name: str) -> Slice:
    """The slice of a name such as v3-8, v5e-16, v5litepod-16 or, of GPUs, h100-8.

    Raises InputError for an unknown generation or a size that it does not come in.
    """
    found = re.fullmatch(r"([a-z0-9-]+)-(\d+)", name.strip().lower())
    prefix, number = (found[1], int(found[2])) if found else (name, 0)
    for generation in GPUS:
        if prefix in generation.prefixes and number:
            return Slice(f"{prefix}-{number}", generation, number)
    for generation in GENERATIONS:
        if prefix not in generation.prefixes:
            continue
        counted = generation.cores if generation.counts_cores else 1
        shapes = SQUARES if generation.dimensions == 2 else CUBES
        sizes = {n * counted: n for n in shapes if n <= LARGEST[generation.name]}
        if counted > 1:
            sizes.pop(counted, None)  # half of a host's chips are not to be had
        if number not in sizes:
            what = "TensorCores, 2 a chip" if counted > 1 else "chips"
            raise InputError(
                f"slice {name!r}: there is none of {number}. The number counts {what}; "
                f"of {generation.name} there are {', '.join(map(str, sizes))}."
            )
        return Slice(f"{prefix}-{number}", generation, sizes[number])
    raise InputError(
        f"slice {name!r} is not known. Expected a TPU generation and a size, such as "
        f"{EXAMPLES}; or a GPU and a number: {GPU_EXAMPLES}."
    )
