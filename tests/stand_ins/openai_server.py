"""A stand-in for an OpenAI-compatible server (axllm serve, llama.cpp's server, vLLM): a real model answers, greedily, and every fault can be had.

Its words follow OpenAI's API reference; echo with log-probabilities is spelled as vLLM spells it (`token_id:7` for each token), or by each token's text.
"""

import json
import sys
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


@dataclass
class Behaviour:
    """What the server does to requests for an answer; the defaults are a server without faults."""

    models: list = field(default_factory=lambda: ["tiny-chat"])
    """names, or whole entries of the list"""
    first_delay: float = 0.0
    """seconds before the first token"""
    token_delay: float = 0.0
    """seconds before each further token, the turn's end included"""
    statuses: list = field(default_factory=list)
    """HTTP statuses of the next requests for an answer, used up one by one; None lets one through"""
    always: int | None = None
    """HTTP status of every request for an answer"""
    headers: dict = field(default_factory=dict)
    """beside such a status"""
    words: str = '{"error": {"message": "as told"}}'
    """body beside such a status"""
    usage: bool = True
    streams: str = "yes"
    """yes; refused: HTTP 400 for stream=true; ignored: one JSON reply; one_piece: a stream of one event"""
    refuses: tuple = ()
    """request fields answered with HTTP 400"""
    cut_after: int | None = None
    """pieces after which the connection is closed"""
    garbage: bytes | None = None
    """sent in place of the first event, or of the JSON reply"""
    echo: str = "no"
    """no: HTTP 400; ignored: none in the reply; ids, text: as given; shifted: each name one place late; other: another tokenizer's; next: of the
    next token only, by id, as llama.cpp's server has it; next_bos: the same with a token put before the prompt; next_pieces: nothing of a third
    of the tokens, as llama.cpp of a piece of a character, unless a bias makes another come; next_biased: the same, the bias counted in; next_deaf: no bias makes any come"""
    calls: tuple = ()
    """pieces of tool calls, as in a stream's `tool_calls`, in place of the answer's text"""
    lists_models: bool = True
    key: str | None = None
    """the bearer token it wants"""


class Server(ThreadingHTTPServer):
    """Listens on a free loopback port; `requests` holds (path, headers, body) of each request. Set `behaviour` at any time."""

    daemon_threads = False  # closing waits for answers under way: a thread inside torch at the interpreter's end aborts it

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()
        self.behaviour, self.requests = Behaviour(), []
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def handle_error(self, request, client_address):
        """A client that hangs up is no fault of the server's; anything else is."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def tokens(self, ids: list[int], limit: int):
        """Greedy token ids, one at a time, the end of the turn included."""
        given, past = torch.tensor([ids]), None
        for _ in range(limit):
            with torch.no_grad():
                out = self.model(given, past_key_values=past, use_cache=True)
            token, past = out.logits[0, -1].argmax().item(), out.past_key_values
            yield token
            if token == self.tokenizer.eos_token_id:
                return
            given = torch.tensor([[token]])

    def echoed(self, ids: list[int]) -> dict:
        how = self.behaviour.echo
        with torch.no_grad():
            table = self.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        extra = table[-1].argmax().item()
        name = (lambda i: f"token_id:{i}") if how in ("ids", "shifted") else lambda i: self.tokenizer.decode([i])
        whole = [*ids, extra]
        values = [None] + [table[k - 1, i].item() for k, i in enumerate(whole) if k]
        tops = [None] + [{name(t): table[k - 1, t].item() for t in (table[k - 1].argmax().item(), i)} for k, i in enumerate(whole) if k]
        names = [name(i) for i in whole]
        if how == "shifted":
            names = [names[0], *names[:-1]]
        if how == "other":
            names = [n[:1] for n in names]
        return {"tokens": names, "token_logprobs": values, "top_logprobs": tops, "text_offset": []}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.server.requests.append((self.path, dict(self.headers), None))
        behaviour = self.server.behaviour
        if self.path != "/v1/models" or not behaviour.lists_models:
            return self.send(404, b'{"error": {"message": "not found"}}')
        if self.unknown():
            return
        given = [m if isinstance(m, dict) else {"id": m, "object": "model", "owned_by": "stand-in"} for m in behaviour.models]
        self.reply({"object": "list", "data": given})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, dict(self.headers), body))
        behaviour = self.server.behaviour
        if self.unknown():
            return
        if self.path == "/v1/completions":
            return self.complete(body)
        if self.path != "/v1/chat/completions":
            return self.send(404, b"not found")
        status = behaviour.statuses.pop(0) if behaviour.statuses else behaviour.always
        if status:
            return self.send(status, behaviour.words.encode(), behaviour.headers)
        refused = [key for key in behaviour.refuses if key in body]
        if refused or (behaviour.streams == "refused" and body.get("stream")):
            return self.send(400, json.dumps({"error": {"message": f"no such setting: {refused or 'stream'}"}}).encode())
        self.chat(body)

    def unknown(self) -> bool:
        key = self.server.behaviour.key
        if key and self.headers.get("Authorization") != f"Bearer {key}":
            self.send(401, f'{{"error": {{"message": "wrong key: {self.headers.get("Authorization")}"}}}}'.encode())
            return True
        return False

    def chat(self, body: dict) -> None:
        server, behaviour, tokenizer = self.server, self.server.behaviour, self.server.tokenizer
        text = tokenizer.apply_chat_template(body["messages"], tools=body.get("tools"), tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False).input_ids
        if behaviour.calls:
            return self.call(behaviour.calls, bool(body.get("stream")))
        made, told, finish = [], "", "length"
        stream = body.get("stream") and behaviour.streams in ("yes", "one_piece")
        if stream:
            self.begin_stream()
        for k, token in enumerate(server.tokens(ids, body["max_tokens"])):
            time.sleep(behaviour.token_delay if k else behaviour.first_delay)
            made.append(token)
            if token == tokenizer.eos_token_id:
                finish = "stop"
                break
            whole = tokenizer.decode(made, skip_special_tokens=True)
            if stream and behaviour.streams == "yes" and not whole.endswith("\ufffd"):
                if behaviour.garbage is not None:
                    return self.piece(behaviour.garbage)
                if k == behaviour.cut_after:
                    self.close_connection = True
                    return
                self.event({"choices": [{"index": 0, "delta": {"content": whole[len(told) :]}, "finish_reason": None}]})
                told = whole
        answer = tokenizer.decode([t for t in made if t != tokenizer.eos_token_id], skip_special_tokens=True)
        usage = {"prompt_tokens": len(ids), "completion_tokens": len(made), "total_tokens": len(ids) + len(made)}
        if not stream:
            if behaviour.garbage is not None:
                return self.send(200, behaviour.garbage)
            message = {"role": "assistant", "content": answer}
            reply = {"choices": [{"index": 0, "message": message, "finish_reason": finish}]}
            return self.reply(reply | ({"usage": usage} if behaviour.usage else {}))
        if answer != told:
            self.event({"choices": [{"index": 0, "delta": {"content": answer[len(told) :]}, "finish_reason": None}]})
        self.event({"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]})
        if behaviour.usage and (body.get("stream_options") or {}).get("include_usage"):
            self.event({"choices": [], "usage": usage})
        self.piece(b"data: [DONE]\n\n")
        self.piece(b"")

    def call(self, pieces: tuple, stream: bool) -> None:
        if not stream:
            message = {"role": "assistant", "content": None, "tool_calls": list(pieces)}
            return self.reply({"choices": [{"index": 0, "message": message, "finish_reason": "tool_calls"}]})
        self.begin_stream()
        for piece in pieces:
            self.event({"choices": [{"index": 0, "delta": {"tool_calls": [piece]}, "finish_reason": None}]})
        self.event({"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]})
        self.piece(b"data: [DONE]\n\n")
        self.piece(b"")

    def complete(self, body: dict) -> None:
        how = self.server.behaviour.echo
        if how == "no":
            return self.send(400, b'{"error": {"message": "Only no echo is supported"}}')
        reply = {"choices": [{"index": 0, "text": "", "finish_reason": "length"}]}
        if how.startswith("next"):
            with torch.no_grad():
                table = self.server.model(torch.tensor([body["prompt"]])).logits[0, -1].double().log_softmax(-1)
            biases = {} if how == "next_deaf" else {int(id): bias for id, bias in body.get("logit_bias", {}).items()}
            biased = table.clone()
            for id, bias in biases.items():
                biased[id] += bias
            table = biased.log_softmax(-1) if how == "next_biased" else table
            made = biased.argmax().item()
            best = table.topk(min(body["logprobs"], len(table)))
            top = [{"id": i, "token": "", "logprob": v} for v, i in zip(best.values.tolist(), best.indices.tolist())]
            reply["choices"][0]["logprobs"] = {"content": [{"id": made, "token": "", "logprob": table[made].item(), "top_logprobs": top}]}
            reply["usage"] = {"prompt_tokens": len(body["prompt"]) + (how == "next_bos")}
            if (
                how in ("next_pieces", "next_biased") and not biases and best.indices[0] % 3 == 0
            ):  # as llama.cpp has it of a piece of a character
                reply["choices"][0]["logprobs"] = None
        elif how != "ignored":
            reply["choices"][0]["logprobs"] = self.server.echoed(body["prompt"])
        self.reply(reply)

    def begin_stream(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def event(self, value: dict) -> None:
        self.piece(b"data: " + json.dumps(value).encode() + b"\n\n")

    def piece(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()

    def reply(self, value: dict) -> None:
        self.send(200, json.dumps(value).encode())

    def send(self, status: int, data: bytes, headers: dict | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)
