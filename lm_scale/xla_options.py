# SPDX-License-Identifier: Apache-2.0
"""XLA's options for a train step, by accelerator: those that make it faster.

Found by compiling for the slices (benchmarks/step/README.md, "XLA's flags"), with what
each gains there. `train` compiles its step with them, and `plan` plans with them.
"""

from typing import Any

import jax
from jax.sharding import Mesh, SingleDeviceSharding

from lm_scale.compile_cache import uncached

# VMEM that one fusion may take, of which libtpu gives it 16 MiB by itself: with more,
# products of large matrices read their factors less often.
MORE_VMEM = {"xla_tpu_scoped_vmem_limit_kib": "98304"}
OPTIONS = {  # by `device_kind`
    "TPU v5 lite": MORE_VMEM,  # v5e
    "TPU v5e": MORE_VMEM,
    "TPU v5": MORE_VMEM,  # v5p
    "TPU v5p": MORE_VMEM,
    "TPU v6 lite": MORE_VMEM,
    "TPU v6e": MORE_VMEM,
}


def xla_options(mesh: Mesh) -> dict[str, str]:
    """The options for these devices; none for most, and none that XLA does not know."""
    device = mesh.devices.flat[0]
    options = OPTIONS.get(device.device_kind, {})
    return {
        name: value for name, value in options.items() if _is_known(name, value, device)
    }


def _is_known(name: str, value: str, device: Any) -> bool:
    """If the device's compiler has the option; another version may have dropped it."""
    number = jax.ShapeDtypeStruct((), "int32", sharding=SingleDeviceSharding(device))
    try:
        with uncached():
            jax.jit(lambda x: x + 1).lower(number).compile({name: value})
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" not in str(error):
            raise
        return False
    return True
