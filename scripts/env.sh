# Makes the project's environment once: .venv with the locked requirements. Sourced by the other scripts; leaves $root and $python.
# The file .venv/requirements.sha256 is written last, so a half-made environment is finished, and a changed requirement or lock brings it up to date.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$root/.venv/bin/python

# Prints a Python of 3.11 to 3.13 with venv, $PYTHON before all others. 3.14 is refused by numpy's pin, which is gptqmodel's ceiling.
find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3.12 python3.11 python3.13 python3; do
    if [ -n "$candidate" ] && command -v "$candidate" >/dev/null &&
      "$candidate" -c 'import sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
      echo "$candidate"
      return 0
    fi
  done
  echo "missing tool: Python 3.11, 3.12 or 3.13 with venv" >&2
  echo "  fix:   install it (Debian, Ubuntu: apt-get install python3 python3-venv), or PYTHON=/path/to/python bash $0" >&2
  return 7
}

# Prints the name==version of every line that pins one, in the spelling of the locks.
pins() { cat "$@" | sed -nE 's/^([A-Za-z0-9_.-]+==[^ ]+).*/\1/p' | tr 'A-Z_' 'a-z-' | sort -u; }

# Prints torch's lock: the one that lists the wheel which pip takes for the pin here, or the build that .venv already has.
# PyPI's wheel for Linux is a CUDA build; where pip is told of another index or folder, the same pin may give the CPU build.
torch_lock() {
  local report torch
  report=$("$python" -m pip install -qq --disable-pip-version-check --no-input --dry-run --no-deps --report /dev/stdout \
    "$(pins "$root/requirements.txt" | grep '^torch==')") || return 7
  torch=$("$python" -c '
import importlib.metadata, json, sys
found = json.load(sys.stdin)["install"]
print("sha256:" + found[0]["download_info"]["archive_info"]["hashes"]["sha256"] if found else "torch==" + importlib.metadata.version("torch") + " ")
' <<<"$report") || return 7
  cd "$root" && { grep -lF -- "$torch" requirements.cpu.lock requirements.cuda.lock || true; }
}

# Says why the locks cannot be used here; nothing where they can. $1 is torch's lock.
unlocked() {
  local missing
  missing=$(comm -23 <(pins "$root/requirements.txt") <(pins "$root/requirements.lock" "$root/requirements.cuda.lock") | paste -sd ' ')
  case $(uname -sm) in
    "Linux x86_64" | "Linux aarch64") ;;
    *) echo "they are for Linux on x86_64 or aarch64, this is $(uname -sm)"; return ;;
  esac
  if [ -n "$missing" ]; then
    echo "they lack $missing (bash scripts/lock.sh makes them anew)"
  elif [ -z "$1" ]; then
    echo "they do not know the build of torch that pip takes here"
  fi
}

# Says of pip's lines how far it is, on a line of its own that is written over on a terminal. $1: packages that it will take, about.
progress_of_pip() {
  local line count=0 end='\n' every=25 clear=
  [ -t 2 ] && end='\r' every=1 clear='\033[K'
  while IFS= read -r line; do
    case $line in
      Collecting\ *) count=$((count + 1)) && [ $((count % every)) != 0 ] || printf "  fetching %d of about %d: %s$clear$end" "$count" "$1" "$(cut -d' ' -f2 <<<"$line")" >&2 ;;
      Installing\ collected*) printf "  installing %d packages$clear$end" "$count" >&2 ;;
      Successfully\ installed*) printf "  installed %d packages$clear\n" "$count" >&2 ;;
    esac
  done
}

make_env() {
  local want base lock why from stamp=$root/.venv/requirements.sha256
  want=$(cd "$root" && cat requirements.txt requirements.lock requirements.cpu.lock requirements.cuda.lock | sha256sum | cut -d' ' -f1)
  [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$want" ] && [ -x "$python" ] && return 0
  base=$(find_python) || return 7
  [ -x "$python" ] || "$base" -m venv "$root/.venv" || return 7
  lock=$(torch_lock) || return 7
  why=$(unlocked "$lock")
  if [ -n "$why" ]; then
    echo "making $root/.venv from requirements.txt, about two minutes; its locks are left out: $why" >&2
    from=(-r "$root/requirements.txt")
  else
    echo "making $root/.venv from requirements.lock and $lock, about two minutes" >&2
    # A lock is whole: left to resolve, pip takes a newer release than the one locked for a package with extras, and stops.
    from=(--require-hashes --no-deps -r "$root/requirements.lock" -r "$root/$lock")
  fi
  (set -o pipefail && "$python" -m pip install --disable-pip-version-check --no-input "${from[@]}" 2> >(grep -v '^WARNING: ' >&2) |
    progress_of_pip "$(pins "$root/requirements.lock" "$root/$lock" | wc -l)") || return 7
  echo "$want" >"$stamp"
}

# Begins an environment of a script's own in $1, by the pins in $2, and leaves it as $folder, $python and, to be written into it last, $want. $3 says how long it
# takes. Ends the script where that is up to date: the pins and the script itself are those it was made by.
begin_own_env() {
  local base
  folder=$1
  PYTHON=${PYTHON:-$python}
  python=$folder/bin/python
  want=$(cat "$2" "${BASH_SOURCE[1]}" | sha256sum | cut -d' ' -f1)
  if [ -x "$python" ] && [ "$(cat "$folder/requirements.sha256" 2>/dev/null)" = "$want" ]; then
    echo "$folder: up to date" >&2
    exit 0
  fi
  echo "making $folder from $2, $3" >&2
  [ -x "$python" ] || { base=$(find_python) && "$base" -m venv "$folder"; }
}
