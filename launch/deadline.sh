#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Deletes this TPU VM at a given time, whatever has become of the launcher.
#
#   deadline.sh set EPOCH --name NAME --zone ZONE [--project P] [--queued]
#                   [--pid-file FILE] [--save-seconds 120]
#   deadline.sh show     what is set, and whether something watches over it
#   deadline.sh clear
#
# EPOCH is in seconds since 1970; `set` again replaces it. With --queued, NAME is that
# of a queued resource and of its TPU. The process whose number FILE holds gets one
# SIGTERM --save-seconds before, so that it can save.
#
# At EPOCH, and each minute from then on until this VM is gone: delete it with gcloud,
# or else with the API and the token of the VM's service account; if neither has been
# accepted three times, also stop it; after five, shut it down (which may not end the
# bill). A systemd service watches over the time, started at boot too; where there is no
# systemd, or no sudo, a detached process. ~/.lm_scale/deadline/deadline.log tells all.
#
# For tests: LM_SCALE_DEADLINE_RETRY (60 s), GCE_METADATA_IP (the metadata server's
# address), CLOUDSDK_API_ENDPOINT_OVERRIDES_TPU (the API's), and LM_SCALE_MACHINE: only
# if that is "Google Compute Engine" units are written, and this machine is shut down.
set -uo pipefail

RETRY=${LM_SCALE_DEADLINE_RETRY:-60}
STOP_AFTER=3 SHUT_DOWN_AFTER=5 GIVE_UP_AFTER=15 # rounds
METADATA=http://${GCE_METADATA_IP:-metadata.google.internal}/computeMetadata/v1
API=${CLOUDSDK_API_ENDPOINT_OVERRIDES_TPU:-https://tpu.googleapis.com/}
UNIT=lm-scale-deadline UNITS=/etc/systemd/system
dir=$HOME/.lm_scale/deadline
settings=$dir/settings log=$dir/deadline.log

main() {
  local verb=${1:-}
  case $verb in
    set) shift && set_deadline "$@" ;;
    show) show ;;
    clear) clear_deadline ;;
    run) watch ;;
    -h | --help) sed -n '3,/^set/{/^set/d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}" ;;
    *) usage "'$verb': expected set, show or clear." ;;
  esac
}

say() { printf 'lm_scale: %s\n' "$*"; }
note() { printf '%(%F %T %Z)T  %s\n' -1 "$*" >>"$log" 2>/dev/null || true; }
usage() {
  say "deadline.sh: $*" >&2
  exit 2
}
fail() {
  say "deadline.sh: $*" >&2
  exit 1
}
seconds() { printf '%(%s)T' -1; }

# --- Setting it -----------------------------------------------------------------------

set_deadline() { # EPOCH OPTION...
  epoch=${1:-} name='' zone='' project='' queued='' pid_file='' save_seconds=120
  watcher='a process that no reboot brings back'
  [[ $epoch =~ ^[0-9]{1,11}$ ]] ||
    usage "'$epoch': expected a time in whole seconds since 1970."
  shift
  while [ $# -gt 0 ]; do
    case $1 in
      --queued) queued=yes && shift && continue ;;
      --name | --zone | --project | --pid-file | --save-seconds) ;;
      *) usage "$1: expected --name, --zone, --project, --queued, --pid-file," \
        "--save-seconds." ;;
    esac
    [ $# -gt 1 ] || usage "$1 needs a value."
    case $1 in
      --name) name=$2 ;;
      --zone) zone=$2 ;;
      --project) project=$2 ;;
      --pid-file) pid_file=$2 ;;
      --save-seconds) save_seconds=$2 ;;
    esac
    shift 2
  done
  [[ $name =~ ^[a-z0-9-]+$ ]] || usage "--name '$name': expected the TPU's name."
  [[ $zone =~ ^[a-z0-9-]+$ ]] || usage "--zone '$zone': expected the TPU's zone."
  [[ $project =~ ^[a-z0-9.:-]*$ ]] || usage "--project '$project': not a project's id."
  [[ $save_seconds =~ ^[0-9]+$ ]] || usage "--save-seconds '$save_seconds': no number."
  [ -n "$project" ] || project=$(own_project)
  write_settings || fail "could not write $settings: is the disk full? Nothing is set."
  check_rights
  if by_systemd; then
    watcher=systemd
    write_settings || fail "could not write $settings: is the disk full?"
  else
    by_process
  fi
  wait_for_watch || fail "nothing watches over the time, so do not train: see $log"
  show
}

write_settings() {
  mkdir -p "$dir" && {
    for key in epoch name zone project queued pid_file save_seconds watcher; do
      printf '%s=%s\n' "$key" "${!key}"
    done >"$settings.part"
  } && mv -f "$settings.part" "$settings" || return
  # A copy of this script: the code's folder may be gone by then, or another version.
  [ "${BASH_SOURCE[0]}" -ef "$dir/deadline.sh" ] || {
    cp "${BASH_SOURCE[0]}" "$dir/deadline.sh.part" &&
      mv -f "$dir/deadline.sh.part" "$dir/deadline.sh"
  }
}

load_settings() {
  local key value
  [ -f "$settings" ] || return
  while IFS='=' read -r key value; do
    printf -v "$key" %s "$value"
  done <"$settings"
}

# A TPU VM belongs to a project of Google's; tpu-env names the user's.
own_project() {
  metadata instance/attributes/tpu-env |
    sed -n "s/^CONSUMER_PROJECT_ID: *'\{0,1\}\([^']*\).*/\1/p"
}

check_rights() {
  local code
  code=$(rest GET "$(path nodes)") && return
  say "warning: this VM's service account cannot see $name through the API ($code)." \
    "Unless gcloud can delete it, the VM will only be shut down, which may not end" \
    "the bill. Create it with --scopes=cloud-platform and a service account with the" \
    "role roles/tpu.admin." >&2
}

on_google() {
  local machine=${LM_SCALE_MACHINE:-}
  [ -n "$machine" ] || machine=$(cat /sys/class/dmi/id/product_name 2>/dev/null)
  [ "$machine" = 'Google Compute Engine' ]
}

by_systemd() {
  on_google && sudo -n true && systemctl show --property=Version || return
  service_unit | sudo -n tee "$UNITS/$UNIT.service" &&
    timer_unit | sudo -n tee "$UNITS/$UNIT.timer" &&
    sudo -n systemctl daemon-reload &&
    sudo -n systemctl enable "$UNIT.service" "$UNIT.timer" &&
    sudo -n systemctl restart "$UNIT.service" "$UNIT.timer" &&
    sudo -n systemctl is-active "$UNIT.service" "$UNIT.timer"
} >/dev/null 2>>"$log"

service_unit() {
  local path=${PATH//%/%%} home=${HOME//%/%%}
  cat <<UNIT
# Written by lm_scale's launch/deadline.sh.
[Unit]
Description=Deletes this TPU VM when its time is up
Wants=network-online.target
After=network-online.target

[Service]
User=$(id -un)
Environment="HOME=$home" "PATH=$path"
ExecStart=/bin/bash "$home/.lm_scale/deadline/deadline.sh" run
Restart=on-failure
RestartSec=10
OOMScoreAdjust=-900

[Install]
WantedBy=multi-user.target
UNIT
}

# The service watches by itself; this starts it, should someone have stopped it.
timer_unit() {
  cat <<UNIT
# Written by lm_scale's launch/deadline.sh.
[Unit]
Description=Starts what deletes this TPU VM when its time is up

[Timer]
OnCalendar=@$epoch
Persistent=true
AccuracySec=1s

[Install]
WantedBy=timers.target
UNIT
}

by_process() {
  if ! watched; then
    setsid nohup bash "$dir/deadline.sh" run </dev/null >>"$log" 2>&1 &
  fi
}

# If a process watches over the time: it holds the lock.
watched() { ! flock -n "$dir/lock" true; }

wait_for_watch() {
  local try
  for ((try = 0; try < 50; try++)); do
    if watched; then return; fi
    sleep 0.1
  done
  return 1
}

show() {
  local left
  load_settings || {
    say "no deadline is set"
    return 1
  }
  left=$((epoch - $(seconds)))
  say "$name ($zone) deletes itself at $(date -u -d "@$epoch" '+%F %T') UTC," \
    "in $((left / 3600)) h $((left % 3600 / 60)) min, watched over by $watcher"
  watched || fail "but it has ended: set it again"
}

clear_deadline() {
  load_settings || watcher=''
  rm -f "$settings" || fail "could not remove $settings"
  if [ "$watcher" = systemd ]; then
    sudo -n systemctl disable --now "$UNIT.service" "$UNIT.timer" >/dev/null 2>&1
    sudo -n rm -f "$UNITS/$UNIT.service" "$UNITS/$UNIT.timer"
  fi
  say "no deadline is set"
}

# --- Watching over it -----------------------------------------------------------------

# Looks each second, so that a new time, or a clock that is set, is minded at once. Must
# not end by itself, whatever fails.
watch() {
  local rounds=0 next=0 told=''
  exec 9>>"$dir/lock"
  flock 9
  while load_settings; do
    if [ "$told" != "$epoch" ]; then
      note "deletes $name ($zone) at $(date -u -d "@$epoch" '+%F %T') UTC"
      told=$epoch rounds=0 next=0
    fi
    if [ "$(seconds)" -lt "$epoch" ]; then
      [ $((epoch - $(seconds))) -gt "$save_seconds" ] || end_training
    elif [ "$(seconds)" -ge "$next" ]; then
      rounds=$((rounds + 1))
      delete "$rounds" 9>&-
      next=$(($(seconds) + RETRY))
    fi
    sleep 1 9>&-
  done
  note "no deadline is set: ending"
}

# Once for a deadline: a second SIGTERM would end it before it has saved.
end_training() {
  local pid done_for='' boot
  { read -r pid <"$pid_file"; } 2>/dev/null || return 0
  [[ $pid =~ ^[0-9]+$ ]] || return 0
  { read -r done_for <"$dir/saved"; } 2>/dev/null
  [ "$done_for" != "$epoch $pid" ] || return 0
  boot=$(awk '$1 == "btime" {print $2}' /proc/stat)
  [ "$(stat -c %Y "$pid_file")" -ge "${boot:-0}" ] || return 0 # another process by now
  echo "$epoch $pid" >"$dir/saved" 2>/dev/null
  kill -TERM "$pid" 2>/dev/null &&
    note "SIGTERM to process $pid: it has $save_seconds s to save"
  return 0
}

delete() { # ROUND
  local accepted='' round=$1
  note "time is up, round $round"
  if by_gcloud delete || by_rest delete; then accepted=yes; fi
  if [ -z "$accepted" ] && [ "$round" -ge "$STOP_AFTER" ]; then
    by_gcloud stop || by_rest stop
  fi
  if { [ -z "$accepted" ] && [ "$round" -ge "$SHUT_DOWN_AFTER" ]; } ||
    [ "$round" -ge "$GIVE_UP_AFTER" ]; then
    shut_down
  fi
}

by_gcloud() { # delete|stop
  if [ "$1" = delete ] && [ -n "$queued" ]; then
    gcloud_tpus queued-resources delete "$name" --force && return
  fi
  gcloud_tpus tpu-vm "$1" "$name"
}

gcloud_tpus() { # ARGUMENT...
  local output status=0
  set -- compute tpus "$@" --async --quiet "--zone=$zone"
  [ -z "$project" ] || set -- "$@" "--project=$project"
  output=$(timeout 120 gcloud "$@" 2>&1 </dev/null) || status=$?
  note "gcloud $*: status $status. ${output:0:500}"
  return "$status"
}

by_rest() { # delete|stop
  if [ "$1" = stop ]; then
    rest POST "$(path nodes):stop" >/dev/null
    return
  fi
  if [ -n "$queued" ]; then
    rest DELETE "$(path queuedResources)?force=true" >/dev/null && return
  fi
  rest DELETE "$(path nodes)" >/dev/null
}

path() { echo "projects/$project/locations/$zone/$1/$name"; }

# Prints the HTTP status, or what else went wrong. The token goes in through a pipe: a
# command line can be read by all.
rest() { # METHOD PATH
  local token answer code
  token=$(metadata instance/service-accounts/default/token |
    sed -n 's/.*"access_token" *: *"\([^"]*\)".*/\1/p')
  [ -n "$token" ] || {
    note "$1 $2: no token, the metadata server does not give one"
    echo "no token"
    return 1
  }
  answer=$(printf 'header = "Authorization: Bearer %s"\n' "$token" |
    curl -sS -K - --connect-timeout 10 --max-time 60 -X "$1" -H 'Content-Length: 0' \
      -w '\n%{http_code}' "${API%/}/v2/$2" 2>&1)
  code=${answer##*$'\n'}
  note "$1 $2: HTTP $code. ${answer:0:500}"
  echo "HTTP $code"
  [[ $code == 2?? ]]
}

metadata() { # NAME
  curl -sSf --noproxy '*' --connect-timeout 3 --max-time 10 \
    -H 'Metadata-Flavor: Google' "$METADATA/$1" 2>/dev/null
}

shut_down() {
  on_google || {
    note "this is no machine of Google's: not shut down"
    return
  }
  note "shutting down: sudo shutdown -h now"
  note "$(sudo -n shutdown -h now 2>&1)"
}

main "$@"
