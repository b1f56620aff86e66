# SPDX-License-Identifier: Apache-2.0
"""A run as a batch script of Slurm, which requeues itself until the run is done."""

import argparse
import hashlib
import os
import re
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

from launch.errors import Refused
from launch.slurm_jobs import PREFIX

ROOT = Path(__file__).resolve().parents[1]


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
for pause in 1 5 20 0; do # a controller that is busy answers later
  job=" $(scontrol show job --oneliner "$SLURM_JOB_ID" | head -n 1) "
  case $job in *" JobState="*) break ;; esac
  sleep "$pause"
done
state=${{job##* JobState=}} state=${{state%% StartTime=*}}
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
  say "stopped; the job was cancelled ($state)"
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
