# SPDX-License-Identifier: Apache-2.0
"""What has been compiled once is kept: JSON files, named by a hash of their makers."""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from lm_scale.compile_cache import user_cache

READERS = ("hlo", "loops", "moved", "collectives", "program", "compile_step",
           "kernel_cycles")  # fmt: skip


def key_of(
    lowered: str, mesh: Mesh, options: Mapping[str, str] | None, made_by: str
) -> str:
    """A name for what the compiler, and our reading of it, makes of a program."""
    devices = [(d.id, d.device_kind) for d in mesh.devices.flat]
    here = Path(__file__).parent
    sources = [(here / f"{name}.py").read_text("utf-8") for name in READERS]
    facts = (lowered, dict(mesh.shape), devices, sorted((options or {}).items()),
             made_by, sources)  # fmt: skip
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:32]


def read(path: Path) -> Any:
    """The JSON values of a file; None if there is none, or it is damaged."""
    try:
        return json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def write(path: Path, result: Any) -> None:
    """JSON values into a file, whole or not at all, whoever else writes the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        json.dump(result, file)
    os.replace(file.name, path)


def cache_folder() -> Path:
    """Where plans are kept."""
    return user_cache("plans")
