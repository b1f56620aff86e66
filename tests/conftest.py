# SPDX-License-Identifier: Apache-2.0
"""Eight simulated CPU devices for every test, and a compilation cache."""

import os
from importlib.metadata import version
from pathlib import Path

# Before jax is imported: see lm_scale/__main__.py.
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # an installed libtpu would be tried
os.environ.setdefault("NPROC", "16")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for the network
# Most of the time goes into compiling; LLVM need not polish what runs a few steps, and
# jaxlib 0.10's fusions need not take the longer of its two ways (later ones have one).
FLAGS = "--xla_backend_optimization_level=0"
if version("jaxlib").startswith("0.10."):
    FLAGS += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", FLAGS)
CACHE = Path(__file__).parent.parent / ".cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)

from jaxtyping import install_import_hook  # noqa: E402

# Where arrays pass, each call is checked against the annotated types and shapes.
MODULES = ("models", "losses", "generate")
install_import_hook([f"lm_scale.{name}" for name in MODULES], "typecheck.checked")


@pytest.fixture
def failing(monkeypatch):
    """`failing(n)`: the next n saves fail, when all their data are written."""
    from lm_scale import checkpoint, manifest

    write, left = manifest.write, [0]

    def full(*given):
        if left[0]:
            left[0] -= 1
            raise OSError(28, "No space left on device")
        write(*given)

    monkeypatch.setattr(manifest, "write", full)
    monkeypatch.setattr(checkpoint, "LAST_TRIES", (0, 0, 0))
    return lambda times: left.__setitem__(0, times)


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """After each file: Linux lets a process map 65,530 pieces of memory.

    Each program that jax keeps holds a few. At the limit LLVM aborts, without a word.
    """
    yield
    jax.clear_caches()
