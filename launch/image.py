# SPDX-License-Identifier: Apache-2.0
"""The image of a run: built from a commit and what was changed since, and pushed."""

import argparse
import json
import shlex
import shutil
import subprocess
import tempfile
from dataclasses import asdict
from pathlib import Path

from launch.errors import Failed
from launch.source import pack, snapshot

EXTRAS = {"tpu": "tpu,gcs,wandb", "gpu": "gpu,gcs,wandb", "cpu": "gcs,wandb"}


def build(options: argparse.Namespace) -> None:
    """Builds the image from a commit and what was changed since, and pushes it."""
    source = snapshot(options.config)
    image = options.image
    if ":" not in image.rpartition("/")[2]:
        image += f":{source.tree[:12]}-{options.device}"
    made = [
        "docker", "build", "--platform", "linux/amd64",
        "--file", "launch/Dockerfile",
        "--build-arg", f"EXTRAS={EXTRAS[options.device]}",
        "--label", f"org.opencontainers.image.revision={source.commit}",
        "--label", f"lm-scale.tree={source.tree}",
        "--tag", image, ".",
    ]  # fmt: skip
    push = ["docker", "push", image]
    changed = "and its uncommitted changes" if source.diff else "without changes"
    print(f"code: commit {source.commit[:12]} {changed} (tree {source.tree[:12]})")
    for name in source.left:
        print(f"  not in it, as git does not know it: {name}")
    with tempfile.TemporaryDirectory() as folder:
        if not options.dry_run:
            archive = Path(folder) / "code.tar.gz"
            pack(source, archive)
            call(["tar", "-xzf", str(archive), "-C", folder])
            archive.unlink()
            facts = json.dumps(asdict(source), indent=1)
            (Path(folder) / "source.json").write_text(facts + "\n")
        for command in (made, push):
            print(f"$ {shlex.join(command)}", flush=True)
            if not options.dry_run:
                call(command, folder)
    print(f"--image {image}")


def call(command: list[str], folder: str | None = None) -> None:
    """Runs it where all can see it; Failed if it fails."""
    if shutil.which(command[0]) is None:
        raise Failed(f"{command[0]} is not installed (or not on PATH).")
    status = subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL).returncode
    if status:
        raise Failed(f"{shlex.join(command[:2])} ended with status {status}.")
