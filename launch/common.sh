# Sourced by the other scripts: `make_env EXTRAS` leaves an activated virtual environment in .venv
# with this project and the named extras installed.

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
  local python
  if [ ! -x .venv/bin/python ]; then
    python=$(find_python)
    "$python" -m venv .venv
  fi
  # shellcheck disable=SC1091
  . .venv/bin/activate
  if [ -n "${KDRL_TORCH:-}" ]; then
    python -m pip install --quiet --disable-pip-version-check "torch==$KDRL_TORCH"
  fi
  python -m pip install --quiet --disable-pip-version-check --editable ".[$1]"
}
