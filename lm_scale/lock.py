# SPDX-License-Identifier: Apache-2.0
"""The lock of a run: no two trainers write into one folder.

A file that names its owner and that the owner writes anew every few seconds. Where the
owner can be asked for (a process of this machine) a dead one's lock is taken over at
once; elsewhere, when it has not changed for a while. No clocks are compared.
"""

import json
import os
import platform
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

from etils import epath

from lm_scale.errors import InputError, one_line
from lm_scale.manifest import is_local

NAME = "lock.json"
BEAT = 5.0  # s between two writes of the owner
PATIENCE = 30.0  # s without one, after which an owner elsewhere is taken for dead


class RunLock:
    """Holds the lock of a folder, from `take` to `release`.

    `lost` is called, from a thread, if another process has taken the lock meanwhile: it
    thought this one dead, as it was suspended, or the storage out of reach, for long.
    """

    def __init__(self, folder: epath.Path, lost: Callable[[str], None]):
        self.path = folder / NAME
        self.lost = lost
        since = datetime.now(UTC).isoformat(timespec="seconds")
        self.owner = {**whoami(), "id": uuid4().hex, "since": since}
        self._beats = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lock", daemon=True)

    def check(self) -> None:
        """InputError naming the owner if a living one has it; takes nothing."""
        self._wait_for_owner()

    def take(self) -> None:
        """InputError naming the owner if somebody else has it."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._wait_for_owner()
            self._create()
            if (other := self._other()) is not None:
                raise InputError(self._refusal(other))
        except OSError as error:
            raise InputError(
                f"Cannot write to {self.path.parent}: {one_line(error, 200)}"
            ) from error
        self._thread.start()

    def release(self) -> None:
        """Gives the lock back, if it is still this one's; no error if it cannot."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(BEAT)
        try:
            if self._read().get("id") == self.owner["id"]:
                self.path.unlink()
        except OSError:
            pass

    def _wait_for_owner(self) -> None:
        """Until there is none, or he is known to be dead; InputError if he lives."""
        first = self._other()
        if first is None or is_dead(first):
            return
        here = whoami()
        if all(first.get(name) == here[name] for name in ("host", "space")):
            raise InputError(self._refusal(first))  # alive, on this machine
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            other = self._other()
            if other is None:
                return
            if other != first:
                raise InputError(self._refusal(other))
            time.sleep(1)

    def _refusal(self, owner: dict[str, Any]) -> str:
        return (
            f"{self.path.parent} is in use by process {owner.get('pid')} on "
            f"{owner.get('host')}, since {owner.get('since')}. Two runs cannot share a "
            f"folder: end that one, or give another `run_dir`."
        )

    def _keep(self) -> None:
        while not self._stop.wait(BEAT):
            try:
                if (other := self._other()) is not None:
                    self.lost(
                        f"{self.path.parent} was taken over by process "
                        f"{other.get('pid')} on {other.get('host')}."
                    )
                    return
                self._write()
            except Exception:  # each kind of storage has errors of its own
                pass  # out of reach for a moment: the saves will tell

    def _other(self) -> dict[str, Any] | None:
        """What the lock says, if it is another's."""
        found = self._read()
        return found if found and found.get("id") != self.owner["id"] else None

    def _read(self) -> dict[str, Any]:
        try:
            found = json.loads(self.path.read_text())
        except (FileNotFoundError, ValueError):  # torn: its writer died
            return {}
        return found if isinstance(found, dict) else {}

    def _create(self) -> None:
        """Makes the lock, in place of a dead owner's.

        Of two who try at the same moment one is refused by `take`, or else loses it to
        the other at his next beat.
        """
        if not is_local(self.path):
            self._write()
            time.sleep(1)  # no exclusive creation there: `take` sees who was last
            return
        new = self._written()
        self.path.unlink(missing_ok=True)
        try:
            os.link(new, self.path)
            new.unlink()
        except FileExistsError:
            new.unlink()  # somebody was faster: `take` sees him
        except OSError:  # a file system without links
            new.replace(self.path)

    def _write(self) -> None:
        if is_local(self.path):
            self._written().replace(self.path)
        else:
            self.path.write_text(self._text())

    def _written(self) -> epath.Path:
        new = self.path.with_name(f"{NAME}.{self.owner['id']}")
        new.write_text(self._text())
        return new

    def _text(self) -> str:
        self._beats += 1
        return json.dumps({**self.owner, "beats": self._beats})


def whoami() -> dict[str, Any]:
    """What tells this process from all others."""
    return {
        "host": platform.node(),
        # Containers number their own processes, and machines can have the same name.
        "space": [_read("/proc/sys/kernel/random/boot_id"), _namespace()],
        "pid": os.getpid(),
        "start": _start_of(os.getpid()),
    }


def is_dead(owner: dict[str, Any]) -> bool:
    """If an owner was a process of this machine that is no more."""
    here = whoami()
    if any(owner.get(name) != here[name] for name in ("host", "space")):
        return False
    pid = owner.get("pid")
    if not isinstance(pid, int):
        return True
    if here["start"] is not None:
        return _start_of(pid) != owner.get("start")
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


def _start_of(pid: int) -> str | None:
    """When a process began, in ticks since the machine did; None: it is no more.

    A number is soon given to another process. None for all where there is no /proc.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] == "Z" else fields[19]


def _namespace() -> str | None:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None
