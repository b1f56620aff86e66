# SPDX-License-Identifier: Apache-2.0
# shellcheck shell=bash
#
# Makes lm_scale's virtual environment, or finds it made already: then it costs a
# fraction of a second. Sourced by launch/quickstart, tests/run and .ci/run, which set
# `root`, the repository's absolute path, and call `setup_venv [EXTRA...]`.
#
# In:  PYTHON         the Python to use (else the first on PATH that is new enough)
#      LM_SCALE_VENV  where the environment goes, from the root (default .venv)
# Out: venv_python    the environment's Python
#      NPROC          exported, see below
#
# Two files inside the environment say how far it got. lm_scale.stamp: on its first
# line what was installed, on its second the extras. lm_scale.unfinished: it is being
# made; where that outlives the command, something interrupted it.

# With fewer threads than simulated devices, jax 0.10.2's collectives deadlock on CPU.
# XLA reads NPROC, once, when jax is imported.
cores=$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)
export NPROC="${NPROC:-$((cores > 16 ? cores : 16))}"

say() { printf 'lm_scale: %s\n' "$*" >&2; }
die() {
  say "$@"
  exit 1
}

setup_venv() { # EXTRA...
  venv=${LM_SCALE_VENV:-.venv}
  case $venv in /*) ;; *) venv=$root/$venv ;; esac
  venv_python=$venv/bin/python
  stamp=$venv/lm_scale.stamp
  unfinished=$venv/lm_scale.unfinished
  keep_or_make_venv
  install_extras "$@"
}

# PYTHON -> "3.11.7 /path/of/it". Inside a virtual environment, the path of the Python
# that made it, which stays when the environment goes. Fails if it does not run: a
# pyenv shim, for one, can exist and not run.
describe_python() {
  "$1" -c 'import sys
print("%d.%d.%d" % sys.version_info[:3] + " " +
      (getattr(sys, "_base_executable", None) or sys.executable))' \
    2>/dev/null </dev/null
}

new_enough() { # VERSION
  local major=${1%%.*} minor=${1#*.}
  minor=${minor%%.*}
  [ "$major" -gt 3 ] || { [ "$major" -eq 3 ] && [ "$minor" -ge 11 ]; }
}

# Sets base_python and base_version: the Python that an environment is made with.
find_python() {
  local candidate seen=''
  if [ -n "${PYTHON:-}" ]; then
    read -r base_version base_python <<<"$(describe_python "$PYTHON")"
    [ -n "$base_version" ] || die "PYTHON=$PYTHON does not run;" \
      "set it to a Python 3.11 or later, or leave it unset."
    new_enough "$base_version" || die "PYTHON=$PYTHON is Python $base_version," \
      "but lm_scale needs 3.11 or later; set it to a newer one, or leave it unset."
    return
  fi
  for candidate in python3 python3.14 python3.13 python3.12 python3.11 python; do
    command -v "$candidate" >/dev/null || continue
    read -r base_version base_python <<<"$(describe_python "$candidate")"
    if [ -n "$base_version" ] && new_enough "$base_version"; then return; fi
    seen="$seen${seen:+, }$candidate (${base_version:-does not run})"
  done
  say "no Python 3.11 or later on PATH; found: ${seen:-none at all}."
  die "Install one ('apt install python3 python3-venv', 'brew install python'," \
    "'pyenv install 3.12', python.org), or name one: PYTHON=/path/to/python3.12"
}

# Leaves a virtual environment with a Python that runs and is new enough in $venv.
keep_or_make_venv() {
  local version why=''
  if [ -n "${PYTHON:-}" ]; then find_python; fi
  if [ -f "$unfinished" ]; then
    why='was not finished'
  elif [ -f "$venv/pyvenv.cfg" ]; then
    version=$(describe_python "$venv_python") || true
    version=${version%% *}
    if [ -z "$version" ]; then
      why='has a Python that does not run'
    elif ! new_enough "$version"; then
      why="has Python $version"
    elif [ -n "${PYTHON:-}" ] && [ "${version%.*}" != "${base_version%.*}" ]; then
      why="has Python $version, and PYTHON is $base_version"
    else
      return 0
    fi
  elif [ -e "$venv" ] && [ -n "$(ls -A "$venv")" ]; then
    die "$venv is not a virtual environment (it holds no pyvenv.cfg), so it is" \
      "left alone; move it away, or set LM_SCALE_VENV to another path."
  fi

  [ -n "${PYTHON:-}" ] || find_python
  "$base_python" -c 'import ensurepip, venv' 2>/dev/null </dev/null ||
    die "$base_python (Python $base_version) lacks the modules venv and ensurepip; on" \
      "Debian and Ubuntu: apt install python3-venv (or python${base_version%.*}-venv)"
  [ -z "$why" ] || say "$venv $why: making it again"
  # Only what an environment consists of, so that a wrong path costs little.
  rm -rf "$venv"/{bin,include,lib,lib64,share,pyvenv.cfg,lm_scale.stamp}
  mkdir -p "$venv"
  : >"$unfinished"
  "$base_python" -m venv "$venv" </dev/null ||
    die "$base_python could not make the virtual environment $venv"
}

# Installs lm_scale, editable, with the extras asked for and those already there.
install_extras() { # EXTRA...
  local key old_key='' extras='' extra missing=''
  key="$(cksum <"$root/setup.py") $(describe_python "$venv_python") $root"
  if [ -f "$stamp" ]; then
    { read -r old_key && read -r extras; } <"$stamp" || true
  fi
  for extra in "$@"; do
    case ",$extras," in *",$extra,"*) continue ;; esac
    extras="$extras${extras:+,}$extra"
    missing=yes
  done
  if [ "$key" = "$old_key" ] && [ -z "$missing" ]; then return; fi

  say "installing lm_scale${extras:+[$extras]} in $venv" \
    "(the first time takes some minutes)"
  : >"$unfinished"
  trap 'exit 130' INT # else a ^C, which pip turns into a plain failure, goes on below
  if ! pip_install -e "$root${extras:+[$extras]}"; then
    # What an earlier run installed whole still serves: pip puts back what it failed
    # to replace.
    [ ! -f "$stamp" ] || rm -f "$unfinished"
    die "pip could not install what lm_scale needs (its message is above);" \
      "mend that and run the same command again."
  fi
  trap - INT
  printf '%s\n%s\n' "$key" "$extras" >"$stamp"
  rm -f "$unfinished"
}

# pip's warnings, of retries and odd mirrors, are noise unless it fails in the end.
pip_install() { # ARGUMENT...
  local log=$venv/lm_scale.pip.log
  # An environment that others made, uv for one, may have no pip.
  {
    "$venv_python" -m pip --version || "$venv_python" -m ensurepip
  } >"$log" 2>&1 </dev/null &&
    "$venv_python" -m pip install --quiet --no-input --disable-pip-version-check \
      "$@" >"$log" 2>&1 </dev/null && return
  cat "$log" >&2
  return 1
}
