# Sourced by the other scripts: `make_env EXTRAS` leaves an activated virtual environment in .venv
# with this project and the named extras (`make_env EXTRAS FOLDER OPTION…`: elsewhere, with options
# of pip's); `use_env` is that on a cluster; `again CODE` says whether to give the same command once
# more.

# On a CPU a third of the time of a small model goes into page faults of XLA's scratch memory;
# huge pages, where the kernel gives them on request, save most of it.
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"

find_python() {
  local candidate
  for candidate in "${PYTHON:-python3}" python3.12 python3.11 python3.13 python3; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "error: Python 3.11 or newer is needed; set PYTHON to one" >&2
  return 2
}

make_env() {
  local folder="${2:-.venv}" python
  if [ ! -x "$folder/bin/python" ]; then
    python=$(find_python)
    "$python" -m venv "$folder"
  fi
  # shellcheck disable=SC1090,SC1091
  . "$folder/bin/activate"
  if [ -n "${KDRL_TORCH:-}" ]; then
    python -m pip install --quiet --disable-pip-version-check "torch==$KDRL_TORCH"
  fi
  python -m pip install --quiet --disable-pip-version-check "${@:3}" --editable ".[$1]"
}

# `make_env` for a machine of a cluster: a .venv with the project (-I: not just the folder beside
# it) serves as it is. The machine's Python may be too old; uv, there or from pip, then brings one.
use_env() {
  if .venv/bin/python -I -c 'import importlib.metadata as m; m.version("kdrl_jax")' 2>/dev/null; then
    # shellcheck disable=SC1091
    . .venv/bin/activate
    return
  fi
  if [ ! -x .venv/bin/python ] && ! find_python >/dev/null 2>&1; then
    PATH="$HOME/.local/bin:$PATH"
    command -v uv >/dev/null || python3 -m pip install --quiet --user uv
    uv venv --quiet --seed --python 3.12 .venv
  fi
  make_env "$1"
}

# Exit codes of kdrl_jax.train: 0 finished, 2 the user's mistake, 3 stopped by a watch of `health`,
# 75 saved on SIGTERM, else a crash.
# True where the same command should be given again: after 75, and after a crash of a run that had
# lasted (SECONDS of this shell); one that crashed at once would do so again.
again() {
  case "$1" in
    0 | 2 | 3) return 1 ;;
    75) return 0 ;;
    *) [ "$SECONDS" -ge "${KDRL_CRASH_SECONDS:-600}" ] ;;
  esac
}
