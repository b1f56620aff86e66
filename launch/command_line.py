# SPDX-License-Identifier: Apache-2.0
"""What the engines' command lines have in common."""

import argparse
import contextlib
import os
import time

KEYS = ("WANDB_API_KEY", "HF_TOKEN")  # what machines may need and nobody may read


def parser_of(prog: str, doc: str | None) -> argparse.ArgumentParser:
    """A parser whose help is the module's docstring."""
    about, _, details = (doc or "").partition("\n")
    return argparse.ArgumentParser(
        prog=prog, description=about, epilog=details, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip


def cut(argv: list[str]) -> tuple[list[str], list[str]]:
    """The engine's own arguments, and those after `--`, of `lm-scale train`."""
    at = argv.index("--") if "--" in argv else len(argv)
    return argv[:at], argv[at + 1 :]


def keys() -> dict[str, str]:
    """The keys that are in the environment."""
    return {name: os.environ[name] for name in KEYS if os.environ.get(name)}


def say(text: str) -> None:
    """A line with the time."""
    with contextlib.suppress(OSError):  # the terminal may be gone
        print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)
