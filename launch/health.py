#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Checks whether this machine can train: one line for each check, then one of JSON.

    launch/health.py --expect-devices 8 --expect-kind "TPU v3"
    launch/health.py --expect-devices 4 --expect-kind cpu       without a TPU

Run it with the Python that is to train, on each worker. It asks only the devices of its
own machine. Ends with 0, or with 1 if a check fails; its line then says what to do. The
only thing that it changes: a lock that a dead process of this user left is removed.
"""

import argparse
import contextlib
import fcntl
import importlib.metadata
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from email.utils import parsedate_to_datetime
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from launch.command_line import parser_of  # noqa: E402
from launch.slices import GENERATIONS, Generation  # noqa: E402

DEV, PROC, PCI = Path("/dev"), Path("/proc"), Path("/sys/bus/pci/devices")
LOCK = Path("/tmp/libtpu_lockfile")
GOOGLE = "0x1ae0"  # PCI vendor
CHIPS = {  # PCI device -> generation, as in jax's hardware_utils.py
    "0x0027": ("v2", "v3"), "0x005e": ("v4",), "0x0062": ("v5p",),
    "0x0063": ("v5e",), "0x006f": ("v6e",),
}  # fmt: skip
BOUNDS = {1: "1,1,1", 4: "2,2,1", 8: "2,4,1"}  # chips of a VM -> how they lie
ALIASES = {"TPU v5p": "TPU v5", "TPU v5e": "TPU v5 lite", "TPU v6e": "TPU v6 lite"}
CLOCK = 60  # s that clocks may differ
SINCE = 3600  # s that a launcher's time may be old: all was copied and set up since
FILES = 4096  # open files that a run may need
FOUND = "devices found: "  # before the probe's answer: libtpu prints lines too
SETUP = "Run launch/setup_host.sh tpu gcs again."
NEW_VM = "Delete this VM and create it again"
UNKNOWN = "Not one of the failures that are known: its last lines are on stderr."


def main(argv: list[str] | None = None) -> int:
    """Prints the checks; returns 0 if all are well, else 1."""
    options = parse(sys.argv[1:] if argv is None else argv)
    if options.probe:
        return probe()
    generation = generation_of(options.expect_kind)
    checks = []
    for check in all_checks(options, generation):
        checks.append(check)
        print(check.line(), flush=True)
    well = all(check.ok for check in checks)
    failed = [asdict(check) for check in checks if not check.ok]
    report = {"ok": well, "host": socket.gethostname(), "failed": failed}
    print(json.dumps(report), flush=True)
    return 0 if well else 1


def parse(argv: list[str]) -> argparse.Namespace:
    parser = parser_of("launch/health.py", __doc__)
    add = parser.add_argument
    add("--expect-devices", type=int, default=1, help="JAX devices of this machine")
    add("--expect-kind", default="cpu", help='"TPU v3" and so on, or cpu')
    add("--time", type=float, help="the launcher's clock, in seconds since 1970")
    add("--min-disk-gib", type=float, default=20, help="free in the home folder (20)")
    add("--patience", type=float, default=240, help="seconds for the devices (240)")
    add("--probe", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    kinds = [generation.kind for generation in GENERATIONS]
    if options.expect_kind not in (*kinds, *ALIASES, "cpu"):
        parser.error(
            f"--expect-kind {options.expect_kind!r}: expected one of "
            f"{', '.join(kinds)}, cpu."
        )
    return options


def generation_of(kind: str) -> Generation | None:
    """The TPU generation of a device kind; None: it is cpu."""
    kind = ALIASES.get(kind, kind)
    return next((x for x in GENERATIONS if x.kind == kind), None)


@dataclass(frozen=True)
class Check:
    name: str
    ok: bool
    found: str
    remedy: str = ""

    def line(self) -> str:
        if self.ok:
            return f"ok    {self.name}: {self.found}"
        return f"FAIL  {self.name}: {self.found} {self.remedy}".rstrip()


def all_checks(
    options: argparse.Namespace, generation: Generation | None
) -> Iterator[Check]:
    yield python()
    yield disk("disk", Path.home(), options.min_disk_gib)
    temporary = Path(tempfile.gettempdir())
    yield disk("temporary folder", temporary, min(2.0, options.min_disk_gib))
    yield clock(options.time)
    yield files()
    yield versions(generation)
    if generation is not None:
        before = [hardware(generation), holders(), lock()]
        yield from before
        if not all(check.ok for check in before):
            yield Check("devices", False, "were not tried, see above.")
            return
    yield devices(options, generation)


# --- The machine ----------------------------------------------------------------------


def python() -> Check:
    version = ".".join(map(str, sys.version_info[:3]))
    found = f"{version}, {sys.executable}"
    remedy = f"is too old: 3.11 or later is needed. {SETUP}"
    return Check("Python", sys.version_info >= (3, 11), found, remedy)


def disk(name: str, folder: Path, least: float) -> Check:
    free = shutil.disk_usage(folder).free / 2**30
    remedy = (
        f"of {least:g} that are needed. Make room: "
        f"`du -xh {folder} | sort -h | tail` shows what is big; /tmp/tpu_logs and old "
        f"folders of launches may go."
    )
    return Check(name, free >= least, f"{free:.1f} GiB free in {folder}", remedy)


def clock(launcher: float | None) -> Check:
    """Against Google's clock, if there is one, and the launcher's of some time ago.

    The launcher has said until when the VM may live, by its own clock.
    """
    now, ok, found = time.time(), True, []
    for source, other, most in (
        ("the metadata server", metadata_time(), CLOCK),
        ("the launcher", launcher, SINCE),
    ):
        if other is not None:
            way = "ahead of" if now > other else "behind"
            found.append(f"{abs(now - other):.0f} s {way} {source}")
            ok = ok and -CLOCK <= now - other <= most
    return Check(
        "clock", ok, ", ".join(found) or "nothing to compare it with",
        "Logins, certificates and the VM's deadline are wrong with a wrong clock: "
        "`sudo systemctl restart chrony systemd-timesyncd`, or set the launcher's.",
    )  # fmt: skip


def metadata_server() -> str | None:
    """Where Google's metadata server is, if this is a machine of theirs."""
    if "GCE_METADATA_IP" in os.environ:
        return os.environ["GCE_METADATA_IP"]
    return "169.254.169.254" if pci_chips() else None


def metadata(name: str) -> tuple[str, str]:
    """What the server says of this VM, and its Date; "" if it does not answer."""
    server = metadata_server()
    if server is None:
        return "", ""
    url = f"http://{server}/computeMetadata/v1/instance/attributes/{name}"
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=3) as answer:
            return answer.read().decode(), answer.headers.get("Date", "")
    except OSError:
        return "", ""


def metadata_time() -> float | None:
    _, date = metadata("worker-network-endpoints")
    with contextlib.suppress(ValueError):
        return parsedate_to_datetime(date).timestamp() if date else None
    return None


def files() -> Check:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = hard == resource.RLIM_INFINITY
    ok = unlimited or hard >= FILES
    found = f"{soft} may be open, at most {'any' if unlimited else hard}"
    return Check(
        "files", ok, found,
        f"of {FILES} that are needed. Write `* - nofile 65536` into "
        "/etc/security/limits.d/lm_scale.conf and log in again.",
    )  # fmt: skip


# --- jax and libtpu -------------------------------------------------------------------


def installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions(generation: Generation | None) -> Check:
    """jax, and for a TPU the libtpu that this jax was made for."""
    jax, libtpu = installed("jax"), installed("libtpu")
    found = f"jax {jax}, jaxlib {installed('jaxlib')}, libtpu {libtpu}"

    def fail(remedy: str) -> Check:
        return Check("versions", False, found, remedy)

    if jax is None:
        return fail(f"jax is not installed. {SETUP}")
    if generation is None:
        return Check("versions", True, found)
    if libtpu is None:
        return fail(f"libtpu is not installed. {SETUP}")
    if nightly := installed("libtpu-nightly"):
        return fail(
            f"libtpu-nightly {nightly} is there too, in the same folder: "
            f"`{sys.executable} -m pip uninstall libtpu-nightly libtpu`. {SETUP}"
        )
    if path := os.environ.get("TPU_LIBRARY_PATH"):
        return fail(f"TPU_LIBRARY_PATH={path} stands for another libtpu: unset it.")
    wanted = wanted_libtpu()
    if wanted and not fnmatch(libtpu, wanted):
        return fail(
            f"jax {jax} was made for libtpu {wanted}: "
            f"`{sys.executable} -m pip install 'jax[tpu]=={jax}'`."
        )
    return Check("versions", True, found)


def wanted_libtpu() -> str | None:
    """The version that jax's extra `tpu` pins, such as 0.0.42.*; None: it does not."""
    for requirement in importlib.metadata.requires("jax") or []:
        if pin := re.match(r"libtpu\s*\(?==\s*([\w.*]+).*extra == .tpu.", requirement):
            return pin[1]
    return None


# --- The TPU --------------------------------------------------------------------------


def pci_chips() -> list[str]:
    """PCI device numbers of the TPU chips."""
    chips = []
    for vendor in PCI.glob("*/vendor"):
        number = (vendor.parent / "device").read_text().strip()
        if vendor.read_text().strip() == GOOGLE and number in CHIPS:
            chips.append(number)
    return chips


def nodes() -> list[str]:
    """The files in /dev through which the chips are driven."""
    found = [*DEV.glob("accel[0-9]*"), *DEV.glob("vfio/[0-9]*")]
    return sorted(map(str, found))


def hardware(generation: Generation) -> Check:
    """Whether there is a TPU, and an image for it; jax says later what it really is."""
    found, drivers = pci_chips(), nodes()
    text = f"{len(found)} chips, {len(drivers)} in {DEV}"

    def fail(remedy: str) -> Check:
        return Check("TPU", False, text, remedy)

    if not found and not drivers:
        return fail(
            f"This is no VM with a TPU, or its TPU is gone. {NEW_VM}, with the "
            f"runtime {generation.runtime} for a {generation.name}."
        )
    if found and generation.name not in CHIPS[found[0]]:
        there = " or ".join(CHIPS[found[0]])
        return fail(f"This is a {there}, expected {generation.name}: another slice.")
    if not drivers:
        return fail(
            f"The image does not drive them: the wrong runtime. {NEW_VM}, with "
            f"--version (--runtime-version where it is queued) {generation.runtime}."
        )
    return Check("TPU", True, text)


def holders() -> Check:
    """Other processes that have the chips or the lock open."""
    wanted, found = {*nodes(), str(LOCK)}, []
    for process in PROC.glob("[0-9]*"):
        if process.name == str(os.getpid()):
            continue
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            held = {os.readlink(file) for file in (process / "fd").iterdir()} & wanted
            if held:
                command = (process / "cmdline").read_bytes().replace(b"\0", b" ")
                text = command.decode(errors="replace").strip()[:120]
                found.append((int(process.name), text, min(held)))
    if not found:
        return Check("TPU's user", True, "none")
    each = [f"pid {pid} ({command}) holds {file}" for pid, command, file in found]
    return Check(
        "TPU's user", False, "; ".join(each) + ".",
        "Only one process can use a TPU. Is it a run of yours? Wait for it, or end it: "
        f"`kill {' '.join(str(pid) for pid, _, _ in found)}`.",
    )  # fmt: skip


def lock() -> Check:
    """libtpu's lock file, which a process that was killed leaves.

    Removed if it is this user's: that of a dead one, as `holders` has found none alive.
    """
    try:
        with LOCK.open("rb+") as file:
            owner = os.fstat(file.fileno()).st_uid
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if owner == os.getuid() and holders().ok:
                LOCK.unlink()
                return Check("lock", True, f"removed {LOCK}, which a dead process left")
    except FileNotFoundError:
        return Check("lock", True, "none")
    except BlockingIOError:
        return Check(
            "lock", False, f"a live process holds {LOCK}.",
            f"`sudo fuser -v {LOCK}` shows which; end it.",
        )  # fmt: skip
    except PermissionError:
        pass
    return Check(
        "lock", False, f"{LOCK} is another user's.",
        f"If `sudo fuser -v {' '.join(nodes())}` shows nothing: `sudo rm {LOCK}`.",
    )  # fmt: skip


# --- The devices, as jax sees them ----------------------------------------------------


@dataclass(frozen=True)
class Known:
    """A failure that is known by what the output says."""

    pattern: str
    remedy: str


ANOTHER_PROCESS = (
    "Another process holds the TPU: `sudo fuser -v /dev/accel* /dev/vfio/*` shows "
    "which. Wait for it, or end it."
)
KNOWN = (
    Known(r"Couldn't mmap: Operation not permitted",
          "Seen on fresh v3 VMs (jax issue 30834, open, no sure cure). In this order: "
          "see that no other process, root's neither, has the TPU open (`sudo fuser -v "
          f"/dev/accel*`); {NEW_VM.lower()} with the runtime {{runtime}}; if a second "
          "VM does the same, it is this libtpu: try the jax[tpu] before, or after."),
    Known(r"already in use by process with pid (\d+)",
          "Process {1} holds the TPU (`ps -fp {1}`): wait for it, or end it: "
          "`kill {1}`."),
    Known(r"already in use by another process",
          ANOTHER_PROCESS + f" If there is none: `sudo rm {LOCK}`."),
    Known(r"multi-process lockfile|libtpu_lockfile", f"`sudo rm {LOCK}`."),
    Known(r"(vfio|accel|iommu|open device).*(busy|in use)", ANOTHER_PROCESS),
    Known(r"(vfio|accel|iommu|open device).*(ermission denied|not permitted)",
          f"{ANOTHER_PROCESS} If there is none, this user may not open the TPU: "
          f"`ls -l /dev/accel* /dev/vfio`. {NEW_VM}, with the runtime {{runtime}}."),
    Known(r"Mismatched PJRT plugin PJRT API version",
          "libtpu does not match jax, or another framework has loaded its own. "
          + SETUP),
    Known(r"has no attribute 'get_library_path'|Failed to open [^\n]*libtpu\.so",
          "libtpu is broken, as two packages that share its folder leave it: "
          "`{python} -m pip uninstall libtpu libtpu-nightly`. " + SETUP),
    Known(r"No module named '?(\w+)", "{1} is not installed. " + SETUP),
    Known(r"No \w+ device found|No hardware is found|No TPU devices? found",
          f"libtpu finds no TPU that it knows. {NEW_VM}, with the runtime "
          "{runtime}."),
    Known(r"Failed to get TPU metadata|metadata\.google\.internal",
          "The metadata server does not answer: a proxy? Unset HTTP_PROXY, or set "
          "NO_PROXY=metadata.google.internal,169.254.169.254."),
    Known(r"Cannot allocate memory|RLIMIT_MEMLOCK|memlock",
          "Memory that may be locked is too little for the TPU: `ulimit -l unlimited`, "
          "or `* - memlock unlimited` in /etc/security/limits.d and a new login."),
    Known(r"TPU (system )?initialization failed",
          "The TPU does not start. If it does not either in a minute: "
          f"{NEW_VM.lower()}, with the runtime {{runtime}}."),
)  # fmt: skip


def remedy_for(output: str, generation: Generation | None) -> str:
    """What to do about output that a known failure printed."""
    runtime = generation.runtime if generation else ""
    for known in KNOWN:
        if match := re.search(known.pattern, output):
            names = {"runtime": runtime, "python": sys.executable}
            return known.remedy.format(match[0], *match.groups(), **names)
    return UNKNOWN


def devices(options: argparse.Namespace, generation: Generation | None) -> Check:
    """How many there are, of which kind, and if each can multiply."""
    expected = f"{options.expect_devices} x {options.expect_kind}"
    platform = os.environ.get("JAX_PLATFORMS", "")
    if generation is not None and platform.split(",")[0] not in ("", "tpu"):
        return Check("devices", False, f"JAX_PLATFORMS={platform} is set.",
                     "Training would not use the TPU: unset it.")  # fmt: skip
    began = time.monotonic()
    output, status = run_probe(environment(options, generation), options.patience)
    if status != 0:
        return Check("devices", False, *failure(output, status, options, generation))
    (line,) = (x for x in output.splitlines() if x.startswith(FOUND))
    found = json.loads(line.removeprefix(FOUND))
    seen = f"{found['number']} x {found['kind']}"
    kind = ALIASES.get(found["kind"], found["kind"])
    if generation is not None and found["platform"] != "tpu":
        text = f"jax fell back to {found['platform']}."
        return Check("devices", False, text, f"No TPU for it. {SETUP}")
    wanted = generation.kind if generation else "cpu"
    if (found["number"], kind) != (options.expect_devices, wanted):
        remedy = "Another slice than was asked for, or a chip is missing. "
        return Check("devices", False, f"{seen}, expected {expected}.",
                     remedy + NEW_VM + "." if generation else
                     "JAX_NUM_CPU_DEVICES sets their number.")  # fmt: skip
    if found["wrong"]:
        text = f"{seen}, of which {found['wrong']} multiply wrongly."
        return Check("devices", False, text, f"A broken chip. {NEW_VM}.")
    took = time.monotonic() - began
    return Check("devices", True, f"{seen}, each multiplies rightly, {took:.0f} s")


def environment(
    options: argparse.Namespace, generation: Generation | None
) -> dict[str, str]:
    """Makes jax use this machine's devices alone, of just the kind expected."""
    env = dict(os.environ)
    if generation is None:
        env["JAX_PLATFORMS"] = "cpu"
        env.setdefault("JAX_NUM_CPU_DEVICES", str(options.expect_devices))
        return env
    env["JAX_PLATFORMS"] = "tpu"  # else it could be the CPU, without a word
    chips = options.expect_devices // generation.devices
    if several_hosts() and chips in BOUNDS:
        # As jax's own tests do; else it waits for the other hosts of the slice.
        visible = ",".join(map(str, range(chips)))
        env |= {
            "TPU_PROCESS_BOUNDS": "1,1,1",
            "TPU_CHIPS_PER_PROCESS_BOUNDS": BOUNDS[chips],
            "TPU_VISIBLE_DEVICES": visible,  # as it was called
            "TPU_VISIBLE_CHIPS": visible,
        }
    return env


def several_hosts() -> bool:
    hosts = os.environ.get("TPU_WORKER_HOSTNAMES")
    return "," in (hosts or metadata("worker-network-endpoints")[0])


def run_probe(env: dict[str, str], patience: float) -> tuple[str, int | None]:
    """What `probe` prints in a process of its own; status None: it had to be killed."""
    command = [sys.executable, str(Path(__file__).resolve()), "--probe"]
    with tempfile.TemporaryFile("w+", errors="replace") as out:
        process = subprocess.Popen(
            command, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=out,
            start_new_session=True,
        )  # fmt: skip
        try:
            status = process.wait(patience)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        out.seek(0)
        return out.read(), status


def failure(
    output: str,
    status: int | None,
    options: argparse.Namespace,
    generation: Generation | None,
) -> tuple[str, str]:
    """What is said of a probe that failed, and what to do."""
    lines = [line for line in output.splitlines() if line.strip()]
    last = lines[-1][:300] if lines else "no output"
    remedy = remedy_for(output, generation)
    print("\n".join(lines[-30:]), file=sys.stderr)
    if status is None:
        hangs = f"jax did not answer in {options.patience:g} s ({last})."
        if remedy == UNKNOWN:
            remedy = f"The TPU hangs. {NEW_VM}." if generation else "Is it busy?"
        return hangs, remedy
    how = f"signal {-status}" if status < 0 else f"status {status}"
    return f"jax failed with {how}: {last}", remedy


def probe() -> int:
    """In a process of its own: uses each device of this machine."""
    import jax
    import numpy as np

    # Small whole numbers: exact also in bfloat16, in whichever order they are added.
    left = (np.arange(128 * 128).reshape(128, 128) % 7 - 3).astype(np.float32)
    right = left.T.copy() + 1
    wrong = []
    found = jax.local_devices()
    for device in found:
        answer = jax.device_put(left, device) @ jax.device_put(right, device)
        if not np.array_equal(np.asarray(answer), left @ right):
            wrong.append(device.id)
    first = found[0]
    facts: dict[str, Any] = {"platform": first.platform, "kind": first.device_kind}
    print(FOUND + json.dumps({**facts, "number": len(found), "wrong": wrong}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
