"""Token ids for AXERA's older `main` runtime, which asks a server for them.

Builds of 2024 ask GET /bos_id and /eos_id, POST /encode and /decode, one question at a time. Those of 2025 take a uid at GET /get_uid and send it with
everything: a conversation each, begun anew by POST /reset with a system_prompt (or GET /reset), whose answers' `diff` holds the ids that are new.
Answers on loopback only. Needs the packages tokenizers and jinja2; reads the files in hf/ beside this one.
"""

import argparse
import json
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

HF = Path(__file__).resolve().parent / "hf"
TALKS = 64  # conversations kept; the oldest goes


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
    def __init__(self, system: str = ""):
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

    def render(self, messages: list[dict], *, opened: bool = True) -> str:
        """A conversation inside the chat template; opened: for an answer."""
        return self.template.render(messages=messages, add_generation_prompt=opened, tools=None, **self.special)

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False)


class Talk:
    """One conversation. known: ids the runtime has in its cache."""

    def __init__(self, tokens: Tokens):
        self.tokens = tokens
        self.reset(tokens.system)

    def reset(self, system: str) -> list[int]:
        """Begin anew with a system text; the ids of that turn, none where there is no such turn or the template has none without a question."""
        self.messages = [{"role": "system", "content": system}] if system else []
        try:
            self.known = self.tokens.ids(self.tokens.render(self.messages, opened=False)) if system else []
        except Exception:  # a template may refuse a conversation of a system turn alone, in words and classes of its own
            self.known = []
        return self.known

    def ask(self, text: str, last_reply: str | None) -> dict:
        """The next question: the whole conversation's ids, those that are new, and its text."""
        if last_reply:
            self.messages.append({"role": "assistant", "content": last_reply})
            self.known = self.tokens.ids(self.tokens.render(self.messages, opened=False))
        self.messages.append({"role": "user", "content": text})
        rendered = self.tokens.render(self.messages)
        ids = self.tokens.ids(rendered)
        same = next((k for k, (a, b) in enumerate(zip(self.known, ids)) if a != b), min(len(self.known), len(ids)))
        self.known = ids
        return {"token_ids": ids, "diff": ids[same:], "text": rendered}


class Handler(BaseHTTPRequestHandler):
    tokens: Tokens
    talks: dict[str, Talk] = {}

    def do_GET(self):
        path, _, query = self.path.partition("?")
        uid = urllib.parse.parse_qs(query).get("uid", [None])[0]
        names = {"/bos_id": "bos_token", "/eos_id": "eos_token"}
        if path == "/get_uid":
            self.answer({"uid": self.begin()})
        elif path not in (*names, "/reset"):
            self.answer({"error": "no such path"}, 404)
        elif (uid is not None or path == "/reset") and uid not in self.talks:
            self.answer({"error": "Invalid uid"}, 400)
        elif path == "/reset":
            talk = self.talks[uid]
            self.answer({"success": True, "token_ids": talk.reset(self.tokens.system)})
        else:
            self.answer({path[1:]: self.tokens.id(names[path])})

    def do_POST(self):
        try:
            asked = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)))
            if self.path not in ("/encode", "/decode", "/reset"):
                self.answer({"error": "no such path"}, 404)
            elif ("uid" in asked or self.path == "/reset") and asked.get("uid") not in self.talks:
                self.answer({"error": "Invalid uid"}, 400)
            elif self.path == "/decode":
                self.answer({"text": self.tokens.decode(asked["token_ids"])})
            elif self.path == "/reset":
                system = asked.get("system_prompt")
                self.answer({"token_ids": self.talks[asked["uid"]].reset(self.tokens.system if system is None else system)})
            else:
                talk = self.talks[asked["uid"]] if "uid" in asked else Talk(self.tokens)
                found = talk.ask(asked["text"], asked.get("last_reply"))
                self.answer(found if "uid" in asked else {**found, "diff": found["token_ids"]})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            self.answer({"error": str(error)}, 400)

    def begin(self) -> str:
        uid = str(uuid.uuid4())
        self.talks[uid] = Talk(self.tokens)
        while len(self.talks) > TALKS:
            del self.talks[next(iter(self.talks))]
        return uid

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
