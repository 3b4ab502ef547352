#!/usr/bin/env bash
# Makes the environment of llama.cpp for `deploy target=gguf`, about 0.2 GB:
#   bash scripts/gguf_env.sh [FOLDER]      default .venv-gguf; another folder goes with target.environment=FOLDER
# llama.cpp with its server comes prebuilt from PyPI (xllamacpp). Its quantizer, for q4_k_m and the like, is in another package there, whose library needs
# glibc 2.38; on an older system the same library is taken from npm, where npm is. Without either the types that need no quantizer are made all the same.
# The file requirements.sha256 in it is written last, so a half-made environment is finished, and changed pins bring it up to date.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
pins=$root/scripts/gguf_requirements.txt
begin_own_env "${1:-$root/.venv-gguf}" "$pins" "about a minute"
"$python" -m pip install -qq --disable-pip-version-check --no-input --no-deps --requirement "$pins"
"$python" -I -c 'import xllamacpp'

# Of the same months as the others; the only structure that it is given, llama_model_quantize_params, is equal from b11067 to b11739 at least.
npm_package=@node-llama-cpp/linux-x64@3.22.1
npm_sum=0d953e1503d5ab4608d8ed5b739132308c81ac05ffeb760d2a7f30e08a9f90e0
if ! "$python" -I -c 'from llama_cpp_py_sync._cffi_bindings import get_lib; get_lib()' 2>/dev/null; then
  if [ "$(uname -sm)" = "Linux x86_64" ] && command -v npm >/dev/null; then
    rm -rf "$folder/quantizer"
    mkdir -p "$folder/quantizer"
    archive=$(cd "$folder/quantizer" && npm pack --silent "$npm_package")
    echo "$npm_sum  $folder/quantizer/$archive" | sha256sum --check --quiet
    tar -xzf "$folder/quantizer/$archive" -C "$folder/quantizer" --strip-components=3 package/bins/linux-x64
    rm "$folder/quantizer/$archive"
  else
    echo "no quantizer: this system's C library is older than glibc 2.38, and npm is not here to bring another; q4_k_m and the like are not made" >&2
  fi
fi
echo "$want" >"$folder/requirements.sha256"
