#!/usr/bin/env bash
# Makes the documents a site that needs no network, and prints its first page:
#   bash scripts/docs.sh [FOLDER]      default site
# Its environment is .venv-docs, about 170 MB, by the pins in docs/requirements.txt.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
pins=$root/docs/requirements.txt
(
  begin_own_env "$root/.venv-docs" "$pins" "about half a minute"
  "$python" -m pip install -qq --disable-pip-version-check --no-input --requirement "$pins"
  echo "$want" >"$folder/requirements.sha256"
)
site=$(realpath -m "${1:-$root/site}")
cd "$root"
export NO_MKDOCS_2_WARNING=1  # a word of material's on other tools
.venv-docs/bin/python -m mkdocs build --quiet --strict --site-dir "$site"
echo "$site/index.html"
