# SPDX-License-Identifier: Apache-2.0
"""The nodes that a run needs on GKE, by the labels and resources that they have."""

import re
from dataclasses import dataclass

from launch.errors import Refused
from launch.slices import Generation, Slice, find

# TPU names, https://cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus
LABELS = {
    "v3": "tpu-v3-slice",
    "v4": "tpu-v4-podslice",
    "v5e": "tpu-v5-lite-podslice",
    "v5p": "tpu-v5p-slice",
    "v6e": "tpu-v6e-slice",
    "tpu7x": "tpu7x",
}
FLAT = {
    1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16",
    256: "16x16", 512: "16x32", 1024: "32x32",
}  # fmt: skip
CUBES = {
    4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8",
    256: "4x8x8", 512: "8x8x8", 1024: "8x8x16", 2048: "8x16x16", 3072: "12x16x16",
    4096: "16x16x16", 4480: "8x20x28", 6144: "16x16x24",
}  # fmt: skip
TOPOLOGIES = {
    "v3": FLAT, "v4": CUBES, "v5e": FLAT, "v5p": CUBES, "v6e": FLAT, "tpu7x": CUBES,
}  # fmt: skip
TPU7X = Generation(
    "tpu7x", "tpu7x", 2, 2, "TPU7x", "", tuple(2 * chips for chips in CUBES), ""
)


@dataclass(frozen=True)
class Hardware:
    """The nodes of a run."""

    platform: str  # tpu, gpu or cpu
    title: str
    pods: int  # of a slice: one a VM
    selector: dict[str, str]
    resources: dict[str, dict[str, str]]
    slices: int = 1


def tpu(name: str, slices: int) -> Hardware:
    """Refused, with a message for the user, for what GKE has not."""
    found = find_slice(name)
    generation, chips = found.generation.name, found.chips
    if generation not in LABELS:
        raise Refused(
            f"slice {name!r}: GKE has no TPU {generation}; it has {', '.join(LABELS)}. "
            f"For {generation} use launch/tpu.py."
        )
    topology = TOPOLOGIES[generation].get(chips)
    if topology is None:
        raise Refused(f"slice {name!r}: GKE has no topology of {chips} chips.")
    if slices > 1 and (found.hosts == 1 or generation == "v3"):
        raise Refused(
            f"--slices {slices} of {name!r}: GKE connects only slices of several VMs "
            f"each, and none of v3. Choose a larger slice, or --slices 1."
        )
    label = LABELS[generation]
    if generation == "v3" and found.hosts == 1:
        label = "tpu-v3-device"
    count = {"google.com/tpu": str(found.chips_per_host)}
    several = f"{slices} x " if slices > 1 else ""
    return Hardware(
        "tpu", f"{several}{found.name} ({topology})", found.hosts,
        {
            "cloud.google.com/gke-tpu-accelerator": label,
            "cloud.google.com/gke-tpu-topology": topology,
        },
        {"requests": count, "limits": count}, slices,
    )  # fmt: skip


def find_slice(name: str) -> Slice:
    """The slice of a name, TPU7x among them, which only GKE has."""
    seventh = re.fullmatch(r"(?:tpu7x|7x|v7x)-(\d+)", name.strip().lower())
    if seventh is None:
        return find(name)
    if int(seventh[1]) not in TPU7X.sizes:
        sizes = ", ".join(map(str, TPU7X.sizes))
        raise Refused(
            f"slice {name!r}: there is none of {seventh[1]}. The number counts "
            f"TensorCores, 2 a chip; of tpu7x there are {sizes}."
        )
    return Slice(TPU7X, int(seventh[1]))


def gpu(name: str, per_node: int, nodes: int) -> Hardware:
    count = {"nvidia.com/gpu": str(per_node)}
    return Hardware(
        "gpu", f"{nodes} x {per_node} {name}", nodes,
        {"cloud.google.com/gke-accelerator": name},
        {"requests": count, "limits": count},
    )  # fmt: skip


def cpu(cores: int, memory: str, nodes: int) -> Hardware:
    wanted = {"cpu": str(cores), "memory": memory}
    resources = {"requests": wanted, "limits": {"memory": memory}}
    return Hardware("cpu", f"{nodes} x {cores} cores", nodes, {}, resources)
