#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Trains on a Slurm cluster: renders a batch script, submits it, follows the job.

    launch/slurm.py train configs/x.py --nodes 2 --gpus-per-node 8 --time 24:00:00
    launch/slurm.py train configs/x.py --name lr3 -- --schedule.peak 3e-4
    launch/slurm.py render configs/x.py ...      # prints the script, submits nothing
    launch/slurm.py list | status NAME | logs NAME -f | down NAME

Before the time limit, and when it is preempted, the job saves and goes back into the
queue, to go on where it stopped. Logs are in runs/NAME/slurm. NAME may be a job's
number. Start it where sbatch is, in a folder that all nodes share. Needs nothing but
Python.
"""

import argparse
import fcntl
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launch.command_line import cut, parser_of  # noqa: E402
from launch.errors import Failed, Refused  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
PREFIX = "lm_scale."  # of the names of our jobs: no other is shown, or ended
POLL = 1.0  # s between looks at a log; the queue is asked every tenth time
# These go to the job by a file of mode 0600 in the run's folder, which only its tasks
# read and the job removes when it ends. All others go as Slurm's users are used to
# (--export=ALL). With that, sbatch's environment is sent over the network, kept in the
# controller's and the node's spool folders and, where AccountingStoreFlags has job_env,
# for ever in the accounting database: no place for a secret.
SECRET = re.compile(r".*(KEY|KEY_ID|TOKEN|SECRET|PASSWORD|PASSWD)", re.IGNORECASE)


def main(argv: list[str] | None = None) -> int:
    options = parse(sys.argv[1:] if argv is None else argv)
    try:
        return options.verb(options)
    except (Refused, Failed) as error:
        print(f"launch/slurm.py: {error}", file=sys.stderr)
        return 2 if isinstance(error, Refused) else 1


# --- Options --------------------------------------------------------------------------


def parse(argv: list[str]) -> argparse.Namespace:
    own, fields = cut(argv)
    parser = parser_of("launch/slurm.py", __doc__)
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    train_verb = verbs.add_parser("train", help="submit a job that trains CONFIG")
    add_train_options(train_verb)
    train_verb.add_argument(
        "--dry-run", action="store_true", help="print the script, submit nothing"
    )
    train_verb.set_defaults(verb=train)
    render_verb = verbs.add_parser("render", help="the same as train --dry-run")
    add_train_options(render_verb)
    render_verb.set_defaults(verb=train, dry_run=True)

    list_verb = verbs.add_parser("list", help="our jobs that are queued or running")
    list_verb.set_defaults(verb=list_jobs)
    status_verb = verbs.add_parser("status", help="what a job does, or did")
    status_verb.add_argument("job", metavar="NAME|JOB")
    status_verb.set_defaults(verb=status)
    logs_verb = verbs.add_parser("logs", help="a job's log")
    logs_verb.add_argument("job", metavar="NAME|JOB")
    logs_verb.add_argument(
        "-f", "--follow", action="store_true", help="until the job has ended"
    )
    logs_verb.set_defaults(verb=logs)
    down_verb = verbs.add_parser("down", help="end a job: saved, and for good")
    down_verb.add_argument("job", metavar="NAME|JOB", nargs="?")
    down_verb.add_argument("--all", action="store_true", help="all our jobs")
    down_verb.add_argument(
        "--grace", type=int, default=120, metavar="S",
        help="seconds that it has to save; 0: cancel at once (120)",
    )  # fmt: skip
    down_verb.set_defaults(verb=down)

    options = parser.parse_args(own)
    if fields and options.verb is not train:
        parser.error(f"nothing can follow -- here, but there is {shlex.join(fields)}")
    options.fields = fields
    return options


def add_train_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    parser.epilog = "After --: fields of the config, such as -- --steps 1000"
    add("config", metavar="CONFIG", help="a config file, such as configs/llama_160m.py")
    add("--name", help="names the job and its run_dir, runs/NAME (CONFIG's own)")
    add("--nodes", type=number_from(1), default=1, help="(1)")
    add("--gpus-per-node", default="0", metavar="[TYPE:]N", help="0: CPUs (0)")
    add("--tasks-per-node", type=number_from(1), default=1, metavar="N",
        help="processes a node; a single one takes all its GPUs (1)")  # fmt: skip
    add("--cpus-per-task", type=number_from(1), metavar="N")
    add("--mem", help="memory a node, such as 64G")
    add("--time", help="the limit, such as 24:00:00; then it is queued again")
    for name in ("partition", "account", "qos", "constraint"):
        add(f"--{name}")
    add("--sbatch", action="append", default=[], metavar="=OPTION",
        help="another line #SBATCH OPTION, such as --sbatch=--exclusive")  # fmt: skip
    add("--setup", action="append", default=[], metavar="FILE|COMMAND",
        help="run first on the first node, such as 'module load cuda'")  # fmt: skip
    add("--python", help="of the environment with lm_scale (the checkout's .venv)")
    add("--stop-before", type=number_from(1, 65535), default=120, metavar="S",
        help="training stops, to save, S seconds before the limit (120)")  # fmt: skip
    add("--requeues", type=number_from(0), default=50, metavar="N",
        help="how often the job goes back into the queue (50)")  # fmt: skip


def number_from(least: int, most: int | None = None):
    def convert(text: str) -> int:
        number = int(text) if re.fullmatch(r"\d{1,9}", text) else -1
        if number < least or (most is not None and number > most):
            limit = "on" if most is None else f"to {most}"
            raise argparse.ArgumentTypeError(
                f"{text!r}: expected a number from {least} {limit}"
            )
        return number

    return convert


@dataclass(frozen=True)
class Run:
    """What is submitted, checked."""

    name: str
    folder: Path  # of its logs
    python: str
    arguments: list[str]  # of `lm-scale train`
    directives: list[str]  # of sbatch
    code: str

    @property
    def secrets(self) -> Path:
        return self.folder / "secrets.sh"


def checked(options: argparse.Namespace) -> Run:
    if not Path(options.config).is_file():
        raise Refused(f"there is no config file {options.config}.")
    name = options.name or Path(options.config).stem
    if not re.fullmatch(r"[A-Za-z0-9_][\w.-]{0,63}", name, re.ASCII) or name.isdigit():
        raise Refused(
            f"the name is {name!r}: expected at most 64 letters, digits and _ . - (not "
            f"only digits), since a job and a folder get it; choose one by --name."
        )
    fields = options.fields
    if options.name and not any(re.match("--run[-_]dir(=|$)", x) for x in fields):
        fields = ["--run-dir", f"runs/{name}", *fields]
    check_time(options.time, options.stop_before)
    folder = Path.cwd() / "runs" / name / "slurm"
    return Run(
        name, folder, find_python(options.python), [options.config, *fields],
        directives(options, name, folder), code_identity(),
    )  # fmt: skip


def find_python(given: str | None) -> str:
    if given is None:
        python = ROOT / ".venv" / "bin" / "python"
        if not python.exists():
            raise Refused(
                f"{python} is missing: make it with {ROOT}/tests/run or "
                f"{ROOT}/launch/quickstart, or name the Python of an environment with "
                f"lm_scale by --python."
            )
        return str(python)
    # Not resolved: the link inside an environment is what makes it that environment.
    return os.path.abspath(given) if "/" in given else given


def check_time(text: str | None, lead: int) -> None:
    """Slurm's forms: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S."""
    if text is None or text.upper() in ("UNLIMITED", "INFINITE"):
        return
    form = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if not form:
        raise Refused(f"--time {text!r}: expected [DAYS-]HOURS:MINUTES:SECONDS.")
    days, *given = form.groups()
    parts = [int(part) for part in given if part is not None]
    units = [3600, 60, 1] if days or len(parts) == 3 else [60, 1]
    seconds = int(days or 0) * 86400
    seconds += sum(part * unit for part, unit in zip(parts, units, strict=False))
    if 0 < seconds < lead + 60:
        raise Refused(
            f"--time {text} is {seconds} s, of which the last {lead} are for saving: "
            f"no time to train; raise it, or lower --stop-before."
        )


def directives(options: argparse.Namespace, name: str, folder: Path) -> list[str]:
    gpus = re.fullmatch(r"([\w.-]+:)?(\d+)", options.gpus_per_node, re.ASCII)
    if not gpus:
        raise Refused(
            f"--gpus-per-node {options.gpus_per_node!r}: expected a number or "
            f"TYPE:NUMBER, such as 8 or a100:4; 0 for CPUs."
        )
    settings = {
        "job-name": PREFIX + name,
        "output": str(folder).replace("%", "%%") + "/%j.log",
        "open-mode": "append",  # a job that was queued again keeps its number and log
        "chdir": str(Path.cwd()),
        "export": "ALL",
        "nodes": options.nodes,
        "ntasks-per-node": options.tasks_per_node,
        "gpus-per-node": options.gpus_per_node if int(gpus[2]) else None,
        "cpus-per-task": options.cpus_per_task,
        "mem": options.mem,
        "time": options.time,
        "partition": options.partition,
        "account": options.account,
        "qos": options.qos,
        "constraint": options.constraint,
        # To the tasks, not to the script, which has to outlive them.
        "signal": f"TERM@{options.stop_before}",
    }
    lines = [
        f"--{key}={directive_value(key, str(value))}"
        for key, value in settings.items()
        if value is not None
    ]
    for extra in options.sbatch:
        if not extra.startswith("-") or not extra.isprintable():
            raise Refused(
                f"--sbatch {extra!r}: expected one option of sbatch, such as "
                f"--sbatch=--exclusive."
            )
    return [*lines, "--requeue", *options.sbatch]


def directive_value(key: str, value: str) -> str:
    """As sbatch reads it: neither as a shell nor to the end of the line."""
    if not value or not value.isprintable() or '"' in value or "\\" in value:
        raise Refused(
            f"{key} = {value!r}: sbatch's directives cannot hold it (empty, or with a "
            f"quotation mark, a backslash or a line's end)."
        )
    return value if re.fullmatch(r"[\w@%+=:,./-]+", value, re.ASCII) else f'"{value}"'


# --- The script -----------------------------------------------------------------------

# What each task runs. One that fails waits before it tells srun, which then ends the
# others: they fail for the same reason in the same moments, and their own statuses
# count (75: all have saved). srun's status is the highest one.
TASK = """\
trap : TERM
if [ -r {secrets} ]; then . {secrets}; fi
"$@"
status=$?
[ "$status" = 0 ] || [ "$SLURM_NTASKS" = 1 ] || sleep 10
exit "$status"
"""

SCRIPT = """\
#!/bin/bash
{directives}
#
# Made by launch/slurm.py of lm_scale.
# Code: {code}

say() {{ printf 'lm_scale: %s %s\\n' "$(date '+%F %T')" "$*"; }}

trap : TERM # Slurm sends it to the tasks, too; this script waits for what they do

code={quoted_code}
starts=$((${{SLURM_RESTART_COUNT:-0}} + 1))
say "job $SLURM_JOB_ID, start $starts, on $SLURM_JOB_NODELIST"
say "code submitted: $code"
{code_now}
[ "$now" = "$code" ] || say "WARNING: code now: $now"

finish() {{ # STATUS: the job has ended for good
  rm -f {secrets}
  say "ended with $1"
  exit "$1"
}}
{setup}
export JAX_PLATFORMS=${{JAX_PLATFORMS:-{platform}}} PYTHONUNBUFFERED=1
srun --export=ALL --kill-on-bad-exit=1{srun_options} \\
  bash -c {task} task \\
  {command}
status=$?

# Only the state tells why they were stopped: a job that was cancelled can be queued
# again, too, and must not be.
job=" $(scontrol show job --oneliner "$SLURM_JOB_ID" | head -n 1) "
restarts=${{job##* Restarts=}}
if [ "${{restarts%% *}}" -ge "$starts" ] 2>/dev/null; then
  say "stopped with $status; Slurm has queued the job again"
  exit "$status"
fi
[ "$status" = 75 ] || finish "$status"
case $job in
*" Requeue=0 "*)
  say "stopped; the job was told not to be queued again"
  finish 75
  ;;
*" JobState=RUNNING "* | *" JobState=COMPLETING Reason=TimeLimit "*) ;;
*)
  say "stopped; the job was cancelled"
  finish 75
  ;;
esac
if [ "$starts" -gt {requeues} ]; then
  say "stopped; it has started $starts times: submit it again to go on"
  finish 75
fi
say "stopped with 75; queued again, to go on"
scontrol requeue "$SLURM_JOB_ID" || finish 75
exit 75
"""

# As `code_identity` has it.
CODE_NOW = """\
now="$(git -C {root} rev-parse HEAD 2>/dev/null || echo unknown)"
diff=$(git -C {root} diff --no-color --no-ext-diff HEAD 2>/dev/null | sha256sum)
[ "$diff" = "$(sha256sum </dev/null)" ] || now="$now and changes ${{diff:0:12}}"
"""


def script(run: Run, options: argparse.Namespace) -> str:
    srun_options = ""
    if options.cpus_per_task:  # srun does not take it over from sbatch since 22.05
        srun_options += f" --cpus-per-task={options.cpus_per_task}"
    if options.nodes * options.tasks_per_node > 1:
        srun_options += " --label"
    secrets = shlex.quote(str(run.secrets))
    command = [run.python, "-m", "lm_scale", "train", *run.arguments]
    gpus = int(options.gpus_per_node.rpartition(":")[2])
    return SCRIPT.format(
        directives="\n".join(f"#SBATCH {line}" for line in run.directives),
        code=run.code,
        quoted_code=shlex.quote(run.code),
        code_now=CODE_NOW.format(root=shlex.quote(str(ROOT))),
        setup="".join(setup_lines(entry) for entry in options.setup),
        platform="cuda" if gpus else "cpu",  # without, no GPU is: train on CPUs
        srun_options=srun_options,
        task=shlex.quote(TASK.format(secrets=secrets)),
        command=shlex.join(command),
        secrets=secrets,
        requeues=options.requeues,
    )


def setup_lines(entry: str) -> str:
    if Path(entry).is_file():
        entry = f". {shlex.quote(os.path.abspath(entry))}"
    failed = shlex.quote(f"failed: {entry}")
    return f"{{\n{entry}\n}} || {{ say {failed}; finish 1; }}\n"


def code_identity() -> str:
    """The commit, and a hash of what differs from it in files that git knows."""
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True)
        diff = subprocess.run(
            [*git, "diff", "--no-color", "--no-ext-diff", "HEAD"], capture_output=True
        ).stdout
    except OSError:
        return "unknown"
    if head.returncode:
        return "unknown"
    changes = f" and changes {hashlib.sha256(diff).hexdigest()[:12]}" if diff else ""
    return head.stdout.decode().strip() + changes


# --- Verbs ----------------------------------------------------------------------------


def train(options: argparse.Namespace) -> int:
    run = checked(options)
    text = script(run, options)
    if options.dry_run:
        print(text, end="")
        return 0
    run.folder.mkdir(parents=True, exist_ok=True)
    with locked(run.folder / "lock"):
        for job in queued():
            if job.name == run.name:
                raise Refused(
                    f"job {job.number} of the name {run.name} is {job.state} already; "
                    f"end it (launch/slurm.py down {job.number}), or choose another "
                    f"--name."
                )
        number = submit(run, text)
    print(f"job {number}, {run.name}: submitted; log {run.folder}/{number}.log")
    print(f"follow it:  launch/slurm.py logs {run.name} -f")
    print(f"end it:     launch/slurm.py down {run.name}")
    return 0


def submit(run: Run, text: str) -> str:
    path = run.folder / "job.sbatch"
    path.write_text(text)
    env, secrets = job_environment(run.directives)
    write_secrets(run.secrets, secrets)
    try:
        answer = slurm("sbatch", "--parsable", str(path), env=env)
    except BaseException:
        run.secrets.unlink(missing_ok=True)
        raise
    return answer.strip().partition(";")[0]


def job_environment(directives: list[str]) -> tuple[dict[str, str], dict[str, str]]:
    """This environment for sbatch, and the secrets that were in it."""
    secrets = {k: v for k, v in os.environ.items() if SECRET.fullmatch(k)}
    # sbatch prefers SBATCH_... to directives: those we give count. SLURM_... is another
    # job's, if this is started in one.
    given = {line[2:].partition("=")[0] for line in directives}
    names = {f"SBATCH_{name.upper().replace('-', '_')}" for name in given}
    names |= {"SBATCH_TIMELIMIT"} if "time" in given else set()
    names |= {"SBATCH_NO_REQUEUE"}
    env = {
        key: value
        for key, value in os.environ.items()
        if key not in names | secrets.keys()
        and (not key.startswith("SLURM_") or key in ("SLURM_CONF", "SLURM_CLUSTERS"))
    }
    return env, secrets


def write_secrets(path: Path, secrets: dict[str, str]) -> None:
    path.unlink(missing_ok=True)
    if secrets:
        mode = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        with os.fdopen(os.open(path, mode, 0o600), "w") as file:
            for name, value in secrets.items():
                if name.isidentifier():  # what a shell can export
                    file.write(f"export {name}={shlex.quote(value)}\n")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Two submissions of a name at once: the second one sees the first one's job."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # a file system without locks
            pass
        yield


def list_jobs(options: argparse.Namespace) -> int:
    jobs = queued()
    for job in jobs:
        print(job.line())
    if not jobs:
        print("no job of ours is queued or running")
    return 0


def status(options: argparse.Namespace) -> int:
    jobs = [job for job in queued() if options.job in (job.name, job.number)]
    for job in jobs:
        print(job.line())
    if jobs:
        return 0
    log = find_log(options.job)
    number, name = log.stem, log.parent.parent.name
    past = accounted(number)
    if past:
        print(f"{number}  {name}  {past}")
        return 0
    lines = log.read_text(errors="replace").splitlines()
    said = [line for line in lines if line.startswith("lm_scale: ")]
    last = said[-1].removeprefix("lm_scale: ") if said else "nothing in its log"
    print(f"{number}  {name}  not queued; {last}")
    return 0


def logs(options: argparse.Namespace) -> int:
    if not options.follow:
        print(find_log(options.job).read_text(errors="replace"), end="")
        return 0
    try:
        return follow(options.job)
    except KeyboardInterrupt:
        print("the job goes on", file=sys.stderr)
        return 130


def follow(wanted: str) -> int:
    """Prints a job's log until the job has ended; a job that waits is told of."""
    position, told = 0, ""
    for turn in range(sys.maxsize):
        if turn % 10 == 0:  # before the log is read: an ended job's is whole then
            jobs = [job for job in queued() if wanted in (job.name, job.number)]
        if jobs and jobs[0].state == "PENDING" and jobs[0].reason != told:
            told = jobs[0].reason
            print(f"{jobs[0].line()}", file=sys.stderr)
        log = log_of(jobs[0]) if jobs else find_log(wanted)
        if log.exists():
            with log.open("rb") as file:
                file.seek(position)
                sys.stdout.write(file.read().decode(errors="replace"))
                sys.stdout.flush()
                position = file.tell()
        if not jobs:
            return 0
        time.sleep(POLL)
    return 0


def down(options: argparse.Namespace) -> int:
    if bool(options.job) == options.all:
        raise Refused("expected a job's name or number, or --all.")
    jobs = [x for x in queued() if options.all or options.job in (x.name, x.number)]
    saving = [job for job in jobs if job.state == "RUNNING" and options.grace]
    for job in saving:  # as when it is preempted, but then it is not queued again
        slurm("scontrol", "update", f"JobId={job.number}", "Requeue=0", fail=False)
        slurm("scancel", "--signal=TERM", job.number, fail=False)
    late = wait_for_end(saving, options.grace)
    for job in jobs:
        if job in late:
            print(f"job {job.number}, {job.name}: cancelled after {options.grace} s")
        if job in late or job not in saving:
            slurm("scancel", job.number)
    left = wait_for_end(jobs, 120)
    for job in jobs:
        if job not in left:
            print(f"job {job.number}, {job.name}: ended")
            log_of(job).with_name("secrets.sh").unlink(missing_ok=True)
    if left:
        numbers = ", ".join(job.number for job in left)
        raise Failed(f"cancelled, but still in the queue: {numbers}; see list.")
    if not jobs:
        print("nothing to end: no such job of ours is queued or running")
    return 0


def wait_for_end(jobs: list["Job"], seconds: float) -> list["Job"]:
    """Those that are still there then."""
    deadline = time.monotonic() + seconds
    while True:
        there = {job.number for job in queued()} if jobs else set()
        left = [job for job in jobs if job.number in there]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(POLL)


# --- What Slurm knows -----------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    number: str
    name: str
    state: str
    elapsed: str
    limit: str
    nodes: str
    folder: str  # where it was submitted
    reason: str  # why it waits, or its nodes

    def line(self) -> str:
        used = f"{self.elapsed} of {self.limit}"
        return (
            f"{self.number}  {self.name}  {self.state}  {used}  "
            f"{self.nodes} node{'s' * (self.nodes != '1')}  {self.reason}"
        )


def queued() -> list[Job]:
    """This user's jobs that this program has made, and that have not ended."""
    form = "%i|%j|%T|%M|%l|%D|%Z|%R"
    shown = slurm("squeue", "--noheader", f"--user={os.getuid()}", f"--format={form}")
    rows = [line.split("|", 7) for line in shown.splitlines()]
    return [
        Job(row[0], row[1].removeprefix(PREFIX), *row[2:])
        for row in rows
        if len(row) == 8 and row[1].startswith(PREFIX)
    ]


def log_of(job: Job) -> Path:
    return Path(job.folder) / "runs" / job.name / "slurm" / f"{job.number}.log"


def find_log(wanted: str) -> Path:
    """The newest log, below this folder, of a job's name or number."""
    runs = Path.cwd() / "runs"
    if not re.fullmatch(r"[\w.-]+", wanted):
        raise Refused(f"{wanted!r}: expected a job's name or number.")
    pattern = f"*/slurm/{wanted}.log" if wanted.isdigit() else f"{wanted}/slurm/*.log"
    found = sorted(runs.glob(pattern), key=lambda path: path.stat().st_mtime)
    if not found:
        raise Refused(
            f"no job {wanted} of ours is queued or running, and there is no log "
            f"{runs}/{pattern}: start this where the job was submitted."
        )
    return found[-1]


def accounted(number: str) -> str:
    """What the accounting, if there is one, knows of an ended job."""
    if shutil.which("sacct") is None:
        return ""
    form = "State,ExitCode,Elapsed,End"
    shown = slurm(
        "sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={number}",
        f"--format={form}", fail=False,
    )  # fmt: skip
    return "  ".join(shown.strip().splitlines()[-1:]).replace("|", "  ")


def slurm(*command: str, env: dict[str, str] | None = None, fail: bool = True) -> str:
    """What a program of Slurm prints. Raises Failed with what it complains of."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=env)
    except FileNotFoundError as error:
        raise Refused(
            f"{command[0]} is not on PATH: start this on a machine from which jobs are "
            f"submitted (--dry-run works anywhere)."
        ) from error
    if done.returncode and fail:
        raise Failed(f"{command[0]} failed: {done.stderr.strip() or done.stdout}")
    return done.stdout if not done.returncode else ""


if __name__ == "__main__":
    sys.exit(main())
