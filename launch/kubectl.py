# SPDX-License-Identifier: Apache-2.0
"""What a cluster is asked, and told, through kubectl."""

import argparse
import json
import shlex
import shutil
import subprocess
from typing import Any

from launch.errors import Failed, Refused
from launch.jobset import CONTAINER


def kubectl_command(options: argparse.Namespace, *arguments: str) -> list[str]:
    where = []
    for flag in ("context", "namespace"):
        if getattr(options, flag):
            where += [f"--{flag}", getattr(options, flag)]
    return ["kubectl", *where, *arguments]


def kubectl(
    options: argparse.Namespace, *arguments: str, stdin: str | None = None
) -> str:
    """What it prints; Failed, with what it says, if it fails."""
    command = kubectl_command(options, *arguments)
    if shutil.which("kubectl") is None:
        raise Failed(
            "kubectl is not installed (or not on PATH). Install it, then: gcloud "
            "container clusters get-credentials CLUSTER --location PLACE"
        )
    done = subprocess.run(
        command, text=True, errors="replace", input=stdin or "", capture_output=True
    )
    if done.returncode == 0:
        return done.stdout
    said = done.stderr.strip() or f"it ended with status {done.returncode}"
    if "no matches for kind" in said or "doesn't have a resource type" in said:
        said += (
            "\nThe cluster has no JobSet. Install its controller: "
            "https://jobset.sigs.k8s.io/docs/installation/"
        )
    raise Failed(f"{shlex.join(command)}: {said}")


# --- What is there --------------------------------------------------------------------


def find(options: argparse.Namespace, name: str) -> dict[str, Any] | None:
    text = kubectl(
        options, "get", "jobsets", name, "--ignore-not-found", "--output", "json"
    )
    return json.loads(text) if text.strip() else None


def existing(options: argparse.Namespace, name: str) -> dict[str, Any]:
    item = find(options, name)
    if item is None:
        raise Refused(f"there is no run {name!r} here; see launch/gke.py list.")
    return item


def get(options: argparse.Namespace, *arguments: str) -> dict[str, Any]:
    return json.loads(kubectl(options, "get", *arguments, "--output", "json"))


def pods(options: argparse.Namespace, name: str) -> list[dict[str, Any]]:
    """Its pods, of each process the newest last."""
    found = get(options, "pods", "--selector", f"jobset.sigs.k8s.io/jobset-name={name}")

    def order(pod: dict[str, Any]) -> tuple[int, str]:
        return place(pod), pod["metadata"].get("creationTimestamp", "")

    return sorted(found["items"], key=order)


def place(pod: dict[str, Any]) -> int:
    notes = pod["metadata"].get("annotations", {})
    return int(notes.get("batch.kubernetes.io/job-completion-index", 0))


def how(pod: dict[str, Any]) -> str:
    """Running on NODE; Pending: why; Failed: exit status."""
    found = pod.get("status", {})
    words = [found.get("phase", "Unknown")]
    for condition in found.get("conditions", []):
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            words.append(condition.get("message", ""))
    for one in found.get("containerStatuses", []):
        if one["name"] == CONTAINER:
            for kind, facts in one.get("state", {}).items():
                code = facts.get("exitCode")
                words.append(f"exit status {code}" if code is not None else "")
                words.append(facts.get("reason", "") if kind != "running" else "")
    words.append(pod.get("spec", {}).get("nodeName", ""))
    return ", ".join(word for word in words if word)


def state(item: dict[str, Any]) -> str:
    """Completed, Failed, Suspended, or what JobSets have no word for: Active."""
    true = {
        condition["type"]
        for condition in item.get("status", {}).get("conditions", [])
        if condition["status"] == "True"
    }
    known = [kind for kind in ("Completed", "Failed", "Suspended") if kind in true]
    return known[0] if known else "Active"


def restarts(item: dict[str, Any]) -> int:
    return item.get("status", {}).get("restarts", 0)
