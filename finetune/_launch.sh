# Shared by the launchers: reads the old recipe's flags, makes the run's dataset, starts training. Sourced, not run.
# Hyperparameters live in configs/, machines here: NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT and GPUS_PER_NODE as in torchrun's own terms.

usage() {
  cat <<TEXT
usage: bash $0 [-m MODEL] [-d DATA.json] [--deepspeed zero2|zero3|FILE.json] [key=value ...]

  -m, --model      Hugging Face folder or hub id          (model.path)
  -d, --data       file, folder, glob or hub id of chats  (data.path; the data stage runs first, and is skipped when unchanged)
  --deepspeed      none, zero2, zero2_offload, zero3, zero3_offload, or a DeepSpeed JSON file
  key=value        any setting of python -m src.finetune (see its --help), or of python -m src.data where it begins with data.

environment: NNODES NODE_RANK MASTER_ADDR MASTER_PORT GPUS_PER_NODE
TEXT
}

# Hydra reads quotes, commas and brackets in values; a single-quoted value is taken as it is, but for ${ and for backslashes before a quote.
quoted() { printf "'%s'" "$(printf '%s' "$1" | sed -e "s/\(\\\\*\)'/\1\1\\\\'/g" -e 's/\(\\*\)$/\1\1/' -e 's/\${/\\${/g')"; }

# Everything runs from the project's root, where outputs/ is; a relative path is the caller's.
here() { case $1 in /*) printf %s "$1" ;; *) if [ -e "$1" ] || compgen -G "$1" >/dev/null; then printf %s "$PWD/$1"; else printf %s "$1"; fi ;; esac; }

launch() {
  local root python data=() train=() common=() given_data=""
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
  python=${PYTHON:-$root/.venv/bin/python}
  [ -x "$python" ] || python=python3
  train=("$@")
  set -- "${ARGS[@]}"
  while [ $# -gt 0 ]; do
    case $1 in
      -h | --help) usage; return 0 ;;
      -m | --model) [ $# -ge 2 ] || { echo "$1 needs a value" >&2; return 2; }; train+=("model.path=$(quoted "$(here "$2")")"); shift 2 ;;
      -d | --data) [ $# -ge 2 ] || { echo "$1 needs a value" >&2; return 2; }; data+=("data.path=$(quoted "$(here "$2")")"); given_data=yes; shift 2 ;;
      --deepspeed)
        [ $# -ge 2 ] || { echo "$1 needs a value" >&2; return 2; }
        case $2 in
          *.json)
            # Which ZeRO stage a file is for stands in the file; deepspeed=zero3 beside it says so where its name does not.
            case $2 in *zero3*) train+=(deepspeed=zero3) ;; *) train+=(deepspeed=zero2) ;; esac
            train+=("deepspeed.config=$(quoted "$(here "$2")")") ;;
          *) train+=("deepspeed=$2") ;;
        esac
        shift 2 ;;
      data.*) data+=("$1"); given_data=yes; shift ;;
      run=* | outputs=* | dry_run=* | force=*) common+=("$1"); shift ;;
      *=*) train+=("$1"); shift ;;
      *) echo "unknown argument '$1'" >&2; usage >&2; return 2 ;;
    esac
  done
  [ -n "${GPUS_PER_NODE:-}" ] && train+=("launch.nproc_per_node=$GPUS_PER_NODE")
  [ -n "${NNODES:-}" ] && train+=("launch.nnodes=$NNODES")
  [ -n "${NODE_RANK:-}" ] && train+=("launch.node_rank=$NODE_RANK")
  [ -n "${MASTER_ADDR:-}" ] && train+=("launch.master_addr=$MASTER_ADDR")
  [ -n "${MASTER_PORT:-}" ] && train+=("launch.master_port=$MASTER_PORT")
  cd "$root"
  # A misspelt setting or a missing model should not cost the time the data takes.
  "$python" -m src.finetune "${common[@]}" "${train[@]}" --settings-only || return
  [ -z "$given_data" ] || "$python" -m src.data "${common[@]}" "${data[@]}" || return
  "$python" -m src.finetune "${common[@]}" "${train[@]}"
}
