"""Questions to llama.cpp, answered inside its environment: `python -I inside.py QUESTION.json ANSWER.json`.

Stands alone: that environment has nothing of this project. xllamacpp brings llama.cpp, whose C functions are called as llama-cpp-py-sync declares them from
its headers; a library that quantizes is the latter's own, or lies in the environment's folder `quantizer`. The question is
{"do": name, "file": GGUF, "adapter": GGUF of a LoRA or null, "kv_cache": "f16" or "q8_0", "threads": int, ...}:

encode: {"texts": [str], "ids": [int]} -> {"ids": [[int]], "ends": [int]}: token ids of texts with control tokens in them, and which of `ids` end an answer.
observe: {"rows": [{"ids": [int], "keep": [int], "targets": [int], "top_k_ids": [[int]]}]} -> {"rows": [{"losses": [nats], "log_probs": [[nats]],
    "likeliest": [int]}]} at the positions `keep`.
answer: {"prompts": [[int]], "tokens": int} -> {"ids": [[int]], "tokens_per_second", "prompt_tokens_per_second", "load_seconds"}, greedy answers and medians.
able: {} -> {"quantizes": bool}, whether there is a library that does.
quantize: {"out": file, "type": its number in llama.cpp, "importance": .npz of {tensor: fp32 (columns,)} or null} -> {"seconds"}.
"""

import json
import sys
import time
from pathlib import Path
from statistics import median

import numpy
import xllamacpp.xllamacpp
from llama_cpp_py_sync import _cffi_bindings

ffi = _cffi_bindings.get_ffi()
lib = ffi.dlopen(xllamacpp.xllamacpp.__file__)


class Model:
    """A question's GGUF as llama.cpp holds it. context: tokens that it can be asked about at once; 0: its vocabulary alone."""

    def __init__(self, question: dict, context: int):
        file, threads, adapter = question["file"], question["threads"], question["adapter"]
        settings = lib.llama_model_default_params()
        settings.vocab_only = not context
        self.model = lib.llama_model_load_from_file(file.encode(), settings)
        if self.model == ffi.NULL:
            raise SystemExit(f"llama.cpp does not load {file}; what it said stands above")
        self.vocab = lib.llama_model_get_vocab(self.model)
        self.size = lib.llama_vocab_n_tokens(self.vocab)
        if context:
            how = lib.llama_context_default_params()
            if (how.n_batch, how.n_ubatch) != (2048, 512):
                raise SystemExit("this library of llama.cpp and what is declared of it do not belong together")
            how.n_ctx = how.n_batch = max(context, 64)
            how.n_threads = how.n_threads_batch = threads
            if question["kv_cache"] != "f16":
                how.type_k = how.type_v = getattr(lib, f"GGML_TYPE_{question['kv_cache'].upper()}")
                how.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_ENABLED  # without which values stay in f16
            self.context = lib.llama_init_from_model(self.model, how)
            if self.context == ffi.NULL:
                raise SystemExit(f"llama.cpp makes no context of {context} tokens for {file}")
            self.batch = lib.llama_batch_init(how.n_batch, 0, 1)
            if adapter:
                self.adapter = lib.llama_adapter_lora_init(self.model, adapter.encode())
                if self.adapter == ffi.NULL:
                    raise SystemExit(f"llama.cpp does not load {adapter} beside {file}; what it said stands above")
                given = ffi.new("struct llama_adapter_lora *[]", [self.adapter])
                if code := lib.llama_set_adapters_lora(self.context, given, 1, ffi.new("float[]", [1.0])):
                    raise SystemExit(f"llama.cpp does not take the adapter ({code})")

    def encode(self, text: str) -> list:
        data = text.encode()
        ids = ffi.new("llama_token[]", len(data) + 8)
        count = lib.llama_tokenize(self.vocab, data, len(data), ids, len(data) + 8, False, True)
        if count < 0:
            raise SystemExit(f"llama.cpp does not tokenize {text!r}")
        return list(ids[0:count])

    def clear(self) -> None:
        lib.llama_memory_clear(lib.llama_get_memory(self.context), True)

    def take(self, ids: list, begin: int, keep: list) -> None:
        """Run tokens that stand at `begin` on, and keep the logits at these places among them."""
        wanted = set(keep)
        for i, id in enumerate(ids):
            self.batch.token[i], self.batch.pos[i], self.batch.n_seq_id[i] = id, begin + i, 1
            self.batch.seq_id[i][0], self.batch.logits[i] = 0, i in wanted
        self.batch.n_tokens = len(ids)
        if code := lib.llama_decode(self.context, self.batch):
            raise SystemExit(f"llama.cpp stopped at {len(ids)} tokens (llama_decode: {code})")

    def logits(self, at: int) -> numpy.ndarray:
        """fp32 (vocabulary,) behind the token at this place; gone with the next `take`."""
        return numpy.frombuffer(ffi.buffer(lib.llama_get_logits_ith(self.context, at), 4 * self.size), numpy.float32)


def encode(question: dict) -> dict:
    model = Model(question, 0)
    ids = [model.encode(text) for text in question["texts"]]
    return {"ids": ids, "ends": [id for id in question["ids"] if lib.llama_vocab_is_eog(model.vocab, id)]}


def observe(question: dict) -> dict:
    rows = question["rows"]
    model, found = Model(question, max(len(row["ids"]) for row in rows)), []
    for row in rows:
        model.clear()
        model.take(row["ids"], 0, row["keep"])
        seen: dict = {"losses": [], "log_probs": [], "likeliest": []}
        for at, target, ids in zip(row["keep"], row["targets"], row["top_k_ids"]):
            logits = model.logits(at).astype(numpy.float64)
            logits -= logits.max()
            logits -= numpy.log(numpy.exp(logits).sum())
            seen["losses"].append(-float(logits[target]))
            seen["log_probs"].append(logits[ids].tolist())
            seen["likeliest"].append(int(logits.argmax()))
        found.append(seen)
    return {"rows": found}


def answer(question: dict) -> dict:
    start = time.perf_counter()
    room = max(map(len, question["prompts"])) + question["tokens"]
    model = Model(question, room)
    load, answers, prefills, speeds = time.perf_counter() - start, [], [], []
    for prompt in question["prompts"]:
        model.clear()
        begun = time.perf_counter()
        model.take(prompt, 0, [len(prompt) - 1])
        said, at = [int(model.logits(len(prompt) - 1).argmax())], len(prompt)
        first = time.perf_counter()
        while len(said) < question["tokens"] and not lib.llama_vocab_is_eog(model.vocab, said[-1]):
            model.take(said[-1:], at, [0])
            said.append(int(model.logits(0).argmax()))
            at += 1
        answers.append(said)
        prefills.append(len(prompt) / (first - begun))
        speeds.append((len(said) - 1) / max(time.perf_counter() - first, 1e-9))
    return {
        "ids": answers,
        "tokens_per_second": round(median(speeds), 1),
        "prompt_tokens_per_second": round(median(prefills), 1),
        "load_seconds": round(load, 2),
    }


def quantizer():
    """A library of llama.cpp with llama_model_quantize in it."""
    found = sorted((Path(sys.prefix) / "quantizer").glob("libllama.*so"))
    return ffi.dlopen(str(found[0])) if found else _cffi_bindings.get_lib()


def able(question: dict) -> dict:
    try:
        return {"quantizes": bool(quantizer())}
    except (OSError, RuntimeError):  # a C library older than it was built for
        return {"quantizes": False}


def quantize(question: dict) -> dict:
    lib = quantizer()
    settings = lib.llama_model_quantize_default_params()
    if settings.quantize_output_tensor is not True or settings.pure or settings.dry_run or settings.imatrix != ffi.NULL:
        raise SystemExit("this library of llama.cpp and what is declared of it do not belong together")
    settings.nthread, settings.ftype = question["threads"], question["type"]
    kept = []
    if question["importance"]:
        entries = list(numpy.load(question["importance"], allow_pickle=False).items())
        rows = ffi.new("struct llama_model_imatrix_data[]", len(entries) + 1)  # ends with one without a name
        for row, (name, values) in zip(rows, entries):
            values = numpy.ascontiguousarray(values, numpy.float32)
            kept += [text := ffi.new("char[]", name.encode()), values]
            row.name, row.data, row.size = text, ffi.cast("float *", values.ctypes.data), len(values)
        settings.imatrix = rows
    begun = time.perf_counter()
    if code := lib.llama_model_quantize(question["file"].encode(), question["out"].encode(), ffi.addressof(settings)):
        raise SystemExit(f"llama.cpp's quantizer failed ({code})")
    return {"seconds": round(time.perf_counter() - begun, 1)}


if __name__ == "__main__":
    asked = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    done = {"encode": encode, "observe": observe, "answer": answer, "able": able, "quantize": quantize}[asked["do"]](asked)
    Path(sys.argv[2]).write_text(json.dumps(done), "utf-8")
