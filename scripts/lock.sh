#!/usr/bin/env bash
# Makes the locks from requirements.txt: every package of .venv by version and hash, for Linux and Python 3.11 to 3.13.
#   requirements.lock        all but torch
#   requirements.cuda.lock   torch as PyPI has it, with what CUDA needs
#   requirements.cpu.lock    torch's CPU build, from the wheels that pip is told of here; kept while the pin is the same
# A version once locked stays until requirements.txt moves it, or: bash scripts/lock.sh --upgrade
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
cd "$root"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
base=$(find_python)
"$base" -m venv "$work/venv"
pip=("$work/venv/bin/python" -m pip)
"${pip[@]}" install -qq --disable-pip-version-check --no-input uv==0.13.9

head_of() { echo "# $1 Made by scripts/lock.sh; not edited by hand."; }

# uv says of each line that it is for the platforms pyproject.toml names to it; the heading says so once.
cat requirements.lock requirements.cuda.lock >"$work/all" 2>/dev/null || true
"$work/venv/bin/uv" pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --annotation-style line \
  --output-file "$work/all" "$@" requirements.txt
sed -i "s/ ; python_full_version < '3.14' and sys_platform == 'linux' / /" "$work/all"
head_of "All of .venv but torch, for Linux and Python 3.11 to 3.13." >"$work/lock"
head_of "torch as PyPI has it for Linux, and what CUDA needs; beside requirements.lock." >"$work/cuda"
awk -v lock="$work/lock" -v cuda="$work/cuda" '
  /^[a-z]/ { file = /^(torch==|triton==|nvidia-|cuda-)/ ? cuda : lock }
  { print >> file }' "$work/all"

torch=$(pins requirements.txt | grep '^torch==')+cpu
if ! grep -qsF "$torch " requirements.cpu.lock; then
  head_of "torch's CPU build; beside requirements.lock." >"$work/cpu"
  for version in 3.11 3.12 3.13; do
    for machine in x86_64 aarch64; do
      "${pip[@]}" download -qqq --disable-pip-version-check --no-input --no-deps --dest "$work/wheels" --only-binary :all: \
        --python-version "$version" --platform "manylinux_2_28_$machine" "$torch" 2>/dev/null || true
    done
  done
  if [ -d "$work/wheels" ]; then
    sha256sum "$work"/wheels/*.whl | sed -E '1i '"$torch"' \\
      s/^([0-9a-f]+).*/    --hash=sha256:\1 \\/; $s/ \\$//' >>"$work/cpu"
  else
    echo "requirements.cpu.lock is empty: pip finds no $torch here; make it where pip knows an index of torch's CPU builds" >&2
  fi
  mv "$work/cpu" requirements.cpu.lock
fi
mv "$work/lock" requirements.lock
mv "$work/cuda" requirements.cuda.lock
