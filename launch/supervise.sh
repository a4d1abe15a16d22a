#!/usr/bin/env bash
# Runs a training command again until it is done, for runs of weeks:
#
#     launch/supervise.sh deepspeed launch/train.py --deepspeed ds_configs/zero2.json --preset dev --run.dir runs/dev
#
# exit code of the command    what happens (megaflux/errors.py)
#   0                         done: ends with 0
#   2                         bad input, which no restart mends: ends with 2
#   any other                 10 saved after a signal, 11 a rank died or hung, 137 killed, ...: waits, starts it again
#
# Before each start all that is left of the attempt before is stopped: two of them must never write to one run. The wait is
# 5 s, doubled each time up to 300 s, and 5 s again after an attempt of more than 10 minutes. After MAX_FAST_FAILURES
# attempts in a row that got nowhere (no new checkpoint and no progress in RUN/events.jsonl) it gives up and ends with the
# last exit code. RUN, the run's folder, is read from --run.dir in the command, else from RUN_DIR in the environment; without
# either (run.dir in a --config file) an attempt that ended within 60 s counts as one: better give it.
#
#     touch RUN/SUPERVISE_STOP    the attempt that runs is the last; remove the file before the next time
#     kill SUPERVISOR             SIGTERM, SIGINT (Ctrl-C), SIGHUP (the terminal closes): the ranks of this machine get SIGTERM,
#                                 have 600 s to save, and it ends with 143, 130, 129. SIGUSR1: the same, ends with 10. Nothing
#                                 is started again. Ctrl-C while it waits for the save: SIGKILL to all, ends at once.
#
# torchrun turns every failure into exit code 1, bad input too: then the fast failures end it.
# From the environment, in whole seconds: FIRST_WAIT (5), MAX_WAIT (300), FAST_SECONDS (60), LONG_SECONDS (600),
# SAVE_SECONDS (600: an update's end, train.leave_within, and then the save); and MAX_FAST_FAILURES (5; 0: it never gives up).
# Ranks that DeepSpeed's pdsh started on several machines are told by that launcher, which gets the SIGTERM in their place.
set -u

log() { echo "supervise: $*" >&2; }

refuse() {
  echo "error: $*" >&2
  exit 2
}

# The folder of the run that the command trains; the last --run.dir counts, as it does for the command, and a ~ that the shell
# left in it (--run.dir=~/run) is a home folder here too.
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
      case $home in /*) found=${home%/}${found#"$name"} ;; esac # else nobody's: the command refuses it
      ;;
  esac
  echo "$found"
}

# The update of the run's newest complete checkpoint; nothing where there is none.
newest_checkpoint() {
  local newest='' manifest number
  [ -n "$run" ] || return 0
  for manifest in "$run"/checkpoints/update-*/manifest.json; do
    number=${manifest%/manifest.json}
    number=${number##*/update-}
    case $number in *[!0-9]*) continue ;; esac # nothing matched, or a folder that somebody moved aside
    number=$((10#$number))
    if [ -z "$newest" ] || [ "$number" -gt "$newest" ]; then newest=$number; fi
  done
  echo "$newest"
}

diary_bytes() {
  if [ -n "$run" ] && [ -f "$run/events.jsonl" ]; then wc -c <"$run/events.jsonl"; else echo 0; fi
}

# Processes of this attempt, wherever they hang: a launcher that dies leaves its ranks behind, torchrun gives each a session
# of its own, and all inherit the environment.
members() {
  local file
  grep -lszxF "MEGAFLUX_ATTEMPT=$mark" /proc/[0-9]*/environ | while IFS=/ read -r _ _ file _; do echo "$file"; done
}

# Those of the processes given that no other of them started.
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

# Which of the attempt's processes are ranks: launchers mark them with RANK, and their workers inherit it.
ranks() {
  local pid marked=()
  for pid in $(members); do
    if grep -qsz '^RANK=' "/proc/$pid/environ"; then marked+=("$pid"); fi
  done
  tops ${marked[@]+"${marked[@]}"}
}

# Whom to tell: the ranks, as DeepSpeed's launcher on one machine dies of SIGTERM and tells nobody; while there are none,
# whoever is at the top.
addressees() {
  local found
  found=$(ranks)
  # shellcheck disable=SC2046  # process numbers, to be split
  if [ -z "$found" ]; then found=$(tops $(members)); fi
  if [ -z "$found" ]; then found=$(jobs -pr); fi
  echo "$found"
}

# SIGTERM to the attempt, SAVE_SECONDS for it to save, then SIGKILL to what is left.
stop_attempt() {
  local told=' ' pid until=$((SECONDS + SAVE_SECONDS))
  while [ -n "$(members)$(jobs -pr)" ] && [ "$SECONDS" -lt "$until" ] && [ -z "$hurry" ]; do
    for pid in $(addressees); do # again and again: a launcher may be about to start ranks
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
  trap '' TERM HUP USR1 # one is enough: the rest come from the same hand, as Slurm's
  trap 'hurry=yes' INT
  log "SIG$1: passed on; leaving once the run is saved, in $SAVE_SECONDS s at the latest; Ctrl-C: at once, unsaved"
  stop_attempt
  if [ -n "$hurry" ]; then
    log "Ctrl-C: not waiting for the save"
    exit 130
  fi
  exit "$2"
}

# Whether this attempt brought the run no further.
got_nowhere() {
  if [ -z "$run" ]; then
    [ "$lasted" -lt "$FAST_SECONDS" ]
  else
    [ "$(newest_checkpoint)" = "$checkpoint_before" ] &&
      ! { [ -f "$run/events.jsonl" ] && tail -c "+$((diary_before + 1))" "$run/events.jsonl" | grep -q '"kind": "progress"'; }
  fi
}

# DeepSpeed's launcher leaves with 0 when its child was killed by a signal. A run that is done has no rank left and, where
# it wrote events at all, says so in the last.
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
trap : PIPE # the same Ctrl-C ends the tee of `... | tee log`: then this script's words are lost, and not the run's save
trap 'leave TERM 143' TERM
trap 'leave INT 130' INT
trap 'leave HUP 129' HUP
trap 'leave USR1 10' USR1

while :; do
  attempt=$((attempt + 1))
  mark=$$-$RANDOM-$attempt
  checkpoint_before=$(newest_checkpoint) diary_before=$(diary_bytes) started=$SECONDS
  # A session of its own: Ctrl-C here is for this script, which passes on what the ranks can save after.
  MEGAFLUX_ATTEMPT=$mark setsid "$@" </dev/null &
  wait $! 2>/dev/null
  code=$? lasted=$((SECONDS - started))

  for _ in 1 2 3 4 5; do # the last to leave take a moment
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
    log "attempt $attempt: exit code 2 after $lasted s: bad input, which no restart mends"
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
