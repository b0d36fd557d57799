#!/usr/bin/env bash
# One worker of a TPU slice; launch/tpu_pod.sh starts it on all of them.
#
#     bash launch/tpu_worker.sh setup             environment and install
#     bash launch/tpu_worker.sh run ARGUMENTS     train, or attach to the training under way
#     bash launch/tpu_worker.sh stop              ask it to save and end
#
# The training outlives the connection that started it. `run` shows its log and at the end prints
# "kdrl-exit CODE" and exits with that code.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/common.sh
state="${KDRL_STATE:-$HOME/.kdrl}"
mkdir -p "$state"

running() {
  [ -s "$state/pid" ] && kill -0 "$(cat "$state/pid")" 2>/dev/null
}

start() {
  use_env "${KDRL_EXTRAS:-tpu,data}"
  rm -f "$state/pid" "$state/code"
  # The shell in between outlives this one and notes how the training ended.
  # shellcheck disable=SC2016
  setsid nohup bash -c '
    state=$1 && shift
    python -m kdrl_jax.train "$@" >"$state/log" 2>&1 &
    echo $! >"$state/pid"
    code=0
    wait $! || code=$?
    echo "$code" >"$state/code.new"
    mv "$state/code.new" "$state/code"
  ' kdrl "$state" "$@" </dev/null >/dev/null 2>&1 &
  until [ -s "$state/pid" ]; do sleep 0.1; done
}

case "${1:-}" in
  setup)
    use_env "${KDRL_EXTRAS:-tpu,data}"
    ;;
  run)
    shift
    running || start "$@"
    tail --pid="$(cat "$state/pid")" --lines=+1 --follow=name "$state/log" || true
    for _ in {1..50}; do
      [ -s "$state/code" ] && break
      sleep 0.1
    done
    code=1
    [ -s "$state/code" ] && code=$(cat "$state/code")
    echo "kdrl-exit $code"
    exit "$code"
    ;;
  stop)
    if running; then kill -TERM "$(cat "$state/pid")"; fi
    ;;
  *)
    echo "error: $0 ${1:-}: give setup, run or stop" >&2
    exit 2
    ;;
esac
