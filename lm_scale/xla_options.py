# SPDX-License-Identifier: Apache-2.0
"""XLA's options for a train step, by device: those that make it faster.

Found by compiling for the slices (benchmarks/step/README.md, "XLA's flags"), with what
each gains there; for CPUs by measuring. `train` compiles its step with them, and `plan`
plans with them.
"""

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lm_scale.compile_cache import uncached

# VMEM that one fusion may take, of which libtpu gives it 16 MiB by itself: with more,
# products of large matrices read their factors less often.
MORE_VMEM = {"xla_tpu_scoped_vmem_limit_kib": "98304"}
# Of devices that share a CPU: fewer new pages for each step, and Adam's moments are not
# copied before they are updated.
LESS_MEMORY = {
    "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
    "xla_cpu_copy_insertion_use_region_analysis": "True",
}
OPTIONS = {  # by `device_kind`
    "TPU v5 lite": MORE_VMEM,  # v5e
    "TPU v5e": MORE_VMEM,
    "TPU v5": MORE_VMEM,  # v5p
    "TPU v5p": MORE_VMEM,
    "TPU v6 lite": MORE_VMEM,
    "TPU v6e": MORE_VMEM,
    "cpu": LESS_MEMORY,  # several of them: one alone is no faster
}


def xla_options(mesh: Mesh) -> dict[str, str]:
    """The options for these devices; none for most, and none that XLA does not know."""
    device = mesh.devices.flat[0]
    if mesh.size == 1 and device.platform == "cpu":
        return {}
    options = OPTIONS.get(device.device_kind, {})
    return {
        name: value for name, value in options.items() if _is_known(name, value, mesh)
    }


def _is_known(name: str, value: str, mesh: Mesh) -> bool:
    """If the devices' compiler has the option; another version may have dropped it."""
    # On all of them: some are not this process's, and a mesh may be set.
    everywhere = NamedSharding(mesh, PartitionSpec())
    number = jax.ShapeDtypeStruct((), "int32", sharding=everywhere)
    try:
        with uncached():
            jax.jit(lambda x: x + 1).lower(number).compile({name: value})
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" not in str(error):
            raise
        return False
    return True
