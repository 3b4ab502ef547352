"""Token ids for AXERA's older `main` runtime, which asks a server for them: GET /bos_id and /eos_id, POST /encode and /decode.

Answers on loopback only. Needs the packages tokenizers and jinja2; reads the files in hf/ beside this one.
"""

import argparse
import json
import time
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

HF = Path(__file__).resolve().parent / "hf"


def template(config: dict):
    """The model's chat template, as transformers compiles it."""
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message):
        raise ValueError(message)

    text = (HF / "chat_template.jinja").read_text(encoding="utf-8") if (HF / "chat_template.jinja").is_file() else config["chat_template"]
    world = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    world.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, indent=options.get("indent"))
    world.globals |= {"raise_exception": refuse, "strftime_now": time.strftime}
    return world.from_string(text)


class Tokens:
    def __init__(self, system: str):
        from tokenizers import Tokenizer

        config = json.loads((HF / "tokenizer_config.json").read_text(encoding="utf-8"))
        self.tokenizer = Tokenizer.from_file(str(HF / "tokenizer.json"))
        self.template = template(config)
        self.special = {
            key: value["content"] if isinstance(value, dict) else value for key, value in config.items() if key.endswith("_token") and value
        }
        self.system = system

    def id(self, name: str) -> int:
        found = self.tokenizer.token_to_id(self.special[name]) if name in self.special else None
        return -1 if found is None else found

    def encode(self, text: str) -> list[int]:
        """Ids of one question, inside the chat template and opened for the answer."""
        turns = [{"role": "system", "content": self.system}] if self.system else []
        turns.append({"role": "user", "content": text})
        rendered = self.template.render(messages=turns, add_generation_prompt=True, tools=None, **self.special)
        return self.tokenizer.encode(rendered, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False)


class Handler(BaseHTTPRequestHandler):
    tokens: Tokens

    def do_GET(self):
        names = {"/bos_id": "bos_token", "/eos_id": "eos_token"}
        if self.path in names:
            self.answer({self.path[1:]: self.tokens.id(names[self.path])})
        else:
            self.answer({"error": "no such path"}, 404)

    def do_POST(self):
        try:
            asked = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)))
            if self.path == "/encode":
                self.answer({"token_ids": self.tokens.encode(asked["text"])})
            elif self.path == "/decode":
                self.answer({"text": self.tokens.decode(asked["token_ids"])})
            else:
                self.answer({"error": "no such path"}, 404)
        except (ValueError, KeyError, TypeError) as error:
            self.answer({"error": str(error)}, 400)

    def answer(self, value: dict, status: int = 200):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


def wait(port: int, seconds: float = 60) -> None:
    """Return when a server answers on the port; exit with 1 where none does in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/eos_id", timeout=1).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise SystemExit(f"no tokenizer server on port {port} after {seconds:.0f} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=12345)
    parser.add_argument("--system", default="", help="system text for every question")
    parser.add_argument("--wait", action="store_true", help="wait until a server answers, instead of being one")
    options = parser.parse_args()
    if options.wait:
        wait(options.port)
    else:
        Handler.tokens = Tokens(options.system)
        ThreadingHTTPServer(("127.0.0.1", options.port), Handler).serve_forever()
