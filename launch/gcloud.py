# SPDX-License-Identifier: Apache-2.0
"""The gcloud commands of a TPU's life, and what their errors mean.

gcloud ends with status 1 for nearly everything: what went wrong is told by the status
words that the service answers with.
"""

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.slices import Slice

LABEL = "lm-scale-run"  # of all that a launch makes; its value is the launch's name
OWNER = "lm-scale-owner"  # of two launches of one name, which of them
# In the order in which they are looked for: pattern, kind, what to do.
ERRORS = (
    (r'"code": (10|13|14)\b|[Ii]nternal error|Max retries|TransportError|SSLError|'
     r"RemoteDisconnected|gcloud crashed|[Nn]ame resolution", "unavailable",
     "the service or the network is in trouble: wait"),
    (r"active account|auth login|[Rr]eauthentication|invalid_grant|UNAUTHENTICATED",
     "login", "log in: gcloud auth login"),
    (r'"code": 8\b|no more capacity|[Ss]tockout|STOCKOUT|ZONE_RESOURCE_POOL',
     "capacity", "the zone has none left: try later, another zone, --spot or --queued"),
    (r"[Qq]uota", "quota",
     "the project's quota is used up or 0: look with `lm-scale launch tpu list`, "
     "ask for more in the console (IAM & Admin, Quotas, TPU), or try --spot"),
    (r"ALREADY_EXISTS|already exists", "exists", "another name: --name"),
    (r"NOT_FOUND|was not found|not found", "missing", "look with `launch tpu list`"),
    (r"SERVICE_DISABLED|has not been used in project|is disabled", "denied",
     "enable the API: gcloud services enable tpu.googleapis.com"),
    (r'PERMISSION_DENIED|"code": 7\b|\b403\b|[Ff]orbidden', "denied",
     "the account lacks a permission (roles/tpu.admin, "
     "roles/iam.serviceAccountUser), or the project's name is wrong"),
    (r"RESOURCE_EXHAUSTED|\b429\b|[Rr]ate ?[Ll]imit", "busy",
     "too many requests: wait"),
    (r"UNAVAILABLE|ABORTED|\b50[0234]\b|INTERNAL|ConnectionError|Connection refused|"
     r"timed out|DEADLINE_EXCEEDED", "unavailable",
     "the service or the network is in trouble: wait"),
    (r"INVALID_ARGUMENT|FAILED_PRECONDITION|Failed to find attribute|unrecognized|"
     r"valid project|Invalid", "invalid", "change it"),
)  # fmt: skip
# May be otherwise later. gcloud repeats a request that got no answer: what exists, when
# it is to be made, may be our own.
PASSING = ("capacity", "quota", "busy", "unavailable", "exists")
# A host that is gone is noticed in seconds, not when TCP gives up.
SSH = ("ConnectTimeout=15", "ServerAliveInterval=15", "ServerAliveCountMax=4")


class CloudError(Exception):
    """A gcloud command failed."""

    def __init__(self, command: Sequence[str], said: str):
        self.said = last_words(said)
        self.kind, self.remedy = classify(said)
        super().__init__(
            f"{' '.join(command[:6])} failed: {self.said}\n({self.kind}: {self.remedy})"
        )


def classify(said: str) -> tuple[str, str]:
    """The kind of an error, and what to do."""
    for pattern, kind, remedy in ERRORS:
        if re.search(pattern, said):
            return kind, remedy
    return "other", "see what gcloud said"


def last_words(said: str) -> str:
    """What of gcloud's output tells the reason."""
    lines = [line for line in said.splitlines() if line.strip()]
    errors = [i for i, line in enumerate(lines) if line.startswith("ERROR")]
    return "\n".join(lines[errors[-1] :] if errors else lines[-5:])[:2000]


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    status: int | None  # None: it was stopped, as it took too long
    out: str
    err: str


@dataclass(frozen=True)
class Cloud:
    """gcloud, for the TPUs of one zone."""

    zone: str
    project: str | None = None  # None: gcloud's own
    dry_run: bool = False  # print what would be run, and run nothing

    # --- Nodes and queued resources ---------------------------------------------------

    def create(
        self, name: str, made: Slice, *, labels: dict[str, str], spot: bool,
        queued: bool, options: Sequence[str] = (), runtime: str | None = None,
        startup: Path, wait: float,
    ) -> None:  # fmt: skip
        """Makes a TPU VM, or a queued request for one, which may take `wait` seconds.

        Returns when the VM is there, or the request is taken. options: further flags
        of gcloud's command. runtime: another image than the generation's own. startup:
        a script that each VM runs when it boots.
        """
        common = [
            f"--accelerator-type={made.name}",
            "--labels=" + ",".join(f"{k}={v}" for k, v in sorted(labels.items())),
            # With it the VM may delete itself, and reach the bucket, by its account.
            "--scopes=https://www.googleapis.com/auth/cloud-platform",
            f"--metadata-from-file=startup-script={startup}",
            *(["--spot"] if spot else []),
            *options,
        ]
        image = runtime or made.generation.runtime
        if queued:
            self._run("queued-resources", "create", name, f"--node-id={name}",
                      f"--runtime-version={image}", *common,
                      f"--valid-until-duration={int(wait)}s")  # fmt: skip
        else:
            self._run("tpu-vm", "create", name, f"--version={image}", *common,
                      seconds=wait)  # fmt: skip

    def node(self, name: str) -> dict[str, Any] | None:
        """The VM, as the service describes it; None: there is none."""
        return self._describe("tpu-vm", name)

    def queued(self, name: str) -> dict[str, Any] | None:
        """The queued resource, as the service describes it; None: there is none."""
        return self._describe("queued-resources", name)

    def _describe(self, what: str, name: str) -> dict[str, Any] | None:
        try:
            said = self._run(what, "describe", name, "--format=json")
            return None if self.dry_run else json.loads(said)
        except CloudError as error:
            if error.kind != "missing":
                raise
            return None

    def all(self) -> list[tuple[str, dict[str, Any]]]:
        """("VM" or "queue", description) of all in the zone that launches have made."""
        queues, nodes = (
            json.loads(self._run(what, "list", "--format=json") or "[]")
            for what in ("queued-resources", "tpu-vm")
        )
        return [("queue", one) for one in queues if run_of(one) is not None] + [
            ("VM", one) for one in nodes if run_of(one, queues) is not None
        ]

    def delete(self, name: str, *, queued: bool) -> None:
        """Deletes the VM, or the queued resource with its VM, and waits. Fine if gone.

        A queued resource that has no VM yet is cancelled so.
        """
        kinds = [("tpu-vm", ()), ("queued-resources", ("--force",))]
        for what, force in reversed(kinds) if queued else kinds[:1]:
            try:
                self._run(what, "delete", name, "--quiet", *force, seconds=900)
            except CloudError as error:
                if error.kind != "missing":
                    raise

    # --- Workers ----------------------------------------------------------------------

    def ssh(
        self, name: str, command: str, *, worker: int | str = "all", seconds: float
    ) -> Done:
        """Runs a command on workers of a VM; nothing secret may be in it.

        gcloud tries up to ten times where ssh ends with 255: the command must bear it.
        """
        return self._call(
            self._argv("tpu-vm", "ssh", name, f"--worker={worker}", *flags("ssh"),
                       f"--command={command}"),
            seconds,
        )  # fmt: skip

    def copy_to(self, name: str, file: Path, to: str, *, seconds: float) -> Done:
        """Copies a file to all workers of a VM, with its mode."""
        return self._call(
            self._argv("tpu-vm", "scp", str(file), f"{name}:{to}", "--worker=all",
                       *flags("scp")),
            seconds,
        )  # fmt: skip

    def copy_from(self, name: str, path: str, file: Path, *, seconds: float) -> Done:
        """Copies a file from worker 0."""
        return self._call(
            self._argv("tpu-vm", "scp", f"{name}:{path}", str(file), "--worker=0",
                       *flags("scp")),
            seconds,
        )  # fmt: skip

    def shell(self, name: str, worker: str, rest: Sequence[str]) -> int:
        """Gives the terminal to ssh; its exit status."""
        argv = self._argv("tpu-vm", "ssh", name, f"--worker={worker}")
        if rest:
            argv.append(f"--command={shlex.join(rest)}")
        if self.dry_run:
            print(shlex.join(argv))
            return 0
        return subprocess.run(argv).returncode

    # --- Processes --------------------------------------------------------------------

    def _argv(self, what: str, verb: str, *arguments: str) -> list[str]:
        project = [f"--project={self.project}"] if self.project else []
        place = [f"--zone={self.zone}", *project]
        return ["gcloud", "compute", "tpus", what, verb, *arguments, *place]

    def _run(self, what: str, verb: str, *arguments: str, seconds: float = 300) -> str:
        argv = self._argv(what, verb, *arguments)
        done = self._call(argv, seconds)
        if done.status != 0:
            raise CloudError(argv, done.err or done.out or "timed out")
        return done.out

    def _call(self, argv: list[str], seconds: float) -> Done:
        if self.dry_run:
            print(shlex.join(argv))
            return Done(0, "", "")
        return call(argv, seconds)


def flags(program: str) -> list[str]:
    """Of ssh and scp: no question is asked, and a dead host is noticed."""
    return ["--strict-host-key-checking=no", "--quiet",
            *(f"--{program}-flag=-o{option}" for option in SSH)]  # fmt: skip


def call(argv: Sequence[str], seconds: float) -> Done:
    """Runs a command to its end, or for so long, with no input and no terminal.

    In a session of its own: Ctrl-C is for us, who decide what is still to be done.
    """
    try:
        process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
    except FileNotFoundError:
        raise SystemExit(
            f"{Path(sys.argv[0]).name}: {argv[0]} is not installed: get the Google "
            f"Cloud CLI (cloud.google.com/sdk), then `gcloud init`."
        ) from None
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        kill(process)
        out, err = process.communicate()
        return Done(None, out, f"{err}\ntimed out after {seconds:.0f} s")
    except BaseException:
        kill(process)
        process.wait()
        raise
    return Done(process.returncode, out, err)


def kill(process: subprocess.Popen) -> None:
    """With its children, such as ssh, which hold its output open."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def run_of(
    described: dict[str, Any], queues: Sequence[dict[str, Any] | None] = ()
) -> str | None:
    """The name of the run that a VM or queued resource is of, by its label.

    queues: queued resources that are known; a VM that one of them made is of its run.
    """
    made_by = described.get("queuedResource", "-").split("/")[-1]
    for queue in filter(None, queues):
        if queue.get("name", "").split("/")[-1] == made_by:
            return run_of(queue)
    return labels_of(described).get(LABEL)


def labels_of(described: dict[str, Any]) -> dict[str, str]:
    """A VM's labels; of a queued resource, those of its VM to come."""
    specs = described.get("tpu", {}).get("nodeSpec", [])
    node = specs[0].get("node", {}) if specs else described
    return node.get("labels", {})
