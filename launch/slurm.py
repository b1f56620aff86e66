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
import os
import re
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launch.command_line import cut, parser_of  # noqa: E402
from launch.errors import Failed, Refused  # noqa: E402
from launch.sbatch import Run, checked, script  # noqa: E402
from launch.slurm_jobs import Job, accounted, find_log, log_of, queued, slurm  # noqa: E402

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


def wait_for_end(jobs: list[Job], seconds: float) -> list[Job]:
    """Those that are still there then."""
    deadline = time.monotonic() + seconds
    while True:
        there = {job.number for job in queued()} if jobs else set()
        left = [job for job in jobs if job.number in there]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(POLL)


if __name__ == "__main__":
    sys.exit(main())
