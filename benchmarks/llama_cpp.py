"""llama.cpp on the weights of a Hugging Face Llama, for benchmarks/llama2c.py, in an environment of its own (pip install xllamacpp gguf safetensors numpy).

llama_cpp.py gguf FOLDER F32|Q8_0|Q4_0 FILE writes the model; llama_cpp.py run FILE TOKENS THREADS [PROMPT] has it write so many tokens, after a prompt of so many, and prints
its own figures.
"""

import json
import sys
from pathlib import Path


def write(folder: Path, kind: str, path: Path) -> None:
    """Embedding and norms apart, every matrix of the kind; with Q4_0 the output layer is Q8_0, as ours is int8 there."""
    import gguf
    from gguf.quants import quantize
    from safetensors import safe_open

    config = json.loads((folder / "config.json").read_text("utf-8"))
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    out = gguf.GGUFWriter(path, "llama")
    out.add_context_length(config["max_position_embeddings"])
    out.add_embedding_length(config["hidden_size"])
    out.add_block_count(config["num_hidden_layers"])
    out.add_feed_forward_length(config["intermediate_size"])
    out.add_head_count(heads)
    out.add_head_count_kv(kv_heads)
    out.add_layer_norm_rms_eps(config["rms_norm_eps"])
    out.add_rope_freq_base(10000.0)
    out.add_vocab_size(config["vocab_size"])
    out.add_tokenizer_model("llama")
    words = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    words += [f"t{i} " for i in range(len(words), config["vocab_size"])]
    out.add_token_list(words)
    out.add_token_scores([0.0] * len(words))
    out.add_token_types([2, 3, 3, *[6] * 256, *[1] * (len(words) - 259)])
    out.add_bos_token_id(1)
    out.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    with safe_open(folder / "model.safetensors", "np") as stored:
        for name in stored.keys():
            tensor, ours = stored.get_tensor(name), names.get_name(name, (".weight",))
            for part, count in (("q_proj", heads), ("k_proj", kv_heads)):
                if part in name:
                    tensor = tensor.reshape(count, 2, -1, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape)
            wanted = "F32" if tensor.ndim == 1 else "Q8_0" if kind == "Q4_0" and ("lm_head" in name or "embed" in name) else kind
            type = gguf.GGMLQuantizationType[wanted]
            out.add_tensor(ours, quantize(tensor, type) if wanted != "F32" else tensor, raw_dtype=type)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def run(path: Path, tokens: int, threads: int, prompt: int = 1) -> None:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.warmup, params.n_batch, params.n_ubatch = 1024, 1, False, 512, 512
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(params)
    wanted = {"prompt": [300] * prompt, "n_predict": tokens, "temperature": 0.0, "ignore_eos": True, "cache_prompt": False}
    answer = server.handle_completions(wanted)
    answer = answer if isinstance(answer, dict) else json.loads(answer)
    timings = answer.get("timings") or {}
    told = {
        "tokens": "predicted_n",
        "prompt": "prompt_n",
        "tokens_per_second": "predicted_per_second",
        "prompt_tokens_per_second": "prompt_per_second",
    }
    print(json.dumps({name: timings.get(theirs) for name, theirs in told.items()}), flush=True)


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    if what == "gguf":
        write(Path(rest[0]), rest[1], Path(rest[2]))
    else:
        run(Path(rest[0]), *map(int, rest[1:]))
