# SPDX-License-Identifier: Apache-2.0
"""The VMs of a launch: made or found, waited for, given their job, deleted."""

import io
import json
import os
import shlex
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

from launch.command_line import keys, say
from launch.errors import Refused
from launch.gcloud import LABEL, OWNER, Cloud, labels_of, run_of
from launch.record import Launch, Record

WORKER = Path(__file__).with_name("worker.py")
DEADLINE = Path(__file__).with_name("deadline.sh")
COMING = ("CREATING", "STARTING", "RESTARTING", "REIMAGING", "REPAIRING")
QUEUING = ("CREATING", "ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")


class NoVM(Exception):
    """None was to be had; another time, perhaps."""


class Unreachable(Exception):
    """Workers do not answer, or what they need could not be brought to them."""


def bring_up(cloud: Cloud, launch: Launch, record: Record) -> None:
    """Makes the launch's VM, or finds it, and waits until it is ready.

    One that is dead, or a queued request that has failed, is deleted first: both hold
    the name and the quota. Raises CloudError, NoVM; Refused if the name is another's.
    """
    queued = cloud.queued(launch.name) if launch.queued else None
    node = cloud.node(launch.name)
    for found in (queued, node):
        check_ours(found, launch, queued)
    state, queue = state_of(node), state_of(queued)
    dead = node is not None and state not in ("READY", *COMING)
    if dead or (queued is not None and queue not in QUEUING):
        say(f"{launch.name} is {state or queue}: deleting it")
        cloud.delete(launch.name, queued=launch.queued)
        node = queued = None
    if node is None and queued is None:
        say(f"creating {launch.name}: {describe(launch)}")
        launch.log_read = 0
        labels = {LABEL: launch.name, OWNER: launch.owner,
                  "lm-scale-expires": str(launch.deadline)}  # fmt: skip
        startup = record.folder / "startup.sh"
        if not cloud.dry_run:
            startup.write_text(startup_script(launch))
        cloud.create(
            launch.name, launch.made(), labels=labels, spot=launch.spot,
            queued=launch.queued, options=launch.options, runtime=launch.runtime,
            startup=startup, wait=launch.wait_hours * 3600,
        )  # fmt: skip
    if not cloud.dry_run:
        wait(cloud, launch)


def startup_script(launch: Launch) -> str:
    """Sets the VM's timer when it boots, though there may be no launcher any more.

    The job's first stage sets it again; on a later boot it is not set back.
    """
    begin = (
        "export HOME=${HOME:-/root}\n"
        "if [ $# = 0 ]; then\n"  # else it is the copy that watches over the time
        "  [ ! -e /etc/systemd/system/lm-scale-deadline.service ] || exit 0\n"
        f"  set -- {shlex.join(timer(launch)[2:])}\n"
        "fi\n"
    )
    first, _, rest = DEADLINE.read_text().partition("\n")
    return f"{first}\n{begin}{rest}"


def timer(launch: Launch) -> list[str]:
    """The command that sets the VM's timer, in the code's folder."""
    return ["bash", "launch/deadline.sh", "set", str(launch.deadline),
            "--name", launch.name, "--zone", launch.zone,
            *(["--project", launch.project] if launch.project else []),
            *(["--queued"] if launch.queued else []),
            "--save-seconds", str(int(0.8 * launch.saving))]  # fmt: skip


def wait(cloud: Cloud, launch: Launch) -> None:
    """Until the VM is ready, telling what it waits for whenever that changes."""
    start, told = time.monotonic(), None
    while True:
        node = cloud.node(launch.name)
        if (state := state_of(node)) == "READY":
            return
        if node is None and launch.queued:
            queued = cloud.queued(launch.name)
            state = f"queued, {state_of(queued) or 'gone'}"
            if state_of(queued) not in QUEUING:
                raise NoVM(f"the request was {state}: {reason(queued)}")
        elif state not in COMING:
            raise NoVM(f"the VM is {state or 'gone'}, before it was ready")
        if state != told:
            told = state
            say(f"{launch.name}: {state}, after {time.monotonic() - start:.0f} s")
        if time.monotonic() - start > launch.wait_hours * 3600:
            raise NoVM(f"{state} still, after {launch.wait_hours:g} hours")
        time.sleep(launch.poll)


def check_ours(
    found: dict[str, Any] | None, launch: Launch, queued: dict[str, Any] | None
) -> None:
    """Refused if what has the launch's name is not this launch's."""
    if found is None:
        return
    specs = found.get("tpu", {}).get("nodeSpec", [])
    node = specs[0].get("node", {}) if specs else found
    if run_of(found, [queued]) != launch.name:
        raise Refused(
            f"{launch.name} in {launch.zone} exists and no launch of ours has made it. "
            f"Choose another --name."
        )
    if labels_of(found).get(OWNER, launch.owner) != launch.owner:
        raise Refused(
            f"{launch.name} in {launch.zone} is of a launch from elsewhere. Choose "
            f"another --name."
        )
    made = node.get("acceleratorType", launch.made().name)
    if made != launch.made().name:
        raise Refused(
            f"{launch.name} in {launch.zone} exists as {made}, not {launch.slice}. "
            f"Choose another --name, or delete it: `launch/tpu.py down {launch.name}`."
        )


def state_of(found: dict[str, Any] | None) -> str | None:
    state = (found or {}).get("state")
    return state.get("state") if isinstance(state, dict) else state


def reason(queued: dict[str, Any] | None) -> str:
    """Why a queued request has failed, as far as the service says."""
    state = (queued or {}).get("state", {})
    data = state.get("failedData", {}).get("error", {})
    return data.get("message") or "the service gives no reason"


def describe(launch: Launch) -> str:
    made = launch.made()
    vms = f"{made.hosts} VM" + ("s" if made.hosts > 1 else "")
    how = " spot" if launch.spot else ""
    return f"a{how} {made.name} ({vms}, {made.devices} devices) in {launch.zone}"


# --- The job --------------------------------------------------------------------------


def start_job(cloud: Cloud, launch: Launch, record: Record) -> None:
    """Brings code and secrets to all workers and starts the job there, once.

    Done again, also by another launcher, it finds the job started. Raises Unreachable.
    """
    remote = f"lm_scale-{launch.name}.tar"
    with tempfile.TemporaryDirectory(dir=in_memory()) as folder:
        file = Path(folder) / "send.tar"
        if not cloud.dry_run:
            write_bundle(file, launch, record)
        done = cloud.copy_to(launch.name, file, remote, seconds=900)
    if done.status != 0:
        raise Unreachable(f"copying the code failed:\n{done.err.strip()[-2000:]}")
    folder = f"lm_scale/{launch.name}"
    command = (
        f"umask 077; mkdir -p {folder} && if [ -f {remote} ]; then tar -xf {remote} -C "
        f"{folder} && rm -f {remote}; fi && python3 {folder}/worker.py start"
    )
    done = cloud.ssh(launch.name, command, seconds=300)
    if done.status == 0 and launch.rearm:
        command = f"python3 {folder}/worker.py deadline"
        done = cloud.ssh(launch.name, command, seconds=300)
        launch.rearm = done.status != 0
    if done.status != 0:
        said = (done.out + done.err).strip()[-2000:]
        raise Unreachable(f"starting the job failed:\n{said}")


def write_bundle(file: Path, launch: Launch, record: Record) -> None:
    """All that a worker needs, in an archive that only its owner can read."""
    job = json.dumps(job_of(launch), indent=1).encode()
    os.close(os.open(file, os.O_CREAT | os.O_WRONLY, 0o600))
    with tarfile.open(file, "w") as archive:
        archive.add(WORKER, "worker.py")
        archive.add(record.code, "code.tar.gz")
        archive.add(record.changes, "changes.diff")
        for name, content in (
            ("job.json", job),
            ("secrets.env", json.dumps(keys()).encode()),
        ):
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), 0o600
            archive.addfile(entry, io.BytesIO(content))


def in_memory() -> str | None:
    """A folder that is on no disk, if there is one."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def job_of(launch: Launch) -> dict[str, Any]:
    """The stages of the job, in which {NAMES} stand for the worker's variables."""
    made = launch.made()
    lm_scale = ["{LM_SCALE_PYTHON}", "-m", "lm_scale"]
    stages: list[tuple[str, list[str]]] = [
        ("deadline", [*timer(launch), "--pid-file", "{FOLDER}/pid"]),
        ("setup", ["bash", "launch/setup_host.sh", "tpu", "gcs"]),
        ("health", ["{LM_SCALE_PYTHON}", "launch/health.py",
                    "--expect-devices", str(made.devices_per_host),
                    "--expect-kind", made.generation.kind,
                    "--time", str(int(time.time()))]),
    ]  # fmt: skip
    if launch.config is not None:
        # From the code's folder: the same words on all workers.
        flags = ["--run-dir", f"../runs/{launch.run}", *launch.arguments]
        if launch.bucket is not None:
            flags += ["--checkpoint-dir", f"{launch.bucket}/{launch.run}"]
        if made.hosts > 1:
            # The VMs share no folder: each makes the same tokens for itself, alone.
            alone = ["--coordinator=localhost:1", "--process_id=0", "--num_processes=1"]
            stages.append(
                ("prepare", ["env", "JAX_PLATFORMS=cpu", *lm_scale, "prepare",
                             launch.config, *flags, *alone])
            )  # fmt: skip
            # One may take longer over it than another.
            flags = [*flags, "--start_timeout=7200"]
        stages.append(("train", [*lm_scale, "train", launch.config, *flags]))
    return {
        "id": f"{int(launch.began)}-{launch.job}",
        "run": launch.run,
        "commit": launch.commit,
        "tree": launch.tree,
        "stages": stages,
    }
