"""Questions to a bundle, answered inside the exporter's environment: `python -I inside.py QUESTION.json ANSWER.json`.

Stands alone: that environment has openvino_genai but nothing of this project. The question is {"bundle": folder, "device": "CPU", "do": name, ...}:

convert: {"model": folder, "trust": bool, "unmade": [str]} -> {}; writes openvino_tokenizer.xml anew without the pieces `unmade`.
render: {"conversations": [{"messages", "tools"}]} -> {"texts": [str or null]}, by the chat template in openvino_tokenizer.xml.
encode: {"texts": [str]} -> {"ids": [[int]], "read": [str]}, token ids by openvino_tokenizer.xml and what openvino_detokenizer.xml makes of them.
observe: {"rows": [{"ids": [int], "keep": [int], "targets": [int], "top_k_ids": [[int]]}]} -> {"rows": [{"losses": [nats], "log_probs": [[nats]],
    "likeliest": [int]}]} at the positions `keep`, computed as the device does by default.
answer: {"prompts": [[int]], "tokens": int} -> {"ids": [[int]], "tokens_per_second", "first_token_ms", "load_seconds"}, greedy answers and medians.
"""

import json
import sys
import time
from pathlib import Path
from statistics import median


def convert(question: dict) -> dict:
    import openvino
    from openvino_tokenizers import convert_tokenizer
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(question["model"], trust_remote_code=question["trust"])
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    unmade = set(question["unmade"])
    # ÿ is byte 0xFF in a byte-level vocabulary, and no UTF-8 text has it: a piece of that name is never found.
    spec["model"]["vocab"] = {f"ÿÿ{id}" if piece in unmade else piece: id for piece, id in spec["model"]["vocab"].items()}
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(spec))
    openvino.save_model(convert_tokenizer(tokenizer, with_detokenizer=False), Path(question["bundle"]) / "openvino_tokenizer.xml")
    return {}


def render(question: dict) -> dict:
    tokenizer = _tokenizer(question)
    return {"texts": [_rendered(tokenizer, talk["messages"], talk["tools"]) for talk in question["conversations"]]}


def _rendered(tokenizer, messages: list[dict], tools: list[dict] | None) -> str | None:
    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, **({"tools": tools} if tools else {}))
    except RuntimeError:  # of the template itself, or of GenAI's reading of it
        return None


def encode(question: dict) -> dict:
    tokenizer = _tokenizer(question)
    ids = [tokenizer.encode(text, add_special_tokens=False).input_ids.data[0].tolist() for text in question["texts"]]
    return {"ids": ids, "read": [tokenizer.decode(row, skip_special_tokens=False) if row else "" for row in ids]}


def observe(question: dict) -> dict:
    import numpy
    import openvino

    model = openvino.Core().compile_model(Path(question["bundle"]) / "openvino_model.xml", question["device"])
    names, request, found = {name for given in model.inputs for name in given.names}, model.create_infer_request(), []
    for row in question["rows"]:
        length = len(row["ids"])
        given = {
            "input_ids": numpy.array([row["ids"]], dtype=numpy.int64),
            "attention_mask": numpy.ones((1, length), dtype=numpy.int64),
            "position_ids": numpy.arange(length, dtype=numpy.int64)[None],
            "beam_idx": numpy.zeros(1, dtype=numpy.int32),
        }
        request.reset_state()
        logits = request.infer({name: value for name, value in given.items() if name in names})["logits"][0, row["keep"]].astype(
            numpy.float64
        )
        logits -= logits.max(1, keepdims=True)
        log_probs = logits - numpy.log(numpy.exp(logits).sum(1, keepdims=True))
        found.append(
            {
                "losses": (-log_probs[range(len(log_probs)), row["targets"]]).tolist(),
                "log_probs": numpy.take_along_axis(log_probs, numpy.array(row["top_k_ids"]), 1).tolist(),
                "likeliest": log_probs.argmax(1).tolist(),
            }
        )
    return {"rows": found}


def answer(question: dict) -> dict:
    import numpy
    import openvino
    import openvino_genai

    start = time.perf_counter()
    pipe = openvino_genai.LLMPipeline(question["bundle"], question["device"])
    load = time.perf_counter() - start
    config = openvino_genai.GenerationConfig()
    stops = pipe.get_generation_config()
    config.max_new_tokens, config.do_sample = question["tokens"], False
    config.eos_token_id, config.stop_token_ids = stops.eos_token_id, stops.stop_token_ids
    ids, speeds, firsts = [], [], []
    for prompt in [question["prompts"][0], *question["prompts"]]:  # the first one twice: it warms up
        row = numpy.array([prompt], dtype=numpy.int64)
        given = openvino_genai.TokenizedInputs(openvino.Tensor(row), openvino.Tensor(numpy.ones_like(row)))
        done = pipe.generate(given, config)
        ids.append(list(done.tokens[0]))
        speeds.append(done.perf_metrics.get_throughput().mean)
        firsts.append(done.perf_metrics.get_ttft().mean)
    return {
        "ids": ids[1:],
        "tokens_per_second": round(median(speeds[1:]), 1),
        "first_token_ms": round(median(firsts[1:]), 2),
        "load_seconds": round(load, 2),
    }


def _tokenizer(question: dict):
    import openvino_genai

    return openvino_genai.Tokenizer(question["bundle"])


if __name__ == "__main__":
    asked = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    Path(sys.argv[2]).write_text(
        json.dumps({"convert": convert, "render": render, "encode": encode, "observe": observe, "answer": answer}[asked["do"]](asked)),
        "utf-8",
    )
