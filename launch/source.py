# SPDX-License-Identifier: Apache-2.0
"""The code that a launch sends: exactly a commit, and what was changed since.

A tree is made of the commit, the changes of tracked files and the config, in an index
of its own: neither the checkout nor its index is touched. Its hash names the code.
"""

import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from launch.errors import Refused

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Source:
    """What is sent, by git's names."""

    commit: str
    tree: str  # of the commit and all that was changed since
    diff: str  # from the one to the other; "": nothing was
    left: tuple[str, ...]  # files that git does not know, which are not sent


def snapshot(config: str | None = None, root: Path = ROOT) -> Source:
    """The code of a checkout as it is now, with a config file that may be new in it.

    Raises Refused, with a message for the user, if it cannot be had.
    """
    if not (root / ".git").exists():
        raise Refused(
            f"{root} is not a git checkout: a launch sends a commit and its changes, "
            f"so that each run tells what it ran. Clone the repository, or `git "
            f"init` and commit it."
        )
    with tempfile.TemporaryDirectory() as folder:
        index = Path(folder) / "index"
        real = Path(_git(root, "rev-parse", "--git-path", "index").strip())
        if (root / real).exists():
            shutil.copy(root / real, index)
        commit = _git(root, "rev-parse", "--verify", "HEAD^{commit}").strip()
        _git(root, "add", "--update", ".", index=index)
        if config is not None:
            _git(root, "add", "--force", "--", inside(config, root), index=index)
        tree = _git(root, "write-tree", index=index).strip()
        new = _git(root, "ls-files", "-o", "--exclude-standard", index=index)
    diff = _git(root, "diff", "--binary", commit, tree)
    return Source(commit, tree, diff, tuple(new.splitlines()))


def inside(path: str, root: Path = ROOT) -> str:
    """A file's path from the checkout's root; Refused if it is not a file in it."""
    found = Path(path).resolve()
    if not found.is_file():
        raise Refused(f"config {path!r}: there is no such file.")
    if not found.is_relative_to(root.resolve()):
        raise Refused(
            f"config {path!r} is outside of {root}, which is what is sent. Put it into "
            f"its configs/ folder."
        )
    return found.relative_to(root.resolve()).as_posix()


def pack(source: Source, file: Path, root: Path = ROOT) -> None:
    """Writes the code's archive, .tar.gz; the same code gives the same bytes."""
    _git(root, "archive", "--format=tar.gz", f"--output={file}", source.tree)


def _git(root: Path, *arguments: str, index: Path | None = None) -> str:
    env = {**os.environ, "GIT_INDEX_FILE": str(index)} if index else None
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=root, env=env, text=True, errors="replace",
            stdin=subprocess.DEVNULL, capture_output=True,
        )  # fmt: skip
    except FileNotFoundError as error:
        raise Refused("git is not installed: a launch needs it.") from error
    if done.returncode:
        raise Refused(f"git {arguments[0]} in {root}: {done.stderr.strip()}")
    return done.stdout
