"""An OpenVINO bundle that answers, inside the runtime's environment: `python -I openvino_child.py BUNDLE DEVICE ROOM PROMPT_LEN`.

Stands alone: that environment has openvino_genai but nothing of this project. First {"ready": true}; then for each line of stdin {"messages", "tools",
"max_tokens", "temperature", "top_p", "seed", "stop"} the lines {"piece": str} as they are made and {"text", "finish", "ended", "prompt_tokens", "tokens"}, or
{"tokens", "room"} where the conversation is too long, or {"fault": str} where the template refuses it. An empty line ends an answer.
"""

import json
import os
import select
import sys


class Lines:
    """Lines of JSON to and from whoever started this. What libraries print is none of them."""

    def __init__(self):
        self._told = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        self._held = b""

    def tell(self, **what) -> None:
        self._told.write(json.dumps(what) + "\n")
        self._told.flush()

    def read(self) -> bytes:
        """The next line of stdin; empty at its end."""
        while b"\n" not in self._held:
            some = os.read(0, 1 << 16)
            if not some:
                return b""
            self._held += some
        first, _, self._held = self._held.partition(b"\n")
        return first + b"\n"

    def called(self) -> bool:
        """Whether something came on stdin, which while an answer is made is the word to end it."""
        return bool(self._held) or bool(select.select([0], [], [], 0)[0])


def main(bundle: str, device: str, room: int, prompt_len: int) -> None:
    lines = Lines()
    import openvino_genai

    options = {"MAX_PROMPT_LEN": prompt_len, "MIN_RESPONSE_LEN": room - prompt_len} if device == "NPU" else {}
    pipe = openvino_genai.LLMPipeline(bundle, device, **options)
    most = prompt_len if device == "NPU" else room - 1
    lines.tell(ready=True)
    while asked := lines.read():
        if asked.strip():
            lines.tell(**answer(pipe, json.loads(asked), room, most, lines))


def answer(pipe, question: dict, room: int, most: int, lines: Lines) -> dict:
    """What is told last. room: tokens of prompt and answer, most: of a prompt."""
    import numpy
    import openvino
    import openvino_genai

    tokenizer = pipe.get_tokenizer()
    try:
        given = {"tools": question["tools"]} if question["tools"] else {}
        text = tokenizer.apply_chat_template(question["messages"], add_generation_prompt=True, **given)
    except RuntimeError as error:
        return {"fault": str(error)[:300]}
    ids = tokenizer.encode(text, add_special_tokens=False).input_ids.data[0].tolist()
    if len(ids) > most:
        return {"tokens": len(ids), "room": room}
    config = settings(question, pipe.get_generation_config(), room - len(ids))

    def streamed(piece: str):
        lines.tell(piece=piece)
        return openvino_genai.StreamingStatus.STOP if lines.called() else openvino_genai.StreamingStatus.RUNNING

    row = numpy.array([ids], dtype=numpy.int64)
    inputs = openvino_genai.TokenizedInputs(openvino.Tensor(row), openvino.Tensor(numpy.ones_like(row)))
    tokens = list(pipe.generate(inputs, config, streamed).tokens[0])
    ended = bool(tokens) and tokens[-1] in {config.eos_token_id, *config.stop_token_ids}
    said = tokenizer.decode(tokens[:-1] if ended else tokens, skip_special_tokens=True) if tokens else ""
    cut = min((at for at in map(said.find, question["stop"]) if at >= 0), default=None)
    finish = "stop" if ended or cut is not None else "length"
    return {"text": said[:cut], "finish": finish, "ended": ended and cut is None, "prompt_tokens": len(ids), "tokens": len(tokens)}


def settings(question: dict, usual, most: int):
    """GenAI's generation settings of a question. usual: the bundle's own, of which the stop tokens stay."""
    import openvino_genai

    config = openvino_genai.GenerationConfig()
    config.max_new_tokens = min(question["max_tokens"], most)
    config.eos_token_id, config.stop_token_ids = usual.eos_token_id, usual.stop_token_ids
    config.stop_strings = set(question["stop"])
    config.do_sample = question["temperature"] > 0
    if config.do_sample:
        config.temperature, config.top_p, config.rng_seed = question["temperature"], question["top_p"], question["seed"]
        config.top_k = 1 << 30  # all of them
    return config


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
