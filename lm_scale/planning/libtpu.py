# SPDX-License-Identifier: Apache-2.0
"""libtpu, the compiler for TPUs: is it there, its devices, and how it is kept quiet."""

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from typing import Any

from jax.experimental import topologies

from lm_scale.errors import InputError
from lm_scale.planning.accelerators import Slice


def check_compiler() -> None:
    """InputError if there is no compiler for TPUs."""
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(
            "There is no libtpu, the compiler for TPUs, which `lm-scale plan` needs "
            "(it runs on Linux, x86-64, and needs no TPU). pip install lm_scale[plan], "
            "which brings jax[tpu]."
        )


def topology_devices(chosen: Slice) -> list[Any]:
    """The devices of a slice, as the compiler knows them; they compute nothing."""
    check_compiler()
    # The lock is for processes that drive chips; this one only compiles.
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    single: dict[str, Any] = {"chips_per_host_bounds": (1, 1, 1)}
    with quiet():
        described = topologies.get_topology_desc(
            platform="tpu", topology_name=chosen.topology,
            **(single if chosen.chips == 1 else {}),
        )  # fmt: skip
    return list(described.devices)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """libtpu's messages, from native code, go nowhere; what it raises still comes."""
    saved = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
