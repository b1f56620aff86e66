#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Makes this machine ready to train: what runs on a fresh TPU VM.
#
#   launch/setup_host.sh [EXTRA...]     lm_scale with these extras (tpu gcs)
#
# Run it in an unpacked copy of the repository. Brings a Python where none is new enough
# (through uv: an image of Ubuntu 22.04 has 3.10), makes .venv with launch/venv.sh, and
# writes host.env: the variables that a job needs, LM_SCALE_PYTHON among them, one
# NAME=value a line. May be run again at any time, also twice at once, and after it was
# killed: what is done is not done again. Ends with 0, or with 1 and a last line that
# says what to do.
#
# In:  LM_SCALE_PYTHON  a Python that has all already: then nothing is installed
#      LM_SCALE_LOG     also gets all that is printed (default: setup.log, beside)
#      LM_SCALE_PAUSES  seconds before each further try of a download (5 20 60)
#      PYTHON, LM_SCALE_VENV: see launch/venv.sh
set -euo pipefail
exec </dev/null

root=$(cd -P "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.." && pwd)
# shellcheck source=launch/venv.sh
. "$root/launch/venv.sh"

PAUSES=${LM_SCALE_PAUSES:-5 20 60}
ROOM=6         # GiB that an environment with jax[tpu] may take
LOCK_WAIT=3600 # s for another setup to end
NO_NETWORK='[Rr]esolve host|name resolution|lookup address|[Nn]etwork is unreachable'
NO_NETWORK+='|[Cc]onnection|client error|timed out|[Mm]ax retries|HTTP error (429|5..)'
NO_NETWORK+='|error sending request|No matching distribution'

main() { # EXTRA...
  set -e
  local venv=${LM_SCALE_VENV:-.venv}
  case $venv in /*) ;; *) venv=$root/$venv ;; esac
  say "setting up $root, $(date -u '+%F %T') UTC"
  take_lock "$venv.lock"
  # host.env names our own Python, and a job may run us with what it says.
  if [ "${LM_SCALE_PYTHON:-}" = "$venv/bin/python" ]; then unset LM_SCALE_PYTHON; fi
  if [ -n "${LM_SCALE_PYTHON:-}" ]; then
    python=$LM_SCALE_PYTHON
    check_given_python
  else
    python=$venv/bin/python
    [ -n "${PYTHON:-}" ] || usable_venv "$venv" || usable_python || bring_python
    [ -f "$venv/lm_scale.stamp" ] || need_room
    with_patience make_venv "$@"
  fi
  write_host_env
  say "ready: $python, $SECONDS s"
}

fail() {
  say "setup failed: $*"
  exit 1
}

# One setup at a time. The system drops the lock when the last holder is gone, also a
# pip that has outlived us.
take_lock() { # FILE
  mkdir -p "$(dirname "$1")" 2>/dev/null || fail "cannot write in $(dirname "$1")."
  { exec 9>"$1"; } 2>/dev/null || fail "cannot write $1: $(room "$root")"
  flock -n 9 && return
  say "another setup is at work here: waiting for it"
  flock -w "$LOCK_WAIT" 9 ||
    fail "another setup has held $1 for an hour: see who ('fuser $1'), and end it."
}

check_given_python() {
  local version missing
  version=$(describe_python "$python") ||
    fail "LM_SCALE_PYTHON=$python does not run; unset it, and one is installed."
  new_enough "$version" || fail "LM_SCALE_PYTHON=$python is Python ${version%% *}," \
    "but lm_scale needs 3.11 or later; unset it, and one is installed."
  missing=$("$python" -c 'import importlib.util as util
need = "jax flax optax orbax grain tensorstore transformers datasets tyro rich".split()
print(*[name for name in need if util.find_spec(name) is None])')
  [ -z "$missing" ] || fail "LM_SCALE_PYTHON=$python lacks $missing;" \
    "install lm_scale with it ('pip install $root'), or unset it."
}

# If venv.sh will find no reason to make the environment again; it looks closer.
usable_venv() { # FOLDER
  [ -f "$1/lm_scale.stamp" ] && [ ! -f "$1/lm_scale.unfinished" ] &&
    [ -x "$1/bin/python" ]
}

# If a Python on PATH is new enough, and can make an environment.
usable_python() {
  (find_python && "$base_python" -c 'import ensurepip, venv') >/dev/null 2>&1
}

# Sets PYTHON: one that uv has brought, or had brought before.
bring_python() {
  local version=3.12
  need_room
  find_uv || with_patience install_uv
  find_uv || fail "uv was installed, and cannot be found or run."
  say "no Python 3.11 or later that can make an environment: bringing $version by $uv"
  # Without a link to it in ~/.local/bin: only this tree shall use it.
  UV_PYTHON_INSTALL_BIN=0 with_patience "$uv" python install "$version"
  # Not an environment's Python, which uv would find first, as venv.sh may remake it.
  PYTHON=$(cd / && UV_PYTHON_PREFERENCE=only-managed "$uv" python find --system \
    "$version") || fail "$uv has installed Python $version, and does not find it."
  export PYTHON
}

find_uv() {
  for uv in uv "${HOME:-/nowhere}/.local/bin/uv" "$root/.cache/uv/bin/uv" \
    "$root/.cache/uv-venv/bin/uv"; do
    if "$uv" --version >/dev/null 2>&1; then return; fi
  done
  return 1
}

# Into a folder of its own, which also those Pythons allow that packages of the system
# manage; through an environment where there is no pip.
install_uv() {
  local folder=$root/.cache/uv bare=$root/.cache/uv-venv quiet
  quiet=(--quiet --no-input --disable-pip-version-check)
  command -v python3 >/dev/null || {
    echo "no python3 on PATH to bring another with: apt install python3 python3-pip"
    return 1
  }
  if python3 -m pip --version >/dev/null 2>&1; then
    rm -rf "$folder"
    python3 -m pip install "${quiet[@]}" --target "$folder" uv
  else
    rm -rf "$bare"
    python3 -m venv "$bare" || {
      echo "python3 has no pip and makes no environment: apt install python3-pip"
      return 1
    }
    "$bare/bin/python" -m pip install "${quiet[@]}" uv
  fi
}

# In a shell of its own, as venv.sh ends the shell when it fails.
make_venv() { # EXTRA...
  root=$root bash -euo pipefail -c '. "$root/launch/venv.sh"; setup_venv "$@"' - "$@"
}

# Runs a command, again after a pause while the network seems to be at fault.
with_patience() { # COMMAND...
  local pause output
  for pause in $PAUSES last; do
    # In memory, as the disk may be full.
    output=$("$@" 2>&1 | tee /dev/stderr) && return
    need_room 0
    case $output in
      *'No space left'* | *'Disk quota exceeded'*)
        fail "a disk is full: $(room "$root" "${TMPDIR:-/tmp}")"
        ;;
      *'ermission denied'*) fail "a permission is missing: who owns $root?" ;;
    esac
    [[ $output =~ $NO_NETWORK ]] || fail "see the message above."
    [ "$pause" != last ] || fail "what is needed could not be downloaded, see above." \
      "Has this machine a way out (an external address, or Cloud NAT)? Then run" \
      "the same command again."
    say "a download failed: once more in $pause s"
    sleep "$pause"
  done
}

# Fails if the disk has less than some GiB; 0: if it is full.
need_room() { # [GIB]
  local free
  free=$(df -Pk "$root" | awk 'NR == 2 {print $4}')
  [ "$free" -ge $((${1:-$ROOM} * 1024 * 1024 + 1024)) ] ||
    fail "the disk is too full: $(room "$root")" \
      "An environment takes up to $ROOM GiB."
}

room() { # FOLDER...
  df -Ph "$@" | awk 'NR > 1 && !seen[$6]++ {printf "%s free in %s; ", $4, $6}'
  echo "make room ('du -xh ~ | sort -h | tail' shows what is big) and run it again."
}

# Values are taken as they stand, to the end of the line.
write_host_env() {
  local file=$root/host.env
  { host_env >"$file.part" && mv -f "$file.part" "$file"; } ||
    fail "could not write $file: $(room "$root")"
}

host_env() {
  echo "# written by launch/setup_host.sh"
  echo "LM_SCALE_PYTHON=$python"
  echo TPU_LOG_DIR=disabled # else libtpu's logs fill /tmp
  # A transfer slower than 256 bytes a second for a minute is given up, and tried again:
  # else one that has died can hold a whole slice up.
  echo TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS=60
  echo TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES=256
  # With a TPU, its failure is an error: jax would go on, on the CPU.
  if [ -e /dev/accel0 ] || compgen -G '/dev/vfio/[0-9]*' >/dev/null; then
    echo JAX_PLATFORMS=tpu,cpu
  fi
}

case ${1:-} in
  -h | --help)
    sed -n '3,/^set/{/^set/d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}"
    exit
    ;;
esac
[ $# -gt 0 ] || set -- tpu gcs
log=${LM_SCALE_LOG:-$root/setup.log}
# Through a pipe, whose end bash waits for: the last line is in the log when this ends.
set +e
main "$@" 2>&1 | tee -a "$log"
exit $((PIPESTATUS[0] != 0))
