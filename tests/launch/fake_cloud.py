# SPDX-License-Identifier: Apache-2.0
"""A cloud with TPU VMs on this machine, for the real `gcloud` and for launchers.

    with FakeCloud(tmp_path) as cloud:
        subprocess.run(["gcloud", "compute", "tpus", ...], env=cloud.env())

`cloud.env()` is a whole environment: in it the real gcloud (`gcloud_missing()` says why
to skip where there is none) talks to an HTTP server on loopback, which has the
TPU API and what ssh needs of the Compute API. Anything else gcloud might ask goes to a
proxy that is not there, so that it fails. `ssh` and `scp` on its PATH run in
`folder/vm-NAME-INCARNATION/worker-I/`, that worker's home. Linux only (/proc).

What a test sees:
    cloud.requests              every API request: .time .method .path .query .body
    cloud.posts(r"/nodes$")     the bodies of the POSTs whose path matches
    cloud.events                (time, text): commands, copies, kills, states
    cloud.nodes() / .queues()   the names that exist now
    cloud.state(name)           of a node; None: none is called so. queue_state(name)
    cloud.home(name, i)         the home of a worker of the newest VM of that name
    cloud.vms                   every VM ever, oldest first: .name .incarnation .alive
    cloud.processes(name)       the ids of processes that run in that VM now
    cloud.make(name, "v3-8")    a node that is READY at once, without gcloud
    cloud.gcloud(*args)         runs gcloud; .returncode .stdout .stderr .seconds

What a test sets, before or in between:
    cloud.worker_env = lambda i: {...}     more environment for a worker's commands
    cloud.vm_path = [...]                  folders that come first in their PATH
    cloud.programs["df"] = "#!/bin/sh ..." a program on the PATH of all workers
    cloud.program(name, i, "df", text)     the same on one worker, that exists
    cloud.vm_gcloud = True                 the real gcloud is on the VMs' PATH too
    cloud.operation_polls = 2              looks (at it or its node) an operation takes
    cloud.queue_path = ["ACCEPTED", ...]   the states a queued resource shows, one a
                                           look; it stays in the last
What a test does:
    cloud.fail("POST", "/nodes", 429, times=1, message=..., body=...)   an answer
    cloud.fail_operation(message, code=8, times=1)    the next create's; see STOCK_OUT
    cloud.stock_out(times=1); cloud.quota(times=1); cloud.hang(times=1)
    cloud.preempt(name, grace=0)      PREEMPTED, queue SUSPENDED, processes killed
    cloud.notice(name)                instance/preempted becomes TRUE, nothing else
    cloud.kill_worker(name, i)        that worker is dead and unreachable
    cloud.unreachable(name, i, True)  ssh fails, its processes go on
    cloud.full_disk(name, i)          scp fails there, and df says that nothing is free
    cloud.set_state(name, "REPAIRING"), cloud.suspend_queue(q), cloud.fail_queue(q)

gcloud's sleeps are cut to a fiftieth (`hurry=50`): it repeats a failed ssh ten times
5 s apart, and a 503 for half a minute. hurry=1 leaves them. Its start takes a second or
two: one process loads its modules once for all clouds, and forks for every command
(`warm=False` starts each anew). Both are the real gcloud's code, arguments and all.

A worker's commands have a scrubbed environment: HOME, PATH, TMPDIR (of their own),
GCE_METADATA_HOST, _IP and _ROOT (a metadata server, one a worker), worker_env, and
LM_SCALE_SANDBOX, by which a dead VM's processes are found: what drops that variable
escapes. `sudo CMD` runs CMD; shutdown, poweroff, halt and reboot stop the node;
systemctl, systemd-run and apt-get fail. Absolute paths are this machine's: scp refuses
those outside the sandbox. A `startup-script` in the metadata runs when the VM is READY.
"""

import atexit
import http.server
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PROJECT, NUMBER = "test-project", "1234567890"

STATUS = {  # HTTP status: the name in google.rpc.Code
    400: "INVALID_ARGUMENT", 401: "UNAUTHENTICATED", 403: "PERMISSION_DENIED",
    404: "NOT_FOUND", 409: "ALREADY_EXISTS", 429: "RESOURCE_EXHAUSTED",
    500: "INTERNAL", 503: "UNAVAILABLE", 504: "DEADLINE_EXCEEDED",
}  # fmt: skip
STOCK_OUT = (
    'There is no more capacity in the zone "{zone}"; you can try in another zone where '
    "Cloud TPU Nodes are offered (see https://cloud.google.com/tpu/docs/regions) "
    "[EID: 0x1234567890abcdef]"
)
QUOTA = (
    "Quota limit 'TPUV3sPerProjectPerZoneForTPUAPI' has been exceeded. "
    "Limit: 0 in zone {zone}."
)
DENIED = (
    "Permission 'tpu.nodes.create' denied on resource "
    "'//tpu.googleapis.com/projects/test-project/locations/{zone}' "
    "(or it may not exist)."
)
MESSAGES = {403: DENIED, 429: QUOTA, 503: "The service is currently unavailable."}

CORES = (8, 32, 128, 256, 512)
TYPES = {
    *(f"v2-{n}" for n in CORES),
    *(f"v3-{n}" for n in (*CORES, 1024, 2048)),
    *(f"v4-{n}" for n in range(8, 4097, 8)),
    *(f"v5p-{n}" for n in range(8, 12289, 8)),
    *(
        f"{g}-{n}"
        for g in ("v5litepod", "v6e")
        for n in (1, 4, 8, 16, 32, 64, 128, 256)
    ),
}
RUNTIMES = {
    "tpu-ubuntu2204-base", "tpu-vm-base", "v2-alpha-tpuv5", "v2-alpha-tpuv5-lite",
    "v2-alpha-tpuv6e",
}  # fmt: skip
NAME = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")
LABEL = re.compile(r"[a-z0-9_-]{0,63}")


def workers_of(accelerator: str) -> int:
    generation, size = accelerator.split("-")
    if generation in ("v5litepod", "v6e"):
        return 1 if int(size) <= 8 else int(size) // 4
    return int(size) // 8


def gcloud_missing() -> str:
    """Why the real gcloud cannot be driven here; empty: it can."""
    if not sys.platform.startswith("linux"):
        return "the fake cloud finds processes in /proc: needs Linux"
    for program in ("gcloud", "ssh-keygen", "bash"):
        if shutil.which(program) is None:
            return f"{program} is not installed"
    return ""


@dataclass
class Done:
    """What a command gave."""

    returncode: int
    stdout: str
    stderr: str
    seconds: float


@dataclass
class Request:
    time: float
    method: str
    path: str  # without the query
    query: dict[str, str]
    body: Any


@dataclass
class Failure:
    method: str
    path: str
    status: int
    body: dict
    left: float


@dataclass
class Operation:
    name: str
    target: str  # the resource's name
    left: float  # looks until it is done; infinity: it never is
    finish: Callable[[], Any]
    error: dict | None = None
    done: bool = False

    def look(self) -> dict:
        self.left -= 1
        if self.left < 0 and not self.done:
            self.done = True
            self.finish()
        shown: dict[str, Any] = {"name": self.name, "done": self.done, "metadata": {}}
        if self.done:
            if self.error:
                return shown | {"error": self.error}
            shown["response"] = {"name": self.target}
        return shown


@dataclass
class VM:
    """One VM that was or is: a node of the same name made later is another one."""

    name: str
    zone: str
    incarnation: int
    folder: Path
    addresses: list[str]  # external ones
    alive: bool = True
    preempted: bool = False  # what the metadata say
    dead: set[int] = field(default_factory=set)  # workers that ssh cannot reach
    full: set[int] = field(default_factory=set)
    servers: list[http.server.ThreadingHTTPServer] = field(default_factory=list)

    def home(self, worker: int) -> Path:
        return self.folder / f"worker-{worker}"


class Refused(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, message: str, name: str = ""):
        self.status = status
        self.body = error_body(status, message, name)


def error_body(status: int, message: str, name: str = "") -> dict:
    name = name or STATUS.get(status, "UNKNOWN")
    return {"error": {"code": status, "message": message, "status": name}}


class FakeCloud:
    def __init__(self, folder: Path, *, hurry: int = 50, warm: bool = True):
        self.folder = Path(folder).resolve()
        self.hurry = hurry
        self.warm = warm
        self.id = f"fake-{uuid.uuid4().hex[:12]}"
        self.requests: list[Request] = []
        self.events: list[tuple[float, str]] = []
        self.vms: list[VM] = []
        self.programs: dict[str, str] = {}
        self.worker_env: Callable[[int], dict[str, str]] = lambda i: {}
        self.vm_path: list[str] = []
        self.vm_gcloud = False
        self.operation_polls = 0
        self.queue_path = [
            "ACCEPTED",
            "WAITING_FOR_RESOURCES",
            "PROVISIONING",
            "ACTIVE",
        ]
        self._nodes: dict[tuple[str, str], dict] = {}  # by (zone, name)
        self._queues: dict[tuple[str, str], dict] = {}
        self._paths: dict[
            tuple[str, str], Iterator[str]
        ] = {}  # what a queue shows next
        self._operations: dict[str, Operation] = {}
        self._creating: dict[tuple[str, str], Operation] = {}
        self._failures: list[Failure] = []
        self._operation_errors: list[dict] = []
        self._hangs = 0.0
        self._count = 0
        self._lock = threading.RLock()

    # The test's side.

    def __enter__(self) -> "FakeCloud":
        self._server = serve(self._handler())
        self.port = self._server.server_address[1]
        self._write_programs()
        return self

    def __exit__(self, *exc) -> None:
        for vm in self.vms:
            self._stop(vm)
        self._kill(f"{self.id}:")
        self._server.shutdown()
        self._server.server_close()

    def env(self) -> dict[str, str]:
        """A whole environment for a launcher, or for gcloud itself."""
        dropped = re.compile(r"CLOUDSDK_|GOOGLE_|GCE_|SSH_|PYTHONHOME$|PYTHONPATH$")
        env = {k: v for k, v in os.environ.items() if not dropped.match(k)}
        env = {k: v for k, v in env.items() if not k.lower().endswith("_proxy")}
        path = [str(self.folder / "bin"), env.get("PATH", os.defpath)]
        url = f"http://127.0.0.1:{self.port}/"
        return env | {
            "HOME": str(self.folder / "home"),
            "PATH": os.pathsep.join(path),
            "no_proxy": "127.0.0.1,localhost",
            "https_proxy": "http://127.0.0.1:9",  # where nobody listens
            "CLOUDSDK_CONFIG": str(self.folder / "gcloud"),
            "CLOUDSDK_AUTH_DISABLE_CREDENTIALS": "true",
            "CLOUDSDK_API_ENDPOINT_OVERRIDES_TPU": url,
            "CLOUDSDK_API_ENDPOINT_OVERRIDES_COMPUTE": f"{url}compute/v1/",
            "CLOUDSDK_CORE_PROJECT": PROJECT,
            "CLOUDSDK_CORE_DISABLE_PROMPTS": "1",
            "CLOUDSDK_CORE_DISABLE_USAGE_REPORTING": "true",
            "CLOUDSDK_CORE_CHECK_GCE_METADATA": "false",
            "CLOUDSDK_COMPONENT_MANAGER_DISABLE_UPDATE_CHECK": "true",
            "CLOUDSDK_SURVEY_DISABLE_PROMPTS": "true",
        }

    def gcloud(self, *args: str, stdin: str = "", timeout: float = 120) -> Done:
        """Runs the real gcloud."""
        start = time.monotonic()
        done = subprocess.run(
            ["gcloud", *args], env=self.env(), input=stdin, timeout=timeout,
            text=True, capture_output=True,
        )  # fmt: skip
        seconds = time.monotonic() - start
        return Done(done.returncode, done.stdout, done.stderr, seconds)

    def make(self, name: str, accelerator: str = "v3-8", **body: Any) -> VM:
        """A node that is READY, without gcloud; `zone` may be among the arguments."""
        zone = body.pop("zone", "us-central1-a")
        body = {"runtimeVersion": "tpu-ubuntu2204-base"} | body
        with self._lock:
            self._create((zone, name), {"acceleratorType": accelerator} | body)
            while (zone, name) in self._creating:
                self._look((zone, name))
        return self.vm(name)

    def posts(self, pattern: str) -> list[Any]:
        return [
            request.body for request in list(self.requests)
            if request.method == "POST" and re.search(pattern, request.path)
        ]  # fmt: skip

    def nodes(self) -> list[str]:
        return [name for _, name in self._nodes]

    def queues(self) -> list[str]:
        return [name for _, name in self._queues]

    def state(self, name: str) -> str | None:
        return next(
            (n["state"] for (_, k), n in self._nodes.items() if k == name), None
        )

    def queue_state(self, name: str) -> str | None:
        found = (q for (_, k), q in self._queues.items() if k == name)
        return next((queue["state"]["state"] for queue in found), None)

    def vm(self, name: str) -> VM:
        return next(vm for vm in reversed(self.vms) if vm.name == name)

    def home(self, name: str, worker: int = 0) -> Path:
        return self.vm(name).home(worker)

    def processes(self, name: str) -> list[int]:
        return list(find(self._mark(self.vm(name))))

    def fail(
        self, method: str, path: str, status: int, *, times: float = 1,
        message: str = "", body: dict | None = None,
    ) -> None:  # fmt: skip
        """The next `times` requests that match get this answer; path is a regex."""
        message = message or MESSAGES.get(status, "failed")
        body = body or error_body(status, message)
        self._failures.append(Failure(method, path, status, body, times))

    def fail_operation(self, message: str, *, code: int = 8, times: int = 1) -> None:
        """The next `times` creates are accepted, and fail when they are carried out."""
        self._operation_errors += [{"code": code, "message": message}] * times

    def stock_out(self, times: int = 1) -> None:
        self.fail_operation(STOCK_OUT, times=times)

    def quota(self, times: int = 1) -> None:
        self.fail("POST", "/(nodes|queuedResources)$", 429, times=times)

    def hang(self, times: float = 1) -> None:
        """The next `times` operations never finish."""
        self._hangs = times

    def preempt(self, name: str, *, grace: float = 0, state: str = "PREEMPTED") -> None:
        """The VM goes: SIGTERM and `grace` seconds if it has any, then SIGKILL."""
        vm = self.vm(name)
        with self._lock:
            self._log(f"preempted {name}")
            self._nodes[vm.zone, name]["state"] = state
            queue = self._nodes[vm.zone, name].get("queuedResource", "").split("/")[-1]
            vm.preempted = True
        if grace:
            self._terminate(vm, grace)
        self._stop(vm)
        if queue:
            self.set_queue(queue, "SUSPENDED")

    def notice(self, name: str) -> None:
        self.vm(name).preempted = True

    def kill_worker(self, name: str, worker: int) -> None:
        self.unreachable(name, worker, True)
        self._kill(self._mark(self.vm(name), worker))

    def unreachable(self, name: str, worker: int, is_so: bool = True) -> None:
        (self.vm(name).dead.add if is_so else self.vm(name).dead.discard)(worker)

    def full_disk(self, name: str, worker: int = 0) -> None:
        self.vm(name).full.add(worker)
        self.program(name, worker, "df", DF_FULL)

    def program(self, name: str, worker: int, program: str, text: str) -> None:
        write_program(self.vm(name).folder / f"bin-{worker}" / program, text)

    def set_state(self, name: str, state: str) -> None:
        self._nodes[self.vm(name).zone, name]["state"] = state

    def set_queue(self, name: str, state: str) -> None:
        """From now on, it stays in this state."""
        key = next(key for key in self._queues if key[1] == name)
        self._paths[key] = iter(())
        self._enter(key, state)

    def suspend_queue(self, name: str) -> None:
        self.set_queue(name, "SUSPENDED")

    def fail_queue(self, name: str) -> None:
        self.set_queue(name, "FAILED")

    # The TPU API's side.

    def _handler(self) -> type[http.server.BaseHTTPRequestHandler]:
        cloud = self

        class Handler(Answers):
            def answer(self, method: str, url: str, body: Any) -> tuple[int, Any]:
                path, _, query = url.partition("?")
                if path.startswith("/sandbox/"):
                    return 200, cloud._sandbox(method, path, body)
                asked = dict(urllib.parse.parse_qsl(query))
                with cloud._lock:
                    cloud.requests.append(
                        Request(time.time(), method, path, asked, body)
                    )
                    try:
                        return 200, cloud._route(method, path, asked, body)
                    except Refused as refused:
                        return refused.status, refused.body

        return Handler

    def _route(self, method: str, path: str, query: dict, body: Any) -> Any:
        self._fail_if_told(method, path)
        if path.startswith("/compute/v1/"):
            return self._compute(method, path)
        match = re.fullmatch(
            r"/(?:v2|v2alpha1)/(projects/([^/]+)/locations/?(?:([^/]+)(?:/(.*))?)?)",
            path,
        )
        if match is None or match[2] != PROJECT:
            raise Refused(404, f"the fake cloud has no {path}")
        zone, rest = match[3], match[4]
        if rest is None:
            raise Refused(
                501, "the fake cloud does not list locations", "UNIMPLEMENTED"
            )
        kind, _, name = rest.partition("/")
        name, _, verb = name.partition(":")
        method_of = {
            "nodes": self._node, "queuedResources": self._queue,
            "operations": self._operation, "acceleratorTypes": self._types,
            "runtimeVersions": self._types,
        }.get(kind)  # fmt: skip
        if method_of is None:
            raise Refused(404, f"the fake cloud has no {path}")
        return method_of(method, zone, name, verb or kind, query, body)

    def _fail_if_told(self, method: str, path: str) -> None:
        for failure in self._failures:
            if failure.left > 0 and failure.method == method:
                if re.search(failure.path, path):
                    failure.left -= 1
                    zone = path.partition("/locations/")[2].split("/")[0]
                    text = json.dumps(failure.body).replace("{zone}", zone)
                    refused = Refused(failure.status, "")
                    refused.body = json.loads(text)
                    raise refused

    def _compute(self, method: str, path: str) -> dict:
        if path == f"/compute/v1/projects/{PROJECT}" and method == "GET":
            return {"name": PROJECT, "id": NUMBER, "commonInstanceMetadata": {}}
        raise Refused(404, f"the fake cloud has no {path}")

    def _node(self, method, zone, name, verb, query, body) -> dict:
        key = (zone, name or query.get("nodeId", ""))
        if method == "POST" and not name:
            return self._create(key, body)
        if method == "GET" and not name:
            for creating in list(self._creating):
                self._look(creating)
            return {
                "nodes": [n for (z, _), n in self._nodes.items() if zone in (z, "-")]
            }
        self._look(key)
        node = self._nodes.get(key)
        if node is None:
            raise Refused(404, f"Resource '{resource(key, 'nodes')}' was not found")
        if method == "GET":
            return node
        if method == "DELETE":
            return self._delete(key)
        if method == "PATCH":
            for part in query.get("updateMask", "").split(","):
                node[part] = body.get(part)
            return self._start(key, "nodes", lambda: None).look()
        if verb == "getGuestAttributes":
            return self._guest_attributes(key, body)
        if verb in ("stop", "start"):
            return self._start(key, "nodes", lambda: self._stop_node(key, verb)).look()
        raise Refused(404, f"the fake cloud has no {verb}")

    def _look(self, key: tuple[str, str]) -> None:
        """A node that is being created comes nearer whenever one looks at it."""
        if key in self._creating:
            self._creating[key].look()

    def _create(self, key: tuple[str, str], body: Any, queue: str = "") -> dict:
        check(key, body)
        if key in self._nodes:
            raise Refused(409, f"Resource '{resource(key, 'nodes')}' already exists")
        vm = self._new_vm(key, workers_of(body["acceleratorType"]))
        self._nodes[key] = describe(key, body, vm, queue)
        self._log(f"creating {key[1]}")
        error = self._operation_errors.pop(0) if self._operation_errors else None

        def finish() -> None:
            self._creating.pop(key, None)
            if self._nodes.get(key, {}).get("state") != "CREATING":
                return  # deleted meanwhile
            if error:
                del self._nodes[key]
                vm.alive = False
            else:
                self._nodes[key]["state"] = "READY"
                self._boot(vm)
            self._log(f"{key[1]}: {error['message'] if error else 'READY'}")

        operation = self._start(key, "nodes", finish)
        if error:
            text = error["message"].replace("{zone}", key[0])
            operation.error = error | {"message": text}
        self._creating[key] = operation
        return operation.look()

    def _delete(self, key: tuple[str, str]) -> dict:
        node = self._nodes[key]
        node["state"] = "DELETING"
        self._log(f"deleting {key[1]}")

        def finish() -> None:
            if self._nodes.get(key) is node:
                del self._nodes[key]
                self._creating.pop(key, None)
                self._stop(self.vm(key[1]))
                self._log(f"deleted {key[1]}")
                queue = (key[0], node.get("queuedResource", "").split("/")[-1])
                if queue in self._queues:
                    self.set_queue(queue[1], "SUSPENDED")

        return self._start(key, "nodes", finish).look()

    def _stop_node(self, key: tuple[str, str], verb: str) -> None:
        if verb == "stop":
            self._nodes[key]["state"] = "STOPPED"
            self._stop(self.vm(key[1]))
        else:
            self._nodes[key]["state"] = "READY"
            self.vm(key[1]).alive = True

    def _guest_attributes(self, key: tuple[str, str], body: Any) -> dict:
        asked = [int(i) for i in (body or {}).get("workerIds", []) if i != ""]
        vm = self.vm(key[1])
        items = [
            [
                attribute("hostkeys", "ssh-ed25519", f"AAAAkey{vm.incarnation:06}"),
                attribute("hostkeys", "hostname", f"t1v-n-{vm.incarnation}-w-{i}"),
            ]
            for i in asked or range(len(vm.addresses))
        ]
        return {"guestAttributes": [{"queryValue": {"items": item}} for item in items]}

    def _queue(self, method, zone, name, verb, query, body) -> dict:
        key = (zone, name or query.get("queuedResourceId", ""))
        if method == "POST" and not name:
            return self._create_queue(key, body)
        if method == "GET" and not name:
            keys = [k for k in self._queues if zone in (k[0], "-")]
            return {"queuedResources": [self._show_queue(k) for k in keys]}
        if key not in self._queues:
            what = resource(key, "queuedResources")
            raise Refused(404, f"Resource '{what}' was not found")
        if method == "GET":
            return self._show_queue(key)
        if method == "DELETE":
            return self._delete_queue(key, query.get("force") in ("true", "True"))
        raise Refused(404, f"the fake cloud has no {verb}")

    def _create_queue(self, key: tuple[str, str], body: Any) -> dict:
        what = resource(key, "queuedResources")
        if key in self._queues:
            raise Refused(409, f"Resource '{what}' already exists")
        for spec in (specs := body.get("tpu", {}).get("nodeSpec", [])):
            check((key[0], spec.get("nodeId", "")), spec.get("node", {}))
        if len(specs) != 1:
            raise Refused(400, "tpu.nodeSpec: expected one")
        self._queues[key] = body | {"name": what, "state": {"state": "CREATING"}}
        self._log(f"queued {key[1]}")

        def finish() -> None:
            if key in self._queues:
                self._paths[key] = iter(list(self.queue_path))
                self._enter(key, next(self._paths[key]))

        operation = self._start(key, "queuedResources", finish)
        if self._operation_errors:
            operation.error = self._operation_errors.pop(0)
            text = operation.error["message"].replace("{zone}", key[0])
            operation.error = operation.error | {"message": text}
            operation.finish = lambda: self._queues.pop(key, None)
        return operation.look()

    def _show_queue(self, key: tuple[str, str]) -> dict:
        shown = json.loads(json.dumps(self._queues[key]))
        if (state := next(self._paths.get(key, iter(())), None)) is not None:
            self._enter(key, state)
        return shown

    def _enter(self, key: tuple[str, str], state: str) -> None:
        queue = self._queues[key]
        shown: dict[str, Any] = {"state": state, "stateInitiator": "SERVICE"}
        queue["state"] = shown
        if state == "FAILED":
            text = STOCK_OUT.replace("{zone}", key[0])
            shown["failedData"] = {"error": {"code": 8, "message": text}}
        self._log(f"queue {key[1]}: {state}")
        if state == "ACTIVE":
            (spec,) = queue["tpu"]["nodeSpec"]
            node = (key[0], spec["nodeId"])
            if node not in self._nodes:
                body = dict(spec["node"])
                if "spot" in queue:
                    body["schedulingConfig"] = {"spot": True}
                self._create(node, body, queue["name"])
                if node in self._creating:
                    self._creating[node].left = 0
                    self._look(node)

    def _delete_queue(self, key: tuple[str, str], force: bool) -> dict:
        state = self._queues[key]["state"]["state"]
        if not force and state in ("PROVISIONING", "ACTIVE"):
            what = resource(key, "queuedResources")
            raise Refused(
                400, f"Queued resource '{what}' in state {state} can only be deleted "
                "with the force flag", "FAILED_PRECONDITION",
            )  # fmt: skip
        self._enter(key, "DELETING")
        self._paths[key] = iter(())

        def finish() -> None:
            gone = self._queues.pop(key, None)
            for node, shown in list(self._nodes.items()):
                if gone and shown.get("queuedResource") == gone["name"]:
                    self._delete(node)
            self._log(f"deleted queue {key[1]}")

        return self._start(key, "queuedResources", finish).look()

    def _operation(self, method, zone, name, verb, query, body) -> dict:
        if name not in self._operations:
            raise Refused(404, f"Operation '{name}' was not found")
        return self._operations[name].look()

    def _start(
        self, key: tuple[str, str], kind: str, finish: Callable[[], None]
    ) -> Operation:
        self._count += 1
        name = f"operation-{self._count}"
        left: float = self.operation_polls
        if self._hangs > 0:
            self._hangs -= 1
            left = float("inf")
        where = resource((key[0], name), "operations")
        operation = Operation(where, resource(key, kind), left, finish)
        self._operations[name] = operation
        return operation

    def _types(self, method, zone, name, verb, query, body) -> dict:
        kind = verb
        names, label = (TYPES, "type") if kind == "acceleratorTypes" else (
            RUNTIMES, "version"
        )  # fmt: skip
        shown = {
            n: {"name": resource((zone, n), kind), label: n} for n in sorted(names)
        }
        if not name:
            return {kind: list(shown.values())}
        if name not in shown:
            raise Refused(
                404, f"Resource '{resource((zone, name), kind)}' was not found"
            )
        return shown[name]

    # The machines' side.

    def _new_vm(self, key: tuple[str, str], workers: int) -> VM:
        incarnation = 1 + sum(vm.name == key[1] for vm in self.vms)
        first = sum(len(vm.addresses) for vm in self.vms)
        addresses = [
            f"34.{100 + n // 40000}.{n // 200 % 200}.{n % 200 + 1}"
            for n in range(first, first + workers)
        ]
        folder = self.folder / f"vm-{key[1]}-{incarnation}"
        vm = VM(key[1], key[0], incarnation, folder, addresses)
        self.vms.append(vm)
        return vm

    def _boot(self, vm: VM) -> None:
        for i in range(len(vm.addresses)):
            for part in (vm.home(i), vm.folder / f"tmp-{i}", vm.folder / f"bin-{i}"):
                part.mkdir(parents=True, exist_ok=True)
            vm.servers.append(serve(self._metadata_handler(vm, i)))
            for program, text in self._vm_programs(vm, i).items():
                write_program(vm.folder / f"bin-{i}" / program, text)
        script = self._nodes[vm.zone, vm.name].get("metadata", {}).get("startup-script")
        if script:
            for i in range(len(vm.addresses)):
                file = vm.folder / f"startup-{i}.sh"  # as the guest agent does it
                write_program(file, script)
                with open(vm.folder / f"startup-{i}.log", "wb") as log:
                    subprocess.Popen(
                        [file], cwd=vm.home(i), env=self._vm_env(vm, i),
                        start_new_session=True, stdin=subprocess.DEVNULL,
                        stdout=log, stderr=log,
                    )  # fmt: skip

    def _vm_programs(self, vm: VM, worker: int) -> dict[str, str]:
        programs = dict.fromkeys(("systemctl", "systemd-run", "apt-get"), NOT_HERE)
        off = POWER_OFF % {"url": f"127.0.0.1:{self.port}", "ip": vm.addresses[worker]}
        programs |= dict.fromkeys(("shutdown", "poweroff", "halt", "reboot"), off)
        programs |= {"sudo": SUDO}
        if self.vm_gcloud:
            told = {k: v for k, v in self.env().items() if k.startswith("CLOUDSDK_")}
            told["CLOUDSDK_CONFIG"] = str(vm.folder / f"gcloud-{worker}")
            lines = [f"export {k}={shlex.quote(v)}" for k, v in told.items()]
            real = shlex.quote(str(self.folder / "bin" / "gcloud"))
            programs["gcloud"] = "\n".join(
                ["#!/bin/sh", *lines, f'exec {real} "$@"', ""]
            )
        return programs | self.programs

    def _vm_env(self, vm: VM, worker: int) -> dict[str, str]:
        host, port = vm.servers[worker].server_address[:2]
        system = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        path = [str(vm.folder / f"bin-{worker}"), *self.vm_path, system]
        env = {
            "HOME": str(vm.home(worker)), "PATH": ":".join(path),
            "USER": "user", "LOGNAME": "user", "SHELL": "/bin/bash", "LANG": "C.UTF-8",
            "TMPDIR": str(vm.folder / f"tmp-{worker}"),
        }  # fmt: skip
        for name in ("HOST", "IP", "ROOT"):
            env[f"GCE_METADATA_{name}"] = f"{host}:{port}"
        env |= self.worker_env(worker)
        return env | {"LM_SCALE_SANDBOX": self._mark(vm, worker)}

    def _mark(self, vm: VM, worker: int | None = None) -> str:
        last = "" if worker is None else f"{worker}."
        return f"{self.id}:{vm.name}.{vm.incarnation}:{last}"

    def _sandbox(self, method: str, path: str, body: Any) -> dict:
        """What the stub ssh and scp ask: /sandbox/ADDRESS[/VERB]."""
        address, _, verb = path.removeprefix("/sandbox/").partition("/")
        vm = next((vm for vm in self.vms if address in vm.addresses), None)
        if vm is None or not vm.alive or not vm.servers:
            return {"reachable": False}
        worker = vm.addresses.index(address)
        if verb == "off":
            with self._lock:
                self._log(f"{vm.name} worker {worker}: {body}")
                self._nodes[vm.zone, vm.name]["state"] = "STOPPED"
            threading.Thread(target=self._stop, args=(vm,)).start()
            return {}
        if worker in vm.dead:
            return {"reachable": False}
        if body:
            self._log(f"{vm.name} worker {worker}: {body}")
        return {
            "reachable": True, "home": str(vm.home(worker)), "root": str(vm.folder),
            "env": self._vm_env(vm, worker), "full": worker in vm.full,
        }  # fmt: skip

    def _stop(self, vm: VM) -> None:
        vm.alive = False
        self._kill(self._mark(vm))
        while vm.servers:
            server = vm.servers.pop()
            server.shutdown()
            server.server_close()

    def _terminate(self, vm: VM, grace: float) -> None:
        for pid in find(self._mark(vm)):
            os.kill(pid, signal.SIGTERM)
        end = time.monotonic() + grace
        while time.monotonic() < end and any(find(self._mark(vm))):
            time.sleep(0.02)

    def _kill(self, mark: str) -> None:
        while pids := list(find(mark)):  # what one of them has started just now, too
            for pid in pids:
                kill(pid, mark)
            time.sleep(0.002)

    def _log(self, text: str) -> None:
        self.events.append((time.time(), text))

    def _metadata_handler(self, vm: VM, worker: int):
        cloud = self

        class Handler(Answers):
            def answer(self, method: str, url: str, body: Any) -> tuple[int, Any]:
                if self.headers.get("Metadata-Flavor") != "Google":
                    return 403, "Missing Metadata-Flavor:Google header.\n"
                path = url.partition("?")[0].removeprefix("/computeMetadata/v1/")
                found = cloud._metadata(vm, worker).get(path.rstrip("/"))
                return (404, "not found\n") if found is None else (200, found)

        return Handler

    def _metadata(self, vm: VM, worker: int) -> dict[str, Any]:
        node = self._nodes.get((vm.zone, vm.name), {})
        ends = [e["ipAddress"] for e in node.get("networkEndpoints", [])]
        accelerator = node.get("acceleratorType", "")
        attributes = {
            "agent-worker-number": str(worker),
            "accelerator-type": accelerator,
            "worker-network-endpoints": ",".join(f"unknown:unknown:{e}" for e in ends),
            "instance-id": vm.name,
            "tpu-env": f"ACCELERATOR_TYPE: '{accelerator}'\nNODE_ID: '{vm.name}'\n"
            f"ZONE: '{vm.zone}'\nWORKER_ID: '{worker}'\n"
            f"CONSUMER_PROJECT_ID: '{PROJECT}'\n",
        } | node.get("metadata", {})  # fmt: skip
        account = "instance/service-accounts/default"
        token = {"access_token": "fake", "expires_in": 3599, "token_type": "Bearer"}
        return {f"instance/attributes/{k}": v for k, v in attributes.items()} | {
            "project/project-id": PROJECT,
            "project/numeric-project-id": NUMBER,
            "instance/name": f"t1v-n-{vm.incarnation}-w-{worker}",
            "instance/id": str(1000 * len(vm.name) + worker),
            "instance/zone": f"projects/{NUMBER}/zones/{vm.zone}",
            "instance/preempted": "TRUE" if vm.preempted else "FALSE",
            "instance/maintenance-event": "NONE",
            f"{account}/token": token,
            f"{account}/email": f"{NUMBER}-compute@developer.gserviceaccount.com",
            f"{account}/scopes": "https://www.googleapis.com/auth/cloud-platform\n",
        }

    def _write_programs(self) -> None:
        for part in ("home/.ssh", "gcloud", "bin", "site"):
            (self.folder / part).mkdir(parents=True, exist_ok=True)
        key = self.folder / "home" / ".ssh" / "google_compute_engine"
        if shutil.which("ssh-keygen") and not key.exists():
            command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "t"]
            subprocess.run([*command, "-f", str(key)], check=True)
        remote = self.folder / "remote.py"
        remote.write_text(REMOTE.replace("PORT", str(self.port)))
        python = shlex.quote(sys.executable)
        for program in ("ssh", "scp"):
            command = f"{python} -IS {shlex.quote(str(remote))} {program}"
            text = f'#!/bin/sh\nexec {command} "$@"\n'
            write_program(self.folder / "bin" / program, text)
        real = shutil.which("gcloud")
        if real is None:
            return
        command = f'exec {shlex.quote(real)} "$@"'
        if self.warm:
            (client := self.folder / "client.py").write_text(CLIENT)
            socket = shlex.quote(str(warm_gcloud(real)))
            command = f'exec {python} -IS {shlex.quote(str(client))} {socket} "$@"'
        (self.folder / "site" / "sitecustomize.py").write_text(SITE)
        lines = [
            "#!/bin/sh",
            f"export CLOUDSDK_PYTHON_SITEPACKAGES=1 FAKE_CLOUD_HURRY={self.hurry}",
            f"export PYTHONPATH={shlex.quote(str(self.folder / 'site'))}",
            command,
        ]
        write_program(self.folder / "bin" / "gcloud", "\n".join(lines) + "\n")


_warm: dict[str, Path] = {}  # by the real gcloud's path: where its process listens


def warm_gcloud(real: str) -> Path:
    """The socket of a gcloud that is loaded; it ends with this process."""
    if real not in _warm:
        folder = Path(tempfile.mkdtemp(prefix="warm-gcloud-"))
        (folder / "sitecustomize.py").write_text(SITE)
        env = {k: v for k, v in os.environ.items() if not k.startswith("CLOUDSDK_")}
        env |= {
            "CLOUDSDK_CONFIG": str(folder / "config"), "PYTHONPATH": str(folder),
            "CLOUDSDK_PYTHON_SITEPACKAGES": "1", "HOME": str(folder),
            "CLOUDSDK_CORE_DISABLE_USAGE_REPORTING": "true",
            "CLOUDSDK_CORE_CHECK_GCE_METADATA": "false",
            "CLOUDSDK_CORE_DISABLE_FILE_LOGGING": "true",
            "FAKE_CLOUD_SOCKET": str(folder / "socket"),
        }  # fmt: skip
        log = open(folder / "log", "wb")
        process = subprocess.Popen(
            [real], env=env, stdin=subprocess.PIPE, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip

        def end() -> None:
            assert process.stdin is not None
            process.stdin.close()  # which it takes for the end
            process.wait()
            shutil.rmtree(folder, ignore_errors=True)

        atexit.register(end)
        _warm[real] = folder / "socket"
    return _warm[real]


def check(key: tuple[str, str], body: Any) -> None:
    """Refuses what the service would."""
    if not NAME.fullmatch(key[1]):
        raise Refused(400, f"Invalid node ID {key[1]!r}")
    accelerator, runtime = body.get("acceleratorType"), body.get("runtimeVersion")
    if accelerator not in TYPES:
        raise Refused(400, f"Invalid accelerator type {accelerator!r}")
    if runtime not in RUNTIMES:
        raise Refused(400, f"Invalid runtime version {runtime!r}")
    for label, value in body.get("labels", {}).items():
        if not (
            LABEL.fullmatch(label) and LABEL.fullmatch(value) and label[0].isalpha()
        ):
            raise Refused(400, f"Invalid label {label}={value}")


def describe(key: tuple[str, str], body: dict, vm: VM, queue: str) -> dict:
    """The node that the service would make of this body."""
    ends = [
        {
            "ipAddress": "10.0." + ".".join(address.split(".")[2:]), "port": 8470,
            "accessConfig": {"externalIp": address},
        }
        for address in vm.addresses
    ]  # fmt: skip
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    node = body | {
        "name": resource(key, "nodes"), "id": str(uuid.uuid4().int >> 66),
        "apiVersion": "V2", "state": "CREATING", "health": "HEALTHY",
        "createTime": stamp, "networkEndpoints": ends,
    }  # fmt: skip
    return node | ({"queuedResource": queue} if queue else {})


def resource(key: tuple[str, str], kind: str) -> str:
    return f"projects/{PROJECT}/locations/{key[0]}/{kind}/{key[1]}"


def attribute(namespace: str, key: str, value: str) -> dict[str, str]:
    return {"namespace": namespace, "key": key, "value": value}


class Answers(http.server.BaseHTTPRequestHandler):
    """Requests with or without JSON, answered by `answer`."""

    protocol_version = "HTTP/1.1"

    def answer(self, method: str, url: str, body: Any) -> tuple[int, Any]:
        raise NotImplementedError

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (ConnectionError, BrokenPipeError):  # the client was killed
            self.close_connection = True

    def _do(self) -> None:
        text = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            body = json.loads(text) if text else None
        except ValueError:
            body = text.decode(errors="replace")
        status, answer = self.answer(self.command, self.path, body)
        plain = isinstance(answer, str)
        data = (answer if plain else json.dumps(answer)).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain" if plain else "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Metadata-Flavor", "Google")
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_DELETE = do_PATCH = do_PUT = _do

    def log_message(self, format: str, *args: Any) -> None:
        pass


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


def serve(handler: type[http.server.BaseHTTPRequestHandler]) -> Server:
    server = Server(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    return server


def find(mark: str) -> Iterator[int]:
    """The processes whose LM_SCALE_SANDBOX begins so."""
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != os.getpid() and marked(int(entry), mark):
            yield int(entry)


def marked(pid: int, mark: str) -> bool:
    try:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:  # it has ended, or is another's
        return False
    return any(v.startswith(f"LM_SCALE_SANDBOX={mark}".encode()) for v in variables)


def kill(pid: int, mark: str) -> None:
    """Kills it if it still is that process."""
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        if marked(pid, mark):
            signal.pidfd_send_signal(process, signal.SIGKILL)
    except ProcessLookupError:
        pass
    finally:
        os.close(process)


def write_program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


NOT_HERE = """\
#!/bin/sh
echo "$(basename "$0"): not in the fake cloud" >&2
exit 1
"""
SUDO = """\
#!/bin/bash
while [[ ${1:-} == -* ]]; do
  case $1 in -u | -g) shift 2 ;; --) shift; break ;; *) shift ;; esac
done
exec env "$@"
"""
POWER_OFF = """\
#!/bin/bash
if [[ " $* " == *" -c "* ]]; then exit 0; fi
exec curl -s -X POST -d "\\"$(basename "$0") $*\\"" http://%(url)s/sandbox/%(ip)s/off
"""
DF_FULL = """\
#!/bin/sh
echo "Filesystem 1024-blocks Used Available Capacity Mounted on"
echo "/dev/root 101430960 101430960 0 100% /"
"""

# The stub ssh and scp. Only what starts fast is imported.
REMOTE = r'''
"""ssh and scp to the workers of a fake cloud: runs in their sandboxes here."""
import os, subprocess, sys, threading
from json import dumps, loads
from socket import create_connection

ARGUMENT = {"ssh": "bcDEeFIiJLlmOopQRSWw", "scp": "cFiJloPSX"}  # options that have one


def parse(program, argv):
    flags, rest = set(), []
    while argv:
        first = argv.pop(0)
        if first == "--":
            break
        if not first.startswith("-"):
            rest.append(first)
            if program == "ssh":
                if argv and argv[0] == "--":
                    argv.pop(0)
                break
            continue
        letters = first[1:]
        for place, letter in enumerate(letters):
            flags.add(letter)
            if letter in ARGUMENT[program]:
                if place == len(letters) - 1:
                    argv.pop(0)
                break
    return flags, rest + argv


def ask(address, text=""):
    body = dumps(text).encode()
    with create_connection(("127.0.0.1", PORT)) as line:
        head = f"POST /sandbox/{address} HTTP/1.0\r\n"
        head += f"Content-Length: {len(body)}\r\n\r\n"
        line.sendall(head.encode() + body)
        answer = b"".join(iter(lambda: line.recv(65536), b""))
    return loads(answer.partition(b"\r\n\r\n")[2])


def reach(address, text=""):
    worker = ask(address, text)
    if not worker["reachable"]:
        message = f"ssh: connect to host {address} port 22: Connection timed out"
        print(message, end="\r\n", file=sys.stderr, flush=True)
        sys.exit(255)
    return worker


def pump(source, sink):
    """Copies as data come, as ssh does; closes the sink at the end."""
    try:
        while data := os.read(source, 65536):
            while data:
                data = data[os.write(sink, data):]
    except OSError:
        pass
    if sink > 2:
        os.close(sink)


def ssh(argv):
    _, (host, *words) = parse("ssh", argv)
    address = host.rpartition("@")[2]
    command = " ".join(words)
    worker = reach(address, f"ssh {command}")
    child = subprocess.Popen(
        ["bash", "-c", command] if command else ["bash", "-l"],
        cwd=worker["home"], env=worker["env"], start_new_session=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )
    threading.Thread(
        target=pump, args=(0, os.dup(child.stdin.fileno())), daemon=True
    ).start()
    child.stdin.close()
    readers = [
        threading.Thread(target=pump, args=(source.fileno(), sink), daemon=True)
        for source, sink in ((child.stdout, 1), (child.stderr, 2))
    ]
    for reader in readers:
        reader.start()
    if not ask(address)["reachable"]:  # it went as we came
        child.kill()
    status = child.wait()
    if status < 0 and not ask(address)["reachable"]:
        message = f"Connection to {address} closed by remote host."
        print(message, end="\r\n", file=sys.stderr, flush=True)
        os._exit(255)
    for reader in readers:  # as sshd, till nobody holds the output any more
        reader.join()
    os._exit(255 if status < 0 else status)  # 255: what ssh says of a signal


def split(name):
    """(address, path) of what is remote, else ("", name)."""
    host, colon, path = name.partition(":")
    if not colon or "/" in host:
        return "", name
    return host.rpartition("@")[2], path


def place(worker, path):
    home = worker["home"]
    path = home + path[1:] if path == "~" or path.startswith("~/") else path
    full = os.path.normpath(os.path.join(home, path))
    if not (full + "/").startswith(worker["root"] + "/"):
        sys.exit(f'scp: dest open "{path}": Permission denied (outside the sandbox)')
    return full


def copy(source, target, recursive):
    if os.path.isdir(target):
        target = os.path.join(target, os.path.basename(source.rstrip("/")))
    if not os.path.isdir(source):
        return copy_file(source, target)
    if not recursive:
        sys.exit(f"scp: {source}: not a regular file")
    os.makedirs(target, exist_ok=True)
    for name in sorted(os.listdir(source)):
        copy(os.path.join(source, name), target, True)


def copy_file(source, target):
    """A new file gets the mode of the old one, less the usual mask."""
    try:
        with open(source, "rb") as old:
            mode = os.stat(source).st_mode & 0o777 & ~0o022
            new = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
            while data := old.read(1 << 20):
                while data:
                    data = data[os.write(new, data):]
            os.close(new)
    except OSError as error:
        sys.exit(f"scp: {error.filename or target}: {error.strerror}")


def scp(argv):
    flags, (*sources, target) = parse("scp", argv)
    address, path = split(target)
    text = f"scp {' '.join(sources)} {path}"
    if address:
        worker = reach(address, text)
        if worker["full"]:
            sys.exit(f'scp: write remote "{path}": No space left on device')
        if len(sources) > 1 and not os.path.isdir(place(worker, path)):
            sys.exit(f"scp: {path}: Not a directory")
        if path.endswith("/") and not os.path.isdir(place(worker, path)):
            sys.exit(f'scp: dest open "{path}": No such file or directory')
    for source in sources:
        if address:
            copy(source, place(worker, path), "r" in flags)
        else:
            where, path = split(source)
            copy(place(reach(where, text), path), target, "r" in flags)


{"ssh": ssh, "scp": scp}[sys.argv[1]](sys.argv[2:])
'''

# Imported by gcloud's own Python before anything of gcloud: cuts its sleeps and, in the
# process that is to stay warm, loads gcloud and forks for each command that comes.
SITE = r'''
import os, time

_sleep = time.sleep
time.sleep = lambda s: _sleep(s / int(os.environ.get("FAKE_CLOUD_HURRY", "1")))


def serve(path):
    import json, select, signal, socket, sys, threading

    program = next(a for a in sys.orig_argv if a.endswith("gcloud.py"))
    sys.argv = [program]
    sys.path.insert(0, os.path.dirname(program))
    sys.path.insert(0, os.path.join(os.path.dirname(program), "third_party"))
    from googlecloudsdk import gcloud_main
    from googlecloudsdk.api_lib.util import apis
    from googlecloudsdk.command_lib.util.ssh import ssh
    from googlecloudsdk.core import config, log

    for api in (("tpu", "v2"), ("compute", "v1")):
        apis.GetMessagesModule(*api), apis.GetClientClass(*api)
    cli = gcloud_main.CreateCLI([])
    tpu_vm = ["create", "delete", "describe", "list", "scp", "ssh", "stop"]
    commands = [("tpu-vm", verb) for verb in tpu_vm]
    commands += [("queued-resources", verb) for verb in tpu_vm[:4]]
    for group, verb in commands:  # a mistake, so that it only loads the modules
        sys.argv = [program, "compute", "tpus", group, verb, "--no-such-flag"]
        try:
            cli.Execute()
        except SystemExit:
            pass
    sys.stdout.flush()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the children
    server = socket.socket(socket.AF_UNIX)
    server.bind(path + ".new")
    server.listen(64)
    os.rename(path + ".new", path)

    def watch(line):
        """Hands on the client's signals; ends with the client."""
        while number := line.recv(1):
            number = number[0]
            (os.killpg if number == signal.SIGINT else os.kill)(os.getpid(), number)
        os.killpg(0, signal.SIGKILL)

    def work(line):
        os.setpgid(0, 0)
        data, fds, _, _ = socket.recv_fds(line, 1 << 20, 3)
        size, _, data = data.partition(b" ")
        while len(data) < int(size):
            data += line.recv(1 << 20)
        told = json.loads(data)
        for number, fd in enumerate(fds):
            os.dup2(fd, number)
            os.close(fd)
        for number in (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ.clear()
        os.environ.update(told["env"])
        os.chdir(told["cwd"])
        sys.argv = [program, *told["argv"]]
        log.AddFileLogging(config.Paths().logs_dir)
        hosts = os.path.expanduser("~/.ssh/google_compute_known_hosts")
        ssh.KnownHosts.DEFAULT_PATH = hosts
        threading.Thread(target=watch, args=(line,), daemon=True).start()
        status = 1
        try:
            gcloud_main.main(cli)
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(bool(end.code))
        except KeyboardInterrupt:
            status = 130
        except BaseException:
            sys.excepthook(*sys.exc_info())
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:
                pass
        line.sendall(bytes([status & 255]))
        os._exit(0)

    while True:
        ready, _, _ = select.select([server, 0], [], [])
        if 0 in ready:
            os._exit(0)
        line, _ = server.accept()
        if os.fork() == 0:
            server.close()
            work(line)
        line.close()


if "FAKE_CLOUD_SOCKET" in os.environ:
    serve(os.environ.pop("FAKE_CLOUD_SOCKET"))
'''

# What stands for `gcloud` then: hands on its arguments, environment, streams, signals.
CLIENT = r"""
import os, signal, sys, time
from json import dumps
from socket import AF_UNIX, send_fds, socket

line = socket(AF_UNIX)
for _ in range(6000):  # it takes seconds to load
    try:
        line.connect(sys.argv[1])
        break
    except OSError:
        time.sleep(0.01)
else:
    sys.exit("the warm gcloud did not start: see " + os.path.dirname(sys.argv[1]))
told = {"argv": sys.argv[2:], "cwd": os.getcwd(), "env": dict(os.environ)}
data = dumps(told).encode()
data = b"%d " % len(data) + data
got = None


def forward(number, frame):
    global got
    got = number
    line.sendall(bytes([number]))


for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, forward)
sent = send_fds(line, [data], [0, 1, 2])
line.sendall(data[sent:])
answer = line.recv(1)
if answer:
    os._exit(answer[0])
if got:  # it died of it
    signal.signal(got, signal.SIG_DFL)
    os.kill(os.getpid(), got)
sys.exit("the warm gcloud died")
"""
