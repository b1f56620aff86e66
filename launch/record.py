# SPDX-License-Identifier: Apache-2.0
"""What is known of a launch, in a file: a launcher that is killed is gone on with.

Each launch has a folder, ~/.lm_scale/launches/NAME unless LM_SCALE_LAUNCHES names
another place, with state.json, the code that was sent and the log of worker 0. Nothing
secret is in it.
"""

import fcntl
import json
import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from launch.errors import Refused
from launch.slices import Slice, find


@dataclass
class Launch:
    """A launch: what was asked for, and how far it got."""

    name: str
    slice: str
    zone: str
    project: str | None = None
    spot: bool = False
    queued: bool = False
    runtime: str | None = None  # image; None: the slice's own
    options: list[str] = field(default_factory=list)  # further ones of gcloud's create
    config: str | None = None  # from the code's root; None: VMs only
    arguments: list[str] = field(default_factory=list)  # of `lm-scale train`
    bucket: str | None = None  # of the checkpoints; None: they are on the VM
    max_hours: float = 24.0
    price: float | None = None  # of the slice, an hour
    attempts: int = 10  # in a row that bring the run no further
    wait_hours: float = 4.0  # for the VM
    keep: bool = False  # the VM, at the end
    poll: float = 15.0  # s between two looks
    commit: str = ""
    tree: str = ""  # of the code that was sent
    owner: str = field(default_factory=lambda: secrets.token_hex(4))
    began: float = field(default_factory=time.time)
    job: int = 0  # number of the attempt that was started last
    tried: int = 0  # attempts since the run last got further
    step: int = -1  # of the newest checkpoint that was heard of
    log_read: int = 0  # bytes of worker 0's log, of this job
    rearm: bool = False  # the VM's timer is another since the job was started
    phase: str = "new"
    ending: int | None = None  # the status that it is about to end with
    status: int | None = None  # of the run; None: it has not ended

    @property
    def deadline(self) -> int:
        """When the VM deletes itself, in seconds since 1970."""
        return int(self.began + 3600 * self.max_hours)

    @property
    def saving(self) -> float:
        """Seconds before the deadline in which nothing starts any more."""
        return min(150.0, 360 * self.max_hours)

    @property
    def run(self) -> str:
        """Of the run's folders: one VM may have runs of several configs."""
        stem = slug(self.config or self.name)
        return self.name if stem == self.name else f"{self.name}-{stem}"

    def made(self) -> Slice:
        return find(self.slice)


class Record:
    """The folder of a launch."""

    def __init__(self, name: str):
        self.folder = home() / check_name(name)

    @property
    def code(self) -> Path:
        return self.folder / "code.tar.gz"

    @property
    def changes(self) -> Path:
        """What the code has that its commit has not."""
        return self.folder / "changes.diff"

    @property
    def down(self) -> Path:
        """There, if `down` has ended the launch, for a launcher that is at work."""
        return self.folder / "down"

    def exists(self) -> bool:
        return (self.folder / "state.json").exists()

    def load(self) -> Launch:
        """Raises Refused, with a message, if there is no such launch."""
        try:
            found = json.loads((self.folder / "state.json").read_text())
        except FileNotFoundError:
            known = ", ".join(names()) or "none"
            raise Refused(
                f"{self.folder.name!r}: there is no launch of this name; known here: "
                f"{known}."
            ) from None
        except ValueError as error:
            raise Refused(
                f"{self.folder}/state.json cannot be read ({error}). Look what exists "
                f"(`launch/tpu.py list --zone ...`), then delete the folder."
            ) from None
        known = {one.name for one in fields(Launch)}
        return Launch(**{key: value for key, value in found.items() if key in known})

    def save(self, launch: Launch) -> None:
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        part = self.folder / "state.json.part"
        part.write_text(json.dumps(asdict(launch), indent=1) + "\n")
        os.replace(part, self.folder / "state.json")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Of two launchers of one name, the second is told; Refused."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with open(self.folder / "lock", "a+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                raise Refused(
                    f"{self.folder.name!r} is being launched by process "
                    f"{lock.read().strip()} already. Its log: "
                    f"{self.folder}/worker-0.log"
                ) from None
            lock.truncate(0)
            lock.write(str(os.getpid()))
            lock.flush()
            yield


def home() -> Path:
    """Where launches are recorded."""
    default = Path.home() / ".lm_scale" / "launches"
    return Path(os.environ.get("LM_SCALE_LAUNCHES") or default)


def names() -> list[str]:
    """Of the launches that are recorded here."""
    return sorted(path.parent.name for path in home().glob("*/state.json"))


def slug(config: str) -> str:
    """A name of a config's file, such as a VM can have."""
    return re.sub("[^a-z0-9]+", "-", Path(config).stem.lower()).strip("-")[:40]


def check_name(name: str) -> str:
    """A name that Google Cloud takes for a VM and a label; Refused if it is none."""
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", name):
        raise Refused(
            f"name {name!r}: expected up to 40 small letters, digits and hyphens, a "
            f"letter first, no hyphen last."
        )
    return name
