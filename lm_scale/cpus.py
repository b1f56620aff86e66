# SPDX-License-Identifier: Apache-2.0
"""How many CPUs this process may use."""

import os


def cpus() -> int:
    """Those that this process may use; macOS does not tell."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
