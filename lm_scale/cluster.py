# SPDX-License-Identifier: Apache-2.0
"""Which of how many processes this one is: by flags, by variables, or by a cluster."""

import os
import re
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lm_scale.errors import InputError

WHO = ("coordinator", "process_id", "num_processes")  # all three are given, or none
LIMITS = {"start_timeout": 300, "peer_timeout": 100}  # s
PREFIX = "LM_SCALE_"  # of the environment variable that stands for a flag

FLAGS_HELP = """\
several processes, all started with the same command (not config, rules, tokenizer):
  --coordinator HOST:PORT  where process 0 listens; HOST is its machine's name
  --process_id I           which one this is: 0 to N-1
  --num_processes N
  --start_timeout S        seconds until all must have connected (300)
  --peer_timeout S         seconds without a sign of life until one is dead (100)
Each flag may stand in the environment instead: LM_SCALE_COORDINATOR and so on. On TPU
VMs and GKE, and where Slurm's srun or Open MPI starts several, none is needed.
`launch/local.py -n 2 -- lm-scale COMMAND ...` starts several on one machine.
"""


@dataclass(frozen=True)
class Place:
    """The place of this process among several."""

    coordinator: str | None = None  # HOST:PORT; None: jax finds it out, and the others
    process_id: int | None = None
    num_processes: int | None = None
    local_devices: tuple[int, ...] | None = None  # None: as jax decides
    start_timeout: int = LIMITS["start_timeout"]
    peer_timeout: int = LIMITS["peer_timeout"]


def take_flags(argv: list[str]) -> tuple[dict[str, str], list[str]]:
    """The flags of this module, by name, and the arguments without them."""
    given: dict[str, str] = {}
    rest: list[str] = []
    arguments = iter(argv)
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if not flag.startswith("--") or name not in (*WHO, *LIMITS):
            rest.append(argument)
            continue
        found = value if equals else next(arguments, None)
        if found is None:
            raise InputError(f"{flag} is the last argument: expected its value.")
        given[name] = found
    return given, rest


def find_place(
    given: Mapping[str, str], env: Mapping[str, str], *, tpu: bool
) -> Place | None:
    """The place that flags, variables or a cluster tell; None: a single process.

    tpu: if this machine has TPU chips; without, no metadata server is asked.
    Raises InputError for what is incomplete or cannot be.
    """
    told = {
        name: given.get(name, env.get(PREFIX + name.upper()))
        for name in (*WHO, *LIMITS)
    }
    limits: Any = {
        name: _number(name, told[name] or str(default), least=1)
        for name, default in LIMITS.items()
    }
    missing = [name for name in WHO if told[name] is None]
    if not missing:
        return _explicit_place(told, limits)
    if len(missing) < len(WHO):
        raise InputError(
            f"{_names(missing)} missing: give --coordinator, --process_id and "
            f"--num_processes (or {PREFIX}COORDINATOR and so on) together, or none."
        )
    cluster = detect(env, tpu=tpu)
    if cluster is None:
        return None
    devices = _slurm_devices(env) if cluster == "Slurm" else None
    return Place(local_devices=devices, **limits)


def _explicit_place(told: Mapping[str, str | None], limits: Any) -> Place | None:
    number = _number("num_processes", str(told["num_processes"]), least=1)
    index = _number("process_id", str(told["process_id"]), least=0)
    if index >= number:
        raise InputError(
            f"process_id = {index} with num_processes = {number}: they are counted "
            f"from 0, so expected 0 to {number - 1}."
        )
    host, port = parse_address(str(told["coordinator"]))
    return None if number == 1 else Place(f"{host}:{port}", index, number, **limits)


def parse_address(text: str) -> tuple[str, int]:
    """HOST and port of `HOST:PORT`; an IPv6 address stands, and stays, in brackets."""
    host, _, port = text.rpartition(":")
    valid = re.fullmatch(r"[\w.-]+|\[[0-9a-fA-F:.]+(%\w+)?\]", host)
    if not (valid and re.fullmatch(r"\d{1,5}", port) and 0 < int(port) < 2**16):
        raise InputError(
            f"coordinator = {text!r}: expected HOST:PORT, such as 10.0.0.1:8476 or "
            f"[fe80::1]:8476, with the name of process 0's machine."
        )
    return host, int(port)


def _number(name: str, text: str, *, least: int) -> int:
    if not re.fullmatch(r"\d{1,9}", text) or int(text) < least:
        raise InputError(f"{name} = {text!r}: expected a number from {least} on.")
    return int(text)


def _names(missing: list[str]) -> str:
    return " and ".join(missing) + (" is" if len(missing) == 1 else " are")


# --- Clusters -------------------------------------------------------------------------
# jax.distributed knows how to ask them who is who. Here it is only decided whether they
# have started several processes: a notebook inside a Slurm allocation is a single one.


def detect(env: Mapping[str, str], *, tpu: bool) -> str | None:
    """The cluster that has started several processes; None: there is none."""
    step = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")
    if all(name in env for name in step) and _count(env, "SLURM_NTASKS") > 1:
        return "Slurm"
    if _count(env, "OMPI_COMM_WORLD_SIZE") > 1:
        return "Open MPI"
    if not tpu:
        return None
    hosts = env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES")
    if hosts is not None:  # GKE
        several = "," in hosts or _count(env, "MEGASCALE_NUM_SLICES") > 1
        return "GKE" if several else None
    if "TPU_SKIP_MDS_QUERY" in env:
        return None
    slices = re.search(r"MEGASCALE_NUM_SLICES: '?(\d+)", tpu_metadata("tpu-env"))
    several = "," in tpu_metadata("worker-network-endpoints")
    return "TPU VM" if several or (slices and int(slices[1]) > 1) else None


def _count(env: Mapping[str, str], name: str) -> int:
    text = env.get(name, "")
    return int(text) if text.isdecimal() else 1


def tpu_metadata(name: str, seconds: float = 3.0) -> str:
    """What Google's metadata server says of this VM; "" if it does not answer."""
    # By its address: where there is no such server, looking its name up takes long.
    server = os.environ.get("GCE_METADATA_IP", "169.254.169.254")
    url = f"http://{server}/computeMetadata/v1/instance/attributes/{name}"
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=seconds) as answer:
            return answer.read().decode()
    except OSError:
        return ""


def _slurm_devices(env: Mapping[str, str]) -> tuple[int, ...] | None:
    """All GPUs of the node for its only task: jax would give it the first one."""
    tasks = env.get("SLURM_STEP_TASKS_PER_NODE", "")
    gpus = env.get("SLURM_GPUS_ON_NODE", "")
    if re.fullmatch(r"1(\(x\d+\))?", tasks) and gpus.isdigit():
        return tuple(range(int(gpus)))
    return None
