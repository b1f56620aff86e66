# SPDX-License-Identifier: Apache-2.0
"""TPU slices by name: how many VMs, chips and JAX devices, and which image they run.

Sizes and images are those of Cloud TPU's documentation; what a VM really has is checked
on it (health.py), since tables grow old.
"""

import re
from dataclasses import dataclass

from launch.errors import Refused

POWERS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class Generation:
    """What the slices of a generation have in common."""

    name: str
    prefix: str  # of an accelerator type
    cores: (
        int  # TensorCores of a chip, as a name's number counts them; 1: it counts chips
    )
    devices: int  # JAX devices of a chip: with megacore both cores are one
    kind: str  # `device_kind` of a device
    runtime: str  # image of a VM
    sizes: tuple[int, ...]  # the numbers that a name may have
    zone: str  # one that has them, for messages


GENERATIONS = (
    Generation("v2", "v2", 2, 2, "TPU v2", "tpu-ubuntu2204-base",
               (8, 32, 128, 256, 512), "us-central1-b"),
    Generation("v3", "v3", 2, 2, "TPU v3", "tpu-ubuntu2204-base",
               (8, 32, 128, 256, 512, 1024, 2048), "europe-west4-a"),
    Generation("v4", "v4", 2, 1, "TPU v4", "tpu-ubuntu2204-base",
               POWERS, "us-central2-b"),
    Generation("v5e", "v5litepod", 1, 1, "TPU v5 lite", "v2-alpha-tpuv5-lite",
               (1, 4, 8, 16, 32, 64, 128, 256), "us-west4-a"),
    Generation("v5p", "v5p", 2, 1, "TPU v5", "v2-alpha-tpuv5",
               (*POWERS, 6144, 8192, 8960, 12288), "us-east5-a"),
    Generation("v6e", "v6e", 1, 1, "TPU v6 lite", "v2-alpha-tpuv6e",
               (1, 4, 8, 16, 32, 64, 128, 256), "us-east5-b"),
)  # fmt: skip

NO_TPU7X = (
    "Cloud TPU's API, which `launch/tpu.py` uses, is frozen and has none after v6e. "
    "TPU7x exists on Google Kubernetes Engine (launch/gke.py) and as Compute Engine "
    "machines (tpu7x-standard-4t)."
)


@dataclass(frozen=True)
class Slice:
    """A TPU slice: one or more VMs, whose chips are connected."""

    generation: Generation
    number: int  # in its name: TensorCores or chips

    @property
    def name(self) -> str:
        """The accelerator type, as gcloud takes it."""
        return f"{self.generation.prefix}-{self.number}"

    @property
    def chips(self) -> int:
        return self.number // self.generation.cores

    @property
    def chips_per_host(self) -> int:
        """v5e and v6e have VMs of 1, 4 or 8 chips; where there are several, of 4."""
        alone = self.generation.cores == 1 and self.chips <= 8
        return self.chips if alone else 4

    @property
    def hosts(self) -> int:
        """VMs, each of which runs one process."""
        return self.chips // self.chips_per_host

    @property
    def devices_per_host(self) -> int:
        return self.chips_per_host * self.generation.devices

    @property
    def devices(self) -> int:
        return self.devices_per_host * self.hosts


def find(name: str) -> Slice:
    """The slice of a name such as v3-8, v5litepod-16 or v5e-16.

    Raises Refused with a message for the user.
    """
    found = re.fullmatch(r"(v\d+[a-z]*|v5litepod|tpu7x|7x)-(\d+)", name.strip().lower())
    if found is None:
        known = ", ".join(f"{x.name}-{x.sizes[-4]}" for x in GENERATIONS)
        raise Refused(f"slice {name!r}: expected a TPU type and a size: {known}.")
    prefix, number = found[1], int(found[2])
    if prefix.endswith("7x") or prefix == "v7":
        raise Refused(f"slice {name!r}: {NO_TPU7X}")
    for generation in GENERATIONS:
        if prefix in (generation.name, generation.prefix):
            if number not in generation.sizes:
                sizes = ", ".join(map(str, generation.sizes))
                counts = "chips" if generation.cores == 1 else "TensorCores, 2 a chip"
                raise Refused(
                    f"slice {name!r}: there is none of {number}. The number counts "
                    f"{counts}; of {generation.name} there are {sizes}."
                )
            return Slice(generation, number)
    names = ", ".join(generation.name for generation in GENERATIONS)
    raise Refused(f"slice {name!r}: no TPU {prefix}; expected one of {names}.")
