#!/usr/bin/env bash
# A run on a TPU slice of Google Cloud, from any machine with gcloud: asks for the slice as a queued
# resource or uses the one there is, installs, trains on all workers, and again after a preemption.
#
#     bash launch/tpu_pod.sh NAME --zone=us-east5-b --type=v6e-64 --runtime=v2-alpha-tpuv6e --spot \
#         --setup='mountpoint -q /mnt/runs || sudo mount --mkdir 10.0.0.2:/runs /mnt/runs' --delete \
#         -- --config=configs/stage2.py --workdir=/mnt/runs/stage2 …
#
#   --zone=ZONE        of the slice; --project=PROJECT if it is not gcloud's own
#   --type=TYPE        accelerator type of a slice to be made, with --runtime=VERSION; without it
#                      only a slice that is there is used
#   --spot             make a spot slice: 30 seconds of notice, so mind checkpoint.every
#   --setup=COMMAND    given on each worker before the install, perhaps again: mounts the storage
#                      that all share (Filestore; gcsfuse needs --rename-dir-limit for checkpoints)
#   --delete           delete the slice in the end, however the run ends
#   --dry-run          print the commands for a new slice
#
# Ctrl-C or SIGTERM here makes the workers save and end. A lost connection does not stop them: the
# same command attaches again. Exits with 0 finished, 2 the user's mistake, 3 stopped by a watch of
# `health`, 75 saved, 1 given up.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() { sed -n '2,/^set /{/^set /!s/^# \{0,1\}//p}' "$0"; }
die() { echo "error: $1" >&2; exit "${2:-1}"; }
say() { echo "tpu_pod: $1" >&2; }

name='' zone='' project='' type='' runtime='' spot='' setup='' delete='' dry_run=''
while [ $# -gt 0 ]; do
  case "$1" in
    --zone=*) zone=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --runtime=*) runtime=${1#*=} ;;
    --setup=*) setup=${1#*=} ;;
    --spot) spot=1 ;;
    --delete) delete=1 ;;
    --dry-run) dry_run=1 ;;
    -h | --help) usage; exit ;;
    --) shift; break ;;
    -*) die "$1: no such option; --help lists them, and -- comes before those of the training" 2 ;;
    *) [ -z "$name" ] || die "$1: a second name, after $name" 2
      name=$1 ;;
  esac
  shift
done
[ -n "$name" ] && [ -n "$zone" ] && [ $# -gt 0 ] ||
  die "NAME, --zone=ZONE and, after --, the arguments of kdrl_jax.train are needed" 2
[ -z "$type" ] || [ -n "$runtime" ] || die "--type=$type: give its --runtime=VERSION too" 2

poll="${KDRL_POLL_SECONDS:-30}"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
stopping=''

tpus() {
  local command=(gcloud compute tpus "$@" --zone="$zone" ${project:+--project="$project"})
  if [ -n "$dry_run" ]; then
    printf '%q ' "${command[@]}" && echo
  else
    "${command[@]}"
  fi
}
# All at once, or the first would wait for the last to join them.
on_workers() { tpus tpu-vm ssh "$name" --worker=all --batch-size=all --command="$1"; }
worker() { on_workers "bash kdrl_jax/launch/tpu_worker.sh $1"; }
# A state, ABSENT, or UNKNOWN where gcloud could not tell.
look() {
  if ! tpus "$@" 2>"$scratch/why"; then
    if grep -q NOT_FOUND "$scratch/why"; then
      echo ABSENT
    else
      cat "$scratch/why" >&2
      echo UNKNOWN
    fi
  fi
}
tpu_state() { look tpu-vm describe "$name" --format='value(state)'; }
queue_state() { look queued-resources describe "$name" --format='value(state.state)'; }

request() {
  installed='' obtained=1
  tpus queued-resources create "$name" --node-id="$name" --accelerator-type="$type" \
    --runtime-version="$runtime" ${spot:+--spot}
}
discard() {
  if [ "$(queue_state)" = ABSENT ]; then
    tpus tpu-vm delete "$name" --quiet
  else
    tpus queued-resources delete "$name" --force --quiet
  fi
}
install() {
  [ -n "$dry_run" ] || tar -czf "$scratch/kdrl_jax.tgz" --exclude=./.git --exclude=./.venv \
    --exclude=./runs --exclude=./.cache --exclude='*_cache' --exclude=__pycache__ . || return
  tpus tpu-vm scp "$scratch/kdrl_jax.tgz" "$name:" --worker=all || return
  on_workers "mkdir -p kdrl_jax && tar -xzf kdrl_jax.tgz -C kdrl_jax" || return
  [ -z "$setup" ] || on_workers "$setup" || return
  worker setup
}

# Until the slice is there. A preempted one is deleted and asked for again: it never comes back.
obtain() {
  local tpu queued failures=0
  until tpu=$(tpu_state) && [ "$tpu" = READY ]; do
    [ -z "$stopping" ] || exit 75
    queued=$(queue_state)
    say "$name is $tpu, its request $queued"
    case "$queued $tpu" in
      *UNKNOWN*)
        [ -n "$obtained" ] || die "$name: gcloud cannot tell its state, see above"
        sleep "$poll"
        ;;
      "ABSENT ABSENT")
        [ -n "$type" ] || die "$name: no such TPU in $zone; give --type and --runtime to make it" 2
        request
        ;;
      FAILED*)
        failures=$((failures + 1))
        [ "$failures" -lt 3 ] || die "$name: the request failed; see gcloud's description of it"
        discard
        ;;
      SUSPENDED* | "ABSENT PREEMPTED" | "ABSENT TERMINATED")
        [ -n "$type" ] || die "$name: $tpu; give --type and --runtime to make it again" 2
        discard
        ;;
      *) sleep "$poll" ;;
    esac
  done
  obtained=1
}

# Sets `codes` to the exit codes of the workers that reported one; fails if any failed.
train() {
  local arguments pid status=0
  printf -v arguments ' %q' "$@"
  # In the background, where the terminal's Ctrl-C does not reach it: the log is shown to the end.
  worker "run$arguments" > >(tee "$scratch/log") 2>&1 &
  pid=$!
  while :; do
    status=0
    wait "$pid" || status=$?
    kill -0 "$pid" 2>/dev/null || break
  done
  sleep 0.2 # for tee
  codes=$(sed -n 's/.*kdrl-exit \([0-9]\{1,\}\).*/\1/p' "$scratch/log" | sort -nu | tr '\n' ' ')
  return "$status"
}

if [ -n "$dry_run" ]; then
  [ -z "$type" ] || request
  install
  printf -v arguments ' %q' "$@"
  worker "run$arguments"
  [ -z "$delete" ] || tpus queued-resources delete "$name" --force --quiet
  exit
fi

stop() {
  say "stopping: the workers finish their step and save"
  stopping=1
  worker stop &
}
trap stop INT TERM
finish() {
  if [ -n "$delete" ] && [ -n "$obtained" ]; then discard || true; fi
  rm -rf "$scratch"
}
trap finish EXIT

short=0 installed='' obtained=''
while :; do
  obtain
  if [ -z "$installed" ]; then
    if ! install; then
      [ "$(tpu_state)" != READY ] || die "$name: the install failed, see above"
      continue
    fi
    installed=1
  fi
  [ -z "$stopping" ] || exit 75
  began=$SECONDS
  if train "$@"; then
    say "finished"
    exit 0
  fi
  say "workers exited with ${codes:-no code}"
  case " $codes" in
    *" 2 "*) die "refused by kdrl_jax.train, see above" 2 ;;
    *" 3 "*) die "stopped by a watch of health, see above" 3 ;;
  esac
  [ -z "$stopping" ] || exit 75
  [ "$(tpu_state)" = READY ] || continue
  case " $codes" in
    *" 75 "*) continue ;;
  esac
  # A crash or a lost connection. What fails at once three times would go on so.
  short=$((SECONDS - began < ${KDRL_CRASH_SECONDS:-600} ? short + 1 : 0))
  [ "$short" -lt 3 ] || die "three crashes in a row, each within ${KDRL_CRASH_SECONDS:-600} s"
  sleep "$poll"
done
