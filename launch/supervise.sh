#!/usr/bin/env bash
# Restarts a training command until it is done, for runs of weeks:
#
#     launch/supervise.sh deepspeed launch/train.py --deepspeed ds_configs/zero2.json --preset dev --run.dir runs/dev
#
# exit code of the command    what happens (megaflux/common/errors.py)
#   0                         done: exits with 0
#   2                         bad input, which no restart fixes: exits with 2
#   any other                 10 saved after a signal, 11 a rank died or hung, 137 killed, ...: waits, then restarts it
#
# Before each start, all processes left by the previous attempt are stopped: two attempts must never write to one run. The wait
# is 5 s, doubled each time up to 300 s, and 5 s again after an attempt of more than 10 minutes. After MAX_FAST_FAILURES
# consecutive attempts that got nowhere (no new checkpoint and no progress in RUN/events.jsonl) it gives up and exits with the
# last exit code. RUN, the run's folder, is read from --run.dir in the command, else from RUN_DIR in the environment. With
# neither (run.dir in a --config file), an attempt that ended within 60 s counts as one that got nowhere; better to give RUN.
#
#     touch RUN/SUPERVISE_STOP    the current attempt is the last; remove the file before the next time
#     kill SUPERVISOR             SIGTERM, SIGINT (Ctrl-C), SIGHUP (the terminal closes): the ranks of this machine get SIGTERM
#                                 and have 600 s to save; exits with 143, 130, 129. SIGUSR1: the same, exits with 10. Nothing
#                                 is restarted. Ctrl-C during the wait for the save: SIGKILL to all, exits at once.
#
# torchrun turns every failure into exit code 1, including bad input; then MAX_FAST_FAILURES ends it.
# From the environment, in whole seconds: FIRST_WAIT (5), MAX_WAIT (300), FAST_SECONDS (60), LONG_SECONDS (600),
# SAVE_SECONDS (600: for the end of an update, train.leave_within, and then the save); and MAX_FAST_FAILURES (5; 0: never give up).
# Ranks that DeepSpeed's pdsh started on several machines are signalled by that launcher, which gets the SIGTERM instead of them.
set -u

log() { echo "supervise: $*" >&2; }

refuse() {
  echo "error: $*" >&2
  exit 2
}

# The run's folder. The last --run.dir counts, as it does for the command, and a ~ that the shell left in it
# (--run.dir=~/run) is expanded here too.
run_folder() {
  local found=${RUN_DIR:-} before= name home
  for word; do
    case $word in --run.dir=*) found=${word#--run.dir=} ;; esac
    if [ "$before" = --run.dir ]; then found=$word; fi
    before=$word
  done
  name=${found%%/*}
  case $name in
    "~"*[!A-Za-z0-9._~-]*) ;;
    "~" | "~"[A-Za-z_]*)
      eval "home=$name"
      case $home in /*) found=${home%/}${found#"$name"} ;; esac # otherwise no such user: the command refuses it
      ;;
  esac
  echo "$found"
}

# The update of the run's newest complete checkpoint; empty if there is none.
newest_checkpoint() {
  local newest='' manifest number
  [ -n "$run" ] || return 0
  for manifest in "$run"/checkpoints/update-*/manifest.json; do
    number=${manifest%/manifest.json}
    number=${number##*/update-}
    case $number in *[!0-9]*) continue ;; esac # no match, or a folder that was moved aside
    number=$((10#$number))
    if [ -z "$newest" ] || [ "$number" -gt "$newest" ]; then newest=$number; fi
  done
  echo "$newest"
}

diary_bytes() {
  if [ -n "$run" ] && [ -f "$run/events.jsonl" ]; then wc -c <"$run/events.jsonl"; else echo 0; fi
}

# Processes of this attempt, found by their environment, which all inherit: a launcher that dies leaves its ranks behind, and
# torchrun gives each rank its own session.
members() {
  local file
  grep -lszxF "MEGAFLUX_ATTEMPT=$mark" /proc/[0-9]*/environ | while IFS=/ read -r _ _ file _; do echo "$file"; done
}

# Of the given processes, those whose parent is not among them.
tops() {
  local pid key value parent
  for pid; do
    parent=
    while read -r key value; do
      if [ "$key" = PPid: ]; then parent=$value; fi
    done 2>/dev/null <"/proc/$pid/status"
    case " $* " in *" $parent "*) ;; *) echo "$pid" ;; esac
  done
}

# The attempt's processes that are ranks: launchers set RANK for them; their workers inherit it and are left out.
ranks() {
  local pid marked=()
  for pid in $(members); do
    if grep -qsz '^RANK=' "/proc/$pid/environ"; then marked+=("$pid"); fi
  done
  tops ${marked[@]+"${marked[@]}"}
}

# The processes to signal: the ranks, because DeepSpeed's launcher on one machine dies of SIGTERM without telling them; if there
# are none yet, the topmost processes.
addressees() {
  local found
  found=$(ranks)
  # shellcheck disable=SC2046  # process numbers, to be split
  if [ -z "$found" ]; then found=$(tops $(members)); fi
  if [ -z "$found" ]; then found=$(jobs -pr); fi
  echo "$found"
}

# Send SIGTERM to the attempt, give it SAVE_SECONDS to save, then send SIGKILL to what is left.
stop_attempt() {
  local told=' ' pid until=$((SECONDS + SAVE_SECONDS))
  while [ -n "$(members)$(jobs -pr)" ] && [ "$SECONDS" -lt "$until" ] && [ -z "$hurry" ]; do
    for pid in $(addressees); do # repeatedly: a launcher may be about to start ranks
      case $told in *" $pid "*) continue ;; esac
      kill -TERM "$pid" 2>/dev/null
      told+="$pid "
    done
    sleep 0.2
  done
  until=$((SECONDS + 10))
  while [ -n "$(members)$(jobs -pr)" ]; do
    if [ "$SECONDS" -ge "$until" ]; then
      log "processes $(members | tr '\n' ' ')do not die; they may still write to the run"
      return 1
    fi
    # shellcheck disable=SC2046
    kill -KILL $(members) $(jobs -pr) 2>/dev/null
    sleep 0.2
  done
}

# leave SIGNAL EXIT_CODE
leave() {
  trap '' TERM HUP USR1 # one is enough: the others come from the same source, such as Slurm
  trap 'hurry=yes' INT
  log "SIG$1: passed on; leaving once the run is saved, in $SAVE_SECONDS s at the latest; Ctrl-C: at once, unsaved"
  stop_attempt
  if [ -n "$hurry" ]; then
    log "Ctrl-C: not waiting for the save"
    exit 130
  fi
  exit "$2"
}

# True if this attempt made no progress.
got_nowhere() {
  if [ -z "$run" ]; then
    [ "$lasted" -lt "$FAST_SECONDS" ]
  else
    [ "$(newest_checkpoint)" = "$checkpoint_before" ] &&
      ! { [ -f "$run/events.jsonl" ] && tail -c "+$((diary_before + 1))" "$run/events.jsonl" | grep -q '"kind": "progress"'; }
  fi
}

# DeepSpeed's launcher exits with 0 even if a signal killed its child. A finished run has no rank left and, if it wrote events
# at all, ends them with "stop".
is_done() {
  if [ "$(diary_bytes)" -gt "$diary_before" ]; then
    tail -n 1 "$run/events.jsonl" | grep -q '"kind": "stop"'
  else
    [ -z "$(ranks)" ]
  fi
}

if [ $# -eq 0 ]; then refuse "no command; give one: launch/supervise.sh deepspeed launch/train.py ..."; fi
if [ "$1" = --help ]; then
  sed -n '2,/^set -u/{/^#/s/^# \{0,1\}//p}' "$0"
  exit 0
fi

FIRST_WAIT=${FIRST_WAIT:-5} MAX_WAIT=${MAX_WAIT:-300} FAST_SECONDS=${FAST_SECONDS:-60} LONG_SECONDS=${LONG_SECONDS:-600}
SAVE_SECONDS=${SAVE_SECONDS:-600} MAX_FAST_FAILURES=${MAX_FAST_FAILURES:-5}
for name in FIRST_WAIT MAX_WAIT FAST_SECONDS LONG_SECONDS SAVE_SECONDS MAX_FAST_FAILURES; do
  case ${!name} in *[!0-9]*) refuse "$name: must be a whole number, got '${!name}'" ;; esac
done

run=$(run_folder "$@")
attempt=0 fast=0 pause=$FIRST_WAIT mark=none hurry=
trap : PIPE # Ctrl-C also ends the tee of `... | tee log`: then only this script's output is lost, not the run's save
trap 'leave TERM 143' TERM
trap 'leave INT 130' INT
trap 'leave HUP 129' HUP
trap 'leave USR1 10' USR1

while :; do
  attempt=$((attempt + 1))
  mark=$$-$RANDOM-$attempt
  checkpoint_before=$(newest_checkpoint) diary_before=$(diary_bytes) started=$SECONDS
  # In its own session, so that Ctrl-C reaches only this script, which sends the ranks a signal after which they can save.
  MEGAFLUX_ATTEMPT=$mark setsid "$@" </dev/null &
  wait $! 2>/dev/null
  code=$? lasted=$((SECONDS - started))

  for _ in 1 2 3 4 5; do # the last processes take a moment to exit
    if [ -z "$(members)" ]; then break; fi
    sleep 0.2
  done
  if [ "$code" -eq 0 ]; then
    if is_done; then
      log "attempt $attempt: done after $lasted s"
      exit 0
    fi
    log "attempt $attempt: exit code 0 from the launcher, but the run did not come to its end; taken as 1"
    code=1
  fi
  if [ -n "$(members)" ]; then
    log "attempt $attempt: the command has left and some of its processes have not; stopping them"
    stop_attempt || exit "$code"
  fi

  if [ "$code" -eq 2 ]; then
    log "attempt $attempt: exit code 2 after $lasted s: bad input, which no restart fixes"
    exit 2
  fi
  if got_nowhere; then
    fast=$((fast + 1))
  else
    fast=0
  fi
  if [ "$MAX_FAST_FAILURES" -gt 0 ] && [ "$fast" -ge "$MAX_FAST_FAILURES" ]; then
    log "attempt $attempt: exit code $code after $lasted s; $fast in a row got nowhere, giving up"
    exit "$code"
  fi
  if [ "$lasted" -gt "$LONG_SECONDS" ]; then pause=$FIRST_WAIT; fi
  if [ -z "$run" ] || [ ! -e "$run/SUPERVISE_STOP" ]; then
    log "attempt $attempt: exit code $code after $lasted s; starting again in $pause s"
    sleep "$pause" &
    wait $!
  fi
  if [ -n "$run" ] && [ -e "$run/SUPERVISE_STOP" ]; then
    log "attempt $attempt: exit code $code after $lasted s; $run/SUPERVISE_STOP is there: not starting again"
    exit "$code"
  fi
  pause=$((pause * 2 < MAX_WAIT ? pause * 2 : MAX_WAIT))
done
