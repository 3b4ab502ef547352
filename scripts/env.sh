# Makes the project's environment once: .venv with the pinned requirements. Sourced by the other scripts; leaves $root and $python.
# The file .venv/requirements.sha256 is written last, so a half-made environment is finished, and a changed requirements.txt brings it up to date.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$root/.venv/bin/python

# Prints a Python of 3.11 or newer with venv, $PYTHON before all others.
find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3.12 python3.11 python3.13 python3; do
    if [ -n "$candidate" ] && command -v "$candidate" >/dev/null && "$candidate" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return 0
    fi
  done
  echo "missing tool: Python 3.11 or newer with venv" >&2
  echo "  fix:   install it (Debian, Ubuntu: apt-get install python3 python3-venv), or PYTHON=/path/to/python bash $0" >&2
  return 7
}

make_env() {
  local want base stamp=$root/.venv/requirements.sha256
  want=$(sha256sum "$root/requirements.txt" | cut -d' ' -f1)
  [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$want" ] && [ -x "$python" ] && return 0
  base=$(find_python) || return 7
  echo "making $root/.venv from requirements.txt, about two minutes" >&2
  [ -x "$python" ] || "$base" -m venv "$root/.venv" || return 7
  "$python" -m pip install -qq --disable-pip-version-check --no-input -r "$root/requirements.txt" || return 7
  echo "$want" >"$stamp"
}
