#!/bin/sh
# Starts this folder's model on the board.
#   ./run.sh run              talk to it (axllm)
#   ./run.sh serve [PORT]     OpenAI-compatible server (axllm), port 8000
#   ./run.sh main "PROMPT"    one answer from the older runtime; MAIN=/path/to/main names it
set -eu
cd "$(dirname "$0")"

main_of() {
  for name in "${MAIN:-}" ./main_ax650 ./main_axcl_aarch64 ./main_axcl_x86 ./main ./main_prefill \
    main_ax650 main_axcl_aarch64 main_axcl_x86 main main_prefill; do
    if [ -n "$name" ] && command -v "$name" >/dev/null 2>&1; then command -v "$name"; return; fi
  done
  echo "no main, main_prefill, main_ax650, main_axcl_aarch64 or main_axcl_x86 in this folder or on PATH; MAIN=/path/to/main ./run.sh main \"...\"" >&2
  exit 7
}

need() {
  command -v "$1" >/dev/null 2>&1 || { echo "$1 is not on this board; $2" >&2; exit 7; }
}

with_axllm() {
  why=@WHY_NOT@
  if [ -n "$why" ]; then echo "not for axllm: $why; ./run.sh main \"PROMPT\" runs it" >&2; exit 7; fi
  [ -f @POST@ ] || { echo "the layers are not compiled yet; see README.md" >&2; exit 7; }
  need axllm "it is built from the axllm branch of AXERA-TECH/ax-llm"
}

case "${1:-}" in
  run)
    with_axllm
    exec axllm run . ;;
  serve)
    with_axllm
    exec axllm serve . --port "${2:-8000}" ;;
  main)
    prompt=${2:?a prompt, as in: ./run.sh main \"Hello\"}
    [ -f @POST@ ] || { echo "the layers are not compiled yet; see README.md" >&2; exit 7; }
    runtime=$(main_of)
    need python3 "the older runtime asks a tokenizer server, which is tokenizer_server.py here"
    port=${PORT:-12345}
    system=@SYSTEM@
    python3 tokenizer_server.py --port "$port" --system "$system" &
    server=$!
    trap 'kill $server 2>/dev/null' EXIT INT TERM
    python3 tokenizer_server.py --port "$port" --wait
    # A build ends at an option that it does not know, so those that not every build has are given where its help lists them.
    help=$("$runtime" --help 2>&1 || true)
    offers() { printf '%s\n' "$help" | grep -q -e "--$1"; }
    # Builds of 2025 call the tokenizer's address otherwise and take the system text themselves.
    if offers url_tokenizer_model; then
      set -- --url_tokenizer_model "http://127.0.0.1:$port" --system_prompt "$system"
    else
      set -- --filename_tokenizer_model "http://127.0.0.1:$port" --bos 0 --eos 0
    fi
    ! offers post_config_path || set -- "$@" --post_config_path post_config.json
    ! offers use_topk || set -- "$@" --use_topk @TOPK@
    devices=@DEVICES@
    ! offers devices || set -- "$@" --devices "${DEVICES:-$devices}"
    set -- "$@" --template_filename_axmodel @LAYERS@ --axmodel_num @COUNT@ --tokenizer_type 2 \
      --filename_post_axmodel @POST@ --filename_tokens_embed @EMBEDDING@ --tokens_embed_num @ROWS@ --tokens_embed_size @WIDTH@ \
      --use_mmap_load_embed 1 --live_print 1
    if [ -z "$help" ] || offers prompt; then
      "$runtime" "$@" --prompt "$prompt"
    else # builds of 2025 ask for questions instead, until one is q
      printf '%s\nq\n' "$prompt" | "$runtime" "$@"
    fi ;;
  *)
    sed -n '2,5s/^# \{0,1\}//p' "$0" >&2
    exit 2 ;;
esac
