# SPDX-License-Identifier: Apache-2.0
"""Compiled programs that stay on the disk, for the next run on this machine."""

import contextlib
import hashlib
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

LIMIT = 2 << 30  # bytes; those that were not used for longest go first


def keep_compiled() -> None:
    """Has JAX keep what it compiles in the user's cache folder.

    Leaves it alone where a folder was chosen (JAX_COMPILATION_CACHE_DIR), keeping is
    switched off (JAX_ENABLE_COMPILATION_CACHE=false), or the folder can't be written.
    """
    config: Any = jax.config
    if config.jax_compilation_cache_dir or not config.jax_enable_compilation_cache:
        return
    # What XLA compiles for one kind of CPU may not run on another.
    try:
        folder = user_cache(f"compiled-{cpu_kind()}")
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # no such place, or nobody's home
        return
    if os.access(folder, os.W_OK | os.X_OK):
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_compilation_cache_max_size", LIMIT)


def user_cache(name: str) -> Path:
    """$XDG_CACHE_HOME/lm_scale/name, or under ~/.cache."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "lm_scale" / name


def cpu_kind() -> str:
    """Tells CPUs with other instructions apart, where the system tells them."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    features = (line for line in lines if line.startswith(("flags", "Features")))
    kind = f"{platform.machine()} {platform.processor()} {next(features, '')}"
    return hashlib.sha256(kind.encode()).hexdigest()[:12]


@contextlib.contextmanager
def uncached() -> Iterator[None]:
    """Without jax's own cache: it keeps programs that it cannot read without a chip."""
    config: Any = jax.config
    before = config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # it decides once for all
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()
