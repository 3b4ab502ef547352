"""An OpenVINO bundle that answers, inside the runtime's environment: `python -I openvino_child.py BUNDLE DEVICE ROOM PROMPT_LEN`.

Stands alone: that environment has openvino_genai but nothing of this project. First {"ready": true}; then for each line of stdin {"messages", "tools",
"max_tokens", "temperature", "top_p", "seed", "stop"} the lines {"piece": str} as they are made and {"text", "finish", "ended", "prompt_tokens", "tokens"}, or
{"tokens", "room"} where the conversation is too long, or {"fault": str} where the template refuses it. An empty line ends an answer.
"""

import json
import os
import select
import sys

import numpy
import openvino
import openvino_genai

bundle, device, room, prompt_len = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
told = os.fdopen(os.dup(1), "w", encoding="utf-8")
os.dup2(2, 1)  # what libraries print is no answer
held = b""


def tell(**what) -> None:
    told.write(json.dumps(what) + "\n")
    told.flush()


def line() -> bytes:
    """The next line of stdin; empty at its end."""
    global held
    while b"\n" not in held:
        some = os.read(0, 1 << 16)
        if not some:
            return b""
        held += some
    first, _, held = held.partition(b"\n")
    return first + b"\n"


def stopped() -> bool:
    """Whether something came on stdin, which while an answer is made is the word to end it."""
    return bool(held) or bool(select.select([0], [], [], 0)[0])


options = {"MAX_PROMPT_LEN": prompt_len, "MIN_RESPONSE_LEN": room - prompt_len} if device == "NPU" else {}
pipe = openvino_genai.LLMPipeline(bundle, device, **options)
tokenizer, usual = pipe.get_tokenizer(), pipe.get_generation_config()
ends = {usual.eos_token_id, *usual.stop_token_ids}
tell(ready=True)

while asked := line():
    if not asked.strip():
        continue
    question = json.loads(asked)
    try:
        given = {"tools": question["tools"]} if question["tools"] else {}
        text = tokenizer.apply_chat_template(question["messages"], add_generation_prompt=True, **given)
    except RuntimeError as error:
        tell(fault=str(error)[:300])
        continue
    ids = tokenizer.encode(text, add_special_tokens=False).input_ids.data[0].tolist()
    if len(ids) > (prompt_len if device == "NPU" else room - 1):
        tell(tokens=len(ids), room=room)
        continue
    config = openvino_genai.GenerationConfig()
    config.max_new_tokens = min(question["max_tokens"], room - len(ids))
    config.eos_token_id, config.stop_token_ids = usual.eos_token_id, usual.stop_token_ids
    config.stop_strings = set(question["stop"])
    config.do_sample = question["temperature"] > 0
    if config.do_sample:
        config.temperature, config.top_p, config.top_k, config.rng_seed = (
            question["temperature"],
            question["top_p"],
            1 << 30,
            question["seed"],
        )

    def streamed(piece: str):
        tell(piece=piece)
        return openvino_genai.StreamingStatus.STOP if stopped() else openvino_genai.StreamingStatus.RUNNING

    row = numpy.array([ids], dtype=numpy.int64)
    inputs = openvino_genai.TokenizedInputs(openvino.Tensor(row), openvino.Tensor(numpy.ones_like(row)))
    tokens = list(pipe.generate(inputs, config, streamed).tokens[0])
    ended = bool(tokens) and tokens[-1] in ends
    said = tokenizer.decode(tokens[:-1] if ended else tokens, skip_special_tokens=True) if tokens else ""
    cut = min((at for at in map(said.find, question["stop"]) if at >= 0), default=None)
    finish = "stop" if ended or cut is not None else "length"
    tell(text=said[:cut], finish=finish, ended=ended and cut is None, prompt_tokens=len(ids), tokens=len(tokens))
