# SPDX-License-Identifier: Apache-2.0
"""A Slurm cluster of one node, on this machine, for the tests: `with Cluster() as c`.

munged, slurmctld and slurmd run as the current user, in the foreground, in a folder of
their own and on free loopback ports. This file, run as a guard, ends all that belongs
to the cluster, jobs included, when the tests end in whatever way.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "sacct")
NODE = "localhost"  # a name that the processes of a run find
WAIT = 20.0  # s for a daemon to answer

CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={ctld_port}
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits until its first credential has expired: 120 s, but for this.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmctldDebug=info
SlurmdDebug=info
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
ReturnToService=2
KillWait=30
SchedulerParameters=sched_min_interval=0,bf_interval=1,sched_interval=1,bf_min_age_reserve=0
# A job of "urgent" preempts one of "main", which is requeued after its grace time.
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
# As if it had so many CPUs and GPUs.
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={slurmd_port} \\
 CPUs=8 RealMemory=4000 Gres=gpu:4 Feature=fast
PartitionName=main Nodes={node} Default=YES PriorityTier=1 GraceTime={grace}
PartitionName=urgent Nodes={node} PriorityTier=2
"""


def missing_programs() -> list[str]:
    return [name for name in PROGRAMS if find(name) is None]


def find(name: str) -> str | None:
    """Debian keeps daemons in /usr/sbin, which is not on every PATH."""
    path = os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin"
    return shutil.which(name, path=path)


class Cluster:
    def __init__(self, *, grace: int = 60):
        self.grace = grace
        self.daemons: dict[str, subprocess.Popen] = {}

    def __enter__(self) -> "Cluster":
        # Not pytest's folder: a socket's path has at most 107 characters.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.conf = self.folder / "slurm.conf"
        self.guard = subprocess.Popen(
            [sys.executable, __file__, str(self.folder)],
            stdin=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self) -> None:
        folder = self.folder
        for name in ("state", "spool"):
            (folder / name).mkdir()
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        host = socket.gethostname().split(".")[0]
        user = subprocess.run(
            ["id", "-un"], capture_output=True, text=True, check=True
        ).stdout.strip()
        self.conf.write_text(
            CONF.format(
                folder=folder, host=host, user=user, node=NODE, grace=self.grace,
                ctld_port=free_port(), slurmd_port=free_port(),
            )
        )  # fmt: skip
        for number in range(4):
            (folder / f"gpu{number}").touch()
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-3]\n")
        self._daemon(
            "munged", "-F", "--force", f"--socket={folder}/munge.socket",
            f"--key-file={key}", f"--pid-file={folder}/munged.pid",
            f"--seed-file={folder}/munged.seed", f"--log-file={folder}/munged.log",
        )  # fmt: skip
        self.until((folder / "munge.socket").exists, "munged's socket")
        self._daemon("slurmctld", "-D", "-i", "-f", str(self.conf))
        self._daemon("slurmd", "-D", "-N", NODE, "-f", str(self.conf))
        self.until(self._idle, "an idle node")

    def _daemon(self, name: str, *arguments: str) -> None:
        self.daemons[name] = subprocess.Popen(
            [str(find(name)), *arguments], env={**os.environ, **self.env},
            stdin=subprocess.DEVNULL, stdout=(self.folder / f"{name}.out").open("wb"),
            stderr=subprocess.STDOUT,
        )  # fmt: skip

    @property
    def env(self) -> dict[str, str]:
        return {"SLURM_CONF": str(self.conf)}

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=60,
            env={**os.environ, **self.env},
        )  # fmt: skip

    def _idle(self) -> bool:
        return "idle" in self.run("sinfo", "-h", "-N", "-o", "%T").stdout

    def preempt(self) -> None:
        """Submits a short job that needs the whole node, and at once."""
        urgent = ("-p", "urgent", "--exclusive", "-o", "/dev/null", "--wrap", "true")
        done = self.run("sbatch", *urgent)
        assert done.returncode == 0, done.stderr

    def cancel_all(self) -> None:
        self.run("scancel", f"--user={os.getuid()}")
        self.until(lambda: not self.run("squeue", "-h").stdout, "an empty queue", 60)

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` says; empty for a job that is not known."""
        shown = self.run("scontrol", "show", "job", "-o", number).stdout
        pairs = (word.partition("=") for word in shown.split())
        return {key: value for key, _, value in pairs}

    def until(
        self, true: Callable[[], object], what: str, seconds: float = WAIT
    ) -> None:
        end = time.monotonic() + seconds
        while not true():
            dead = [x for x, p in self.daemons.items() if p.poll() is not None]
            if dead or time.monotonic() > end:
                cause = f"{dead[0]} has ended" if dead else f"not in {seconds:g} s"
                raise TimeoutError(f"waited for {what}: {cause}\n{self.tails()}")
            time.sleep(0.1)

    def tails(self) -> str:
        paths = [*self.folder.glob("*.out"), *self.folder.glob("*.log")]
        return "\n".join(f"--- {p.name}\n{p.read_text()[-1000:]}" for p in paths)

    def __exit__(self, *_) -> None:
        """Ends the jobs, then the daemons, then what jobs may have left."""
        try:
            if "slurmd" in self.daemons:
                self.run("scancel", "--signal=KILL", "--full", f"--user={os.getuid()}")
                self.cancel_all()
        finally:
            self._end()

    def _end(self) -> None:
        for daemon in reversed(self.daemons.values()):
            daemon.terminate()
        for daemon in self.daemons.values():
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        assert self.guard.stdin is not None
        self.guard.stdin.close()
        self.guard.wait()


def members(folder: Path) -> list[int]:
    """The processes of the cluster in a folder: daemons, slurmstepd, what jobs run."""
    mark = f"SLURM_CONF={folder}/slurm.conf".encode()
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
        except OSError:  # it has ended, or is another user's
            pass
    return found


def guard(folder: Path) -> None:
    """Waits until whoever started it closes its input, as the end of a process does."""
    sys.stdin.read()
    while pids := members(folder):
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        time.sleep(0.05)
    shutil.rmtree(folder, ignore_errors=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    guard(Path(sys.argv[1]))
