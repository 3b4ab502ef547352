# Makes the project's environment once: .venv with the pinned requirements. Sourced by the other scripts; leaves $python.
# The file .venv/requirements.sha256 is written last, so a half-made environment is finished, and a changed requirements.txt brings it up to date.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$root/.venv/bin/python

make_env() {
  local want stamp=$root/.venv/requirements.sha256 base=""
  want=$(sha256sum "$root/requirements.txt" | cut -d' ' -f1)
  [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$want" ] && [ -x "$python" ] && return 0
  for candidate in "${PYTHON:-}" python3.12 python3.11 python3.13 python3; do
    if [ -n "$candidate" ] && command -v "$candidate" >/dev/null && "$candidate" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      base=$candidate
      break
    fi
  done
  if [ -z "$base" ]; then
    echo "missing tool: Python 3.11 or newer with venv" >&2
    echo "  fix:   install it (Debian, Ubuntu: apt-get install python3 python3-venv), or PYTHON=/path/to/python bash $0" >&2
    return 7
  fi
  echo "making $root/.venv from requirements.txt, about two minutes" >&2
  [ -x "$python" ] || "$base" -m venv "$root/.venv" || return 7
  "$python" -m pip install -qq --disable-pip-version-check --no-input -r "$root/requirements.txt" || return 7
  echo "$want" >"$stamp"
}
