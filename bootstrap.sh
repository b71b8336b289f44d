#!/usr/bin/env bash
# From a clone to a working .venv; does nothing where nothing changed.
#
#   PYTHON=python3.12            the interpreter, else the first python3 of 3.10 or newer
#   VENV=.venv                   the environment's folder
#   TORCH_CPU_INDEX=<address>    PyTorch's index of CPU wheels, for machines without an NVIDIA driver
#   KERNELS_CUDA, KERNELS_CUDA_ARCHS                            as for `pip install`: see setup.py
set -euo pipefail
cd "$(dirname "$0")"
VENV=${VENV:-.venv}
python=$VENV/bin/python
stamp=$VENV/bootstrap.stamp

say() { echo "bootstrap: $*" >&2; }
pip() { "$python" -m pip --disable-pip-version-check "$@"; }

# ---- what the environment and the native modules are made from -----------------------------------
hash_of() { cat "$@" | sha256sum | cut -c1-16; }
environment() {
  hash_of pyproject.toml constraints.txt bootstrap.sh <(echo "$PWD $("$python" -V) ${PYTHON:-}")
}
native() {
  local sources
  mapfile -t sources < <(find csrc -type f | LC_ALL=C sort)
  hash_of setup.py CMakeLists.txt "${sources[@]}" \
    <(echo "${sources[@]} ${KERNELS_CUDA:-} ${KERNELS_CUDA_ARCHS:-}")
}
native_present() { compgen -G "kernels/_cpu*.so" >/dev/null; }

if [ -f "$stamp" ] && "$python" -c '' 2>/dev/null; then
  read -r environment_built native_built <"$stamp"
  if [ "$environment_built" = "$(environment)" ]; then
    if [ "$native_built" = "$(native)" ] && native_present; then exit 0; fi
    environment_is_current=1
  fi
fi

# ---- what must come from the system --------------------------------------------------------------
find_python() {
  local candidate
  for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10}; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
}

missing=()
base=$(find_python)
if [ -z "$base" ]; then
  say "needs Python 3.10 or newer (Debian: apt-get install python3); PYTHON=... names one"
  exit 1
fi
version=$("$base" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
"$base" -c 'import venv, ensurepip' 2>/dev/null || missing+=("python$version-venv")
headers=$("$base" -c 'import sysconfig; print(sysconfig.get_path("include"))')
[ -f "$headers/Python.h" ] || missing+=("python$version-dev")
command -v make >/dev/null || missing+=(make)
if ! command -v "${CXX:-g++}" >/dev/null; then missing+=(g++); fi
if [ ${#missing[@]} -gt 0 ]; then
  say "missing: ${missing[*]} (Debian: apt-get install ${missing[*]})"
  exit 1
fi
if ! "${CXX:-g++}" -std=c++20 -fsyntax-only -x c++ - <<<"#include <concepts>" 2>/dev/null; then
  say "${CXX:-g++} does not know C++20: g++ 11 or newer is needed (CXX=... names one)"
  exit 1
fi

# ---- the environment -----------------------------------------------------------------------------
driver_present() {
  [ -e /proc/driver/nvidia/version ] || nvidia-smi -L 2>/dev/null | grep -q GPU
}

# Without a driver the CPU build, 15 times smaller.  "+cpu" can only ever match a CPU build: first
# from the sources pip is configured with, then from the index the user names.
install_torch() {
  local torch
  torch=$(sed -n 's/^torch==//p' constraints.txt)
  case $("$python" -m pip freeze 2>/dev/null | sed -n 's/^torch==//p') in "$torch" | "$torch"+*) return ;; esac
  say "installing torch $torch"
  if [ "$(uname -s)" = Linux ] && ! driver_present; then
    pip install -q "torch==$torch+cpu" 2>/dev/null && return
    if [ -n "${TORCH_CPU_INDEX:-}" ]; then
      pip install -q --extra-index-url "$TORCH_CPU_INDEX" "torch==$torch+cpu" && return
    fi
    say "no CPU build of torch found (TORCH_CPU_INDEX names an index); taking the CUDA build, GBs"
  fi
  pip install -q "torch==$torch"
}

# CUDA's compiler from PyPI where the machine has none: the names are pyproject.toml's extra.
install_nvcc() {
  [ "$(uname -s)" = Linux ] || return 0
  ! command -v nvcc "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" >/dev/null || return 0
  local names
  mapfile -t names < <(sed -n '/^cuda-toolkit/,/^]/s/^ *"\([a-z-]*\).*/\1/p' pyproject.toml)
  say "no nvcc on this machine: installing ${names[*]}"
  pip install -q -c constraints.txt "${names[@]}" ||
    say "WARNING: that failed; what needs nvcc will say so, everything else works"
}

# The native modules need no torch: they compile while pip unpacks it.  A failure is told by the
# install below, which builds what is missing again.
compiling=
start_compiling() {
  pip install -q -c constraints.txt setuptools pybind11 cmake ninja
  say "compiling the native modules in the background"
  "$python" setup.py -q build_ext --inplace >/dev/null 2>&1 &
  compiling=$!
  trap 'kill $compiling 2>/dev/null || true' EXIT
}
finish_compiling() {
  wait "$compiling" || true
  trap - EXIT
}

if [ -z "${environment_is_current:-}" ]; then
  rm -f "$stamp"
  "$python" -c '' 2>/dev/null || "$base" -m venv --clear "$VENV"
  if [ "$("$python" -V)" != "$("$base" -V)" ] && [ -n "${PYTHON:-}" ]; then
    say "$VENV has $("$python" -V), but PYTHON is $("$base" -V): remove $VENV or set VENV"
    exit 1
  fi
  start_compiling
  install_torch
  install_nvcc
  finish_compiling
  say "installing the development tools and this package"
  pip install -q -c constraints.txt --no-build-isolation -e ".[dev]"
else
  say "rebuilding the native modules"
  pip install -q --no-deps --no-build-isolation -e .
fi

"$python" - <<'PYTHON'
import json, pathlib, sys
built = json.loads(pathlib.Path("kernels/_build_info.json").read_text())
for module, build in built.items():
    outcome = ", ".join(build["targets"]) if build["built"] else f"not built: {build['reason']}"
    print(f"bootstrap: kernels.{module}: {outcome}", build["output"], file=sys.stderr)
sys.exit(not built["_cpu"]["built"])
PYTHON
echo "$(environment) $(native)" >"$stamp"
