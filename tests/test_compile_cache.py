# SPDX-License-Identifier: Apache-2.0
"""What is compiled stays on the disk, unless somebody says otherwise."""

import os
import subprocess
import sys

import pytest

from lm_scale.compile_cache import LIMIT, cpu_kind, user_cache

PROGRAM = """
import jax
from lm_scale.compile_cache import keep_compiled

keep_compiled()
jax.jit(lambda x: x * 2.0 + 1.0)(3.0)
config = jax.config
print(config.jax_compilation_cache_dir, config.jax_compilation_cache_max_size)
"""


def run(**env: str) -> str:
    """What the program prints; it compiles something, however short that takes."""
    left_out = ("JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME")
    kept = {name: x for name, x in os.environ.items() if name not in left_out}
    always = {
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=kept | always | env, text=True,
        capture_output=True, check=True,
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    return done.stdout.strip()


def entries(folder) -> list[str]:
    return [path.name for path in folder.rglob("*-cache")]


def test_what_is_compiled_is_kept_under_the_users_cache(tmp_path):
    folder = tmp_path / "lm_scale" / f"compiled-{cpu_kind()}"
    assert run(XDG_CACHE_HOME=str(tmp_path)) == f"{folder} {LIMIT}"
    made = entries(folder)
    assert made
    run(XDG_CACHE_HOME=str(tmp_path))
    assert entries(folder) == made  # found there: nothing was compiled


def test_a_folder_that_was_chosen_stays(tmp_path):
    chosen, other = tmp_path / "chosen", tmp_path / "other"
    env = {"JAX_COMPILATION_CACHE_DIR": str(chosen), "XDG_CACHE_HOME": str(other)}
    assert run(**env).startswith(f"{chosen} ")
    assert entries(chosen) and not other.exists()


def test_it_may_be_switched_off(tmp_path):
    env = {"JAX_ENABLE_COMPILATION_CACHE": "false", "XDG_CACHE_HOME": str(tmp_path)}
    assert run(**env).startswith("None ")
    assert not list(tmp_path.iterdir())


def test_where_nothing_can_be_written_it_does_without(tmp_path):
    (tmp_path / "file").write_text("")
    assert run(XDG_CACHE_HOME=str(tmp_path / "file")).startswith("None ")


def test_without_a_home(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/somewhere")
    assert str(user_cache("x")) == "/somewhere/.cache/lm_scale/x"
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    with pytest.raises(RuntimeError):
        user_cache("x")
