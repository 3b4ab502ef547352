"""A stand-in for a teacher: an OpenAI-compatible server whose answers are a function of what it is asked, with every fault there is, all seeded.

    python tests/stand_ins/teacher.py '{"latency": 0.1}'

prints its port and serves until it is killed. It is told how to behave by a JSON object (see Behaviour), and tells what it saw at GET /stand_in.
A request's faults follow from its content and from how often it came, so that a client that asks again gets its answer in the end.
"""

import asyncio
import dataclasses
import email.utils
import hashlib
import json
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Behaviour:
    seed: int = 0
    latency: float = 0.0
    """mean seconds to an answer, drawn between half and one and a half of it"""
    steady: bool = False
    """the same latency for each"""
    faults: dict = field(default_factory=dict)
    """{kind: share of requests that meet it, on their first or first two tries, the last two kinds on each}; kinds: seconds and date (429 with Retry-After), server (500), malformed
    (no JSON), shape (JSON of another form), dropped (the connection ends amid the body), refused (the connection ends before it), schema (an answer
    that is no JSON), empty"""
    cut: float = 0.0
    """share of requests whose answer is cut off, always"""
    always: float = 0.0
    """share of requests that get a 500 always"""
    wait: float = 0.2
    """seconds asked for by Retry-After, rounded up where it is a whole number or a date"""
    down_after: int | None = None
    """answers after which every request gets a 500"""
    most: int | None = None
    """requests at a time, more get 429"""
    key: str | None = None
    """the bearer token it wants; a refusal repeats the one it got"""
    status: int | None = None
    """status of every reply"""
    usage: bool = True
    tokens_per_byte: float = 0.25
    """prompt tokens it counts"""
    batch_seconds: float = 0.0
    """how long a batch takes"""
    batch_lost: float = 0.0
    """share of a batch's requests that expire on their first try"""
    words: int = 20
    thinks: str | None = None
    """where it puts what it thinks: "field" (reasoning_content), "inline" (<think> before the answer), "closed" (as inline, but its prompt opened it)"""


class Server:
    def __init__(self, behaviour: Behaviour):
        self.behaviour, self.came, self.answered, self.statuses = behaviour, Counter(), Counter(), Counter()
        self.now = self.most = self.tokens = self.prompt_tokens = 0
        self.times, self.bodies = [], []
        self.files, self.batches = {}, {}

    def state(self) -> dict:
        return {
            "came": self.came,
            "answered": self.answered,
            "statuses": self.statuses,
            "most": self.most,
            "tokens": self.tokens + self.prompt_tokens,
            "times": self.times,
            "batches": len(self.batches),
            "last": self.bodies,
        }

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                first, *lines = head.decode("latin-1").split("\r\n")
                headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
                body = await self._body(reader, headers)
                method, path, _ = first.split(" ")
                if not await self.reply(method, path, headers, body, writer):
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _body(self, reader, headers) -> bytes:
        if headers.get("transfer-encoding") != "chunked":
            return await reader.readexactly(int(headers.get("content-length", 0)))
        parts = []
        while size := int(await reader.readline(), 16):
            parts.append(await reader.readexactly(size))
            await reader.readline()
        await reader.readline()
        return b"".join(parts)

    async def reply(self, method, path, headers, body, writer) -> bool:
        """Whether the connection stays open."""
        if path == "/stand_in":
            return self.send(writer, 200, json.dumps(self.state()).encode())
        if path == "/stand_in/behave":
            self.behaviour = dataclasses.replace(self.behaviour, **json.loads(body))
            return self.send(writer, 200, b"{}")
        behaviour = self.behaviour
        if behaviour.status:
            location = {"Location": "http://elsewhere.example/v1?secret=1"} if 300 <= behaviour.status < 400 else {}
            return self.send(writer, behaviour.status, b'{"error": {"message": "as told"}}', location)
        if behaviour.key and headers.get("authorization") != f"Bearer {behaviour.key}":
            return self.send(writer, 401, json.dumps({"error": {"message": f"wrong key: {headers.get('authorization')}"}}).encode())
        if path.startswith(("/v1/files", "/v1/batches")):
            return self.batch(method, path, headers, body, writer)
        asked = json.loads(body)
        self.bodies = [*self.bodies[-4:], asked]
        return await self.answer(asked, content(asked), writer)

    async def answer(self, asked: dict, digest: str, writer) -> bool:
        behaviour = self.behaviour
        self.came[digest] += 1
        self.times.append(round(time.time(), 3))
        if behaviour.most is not None and self.now >= behaviour.most:
            return self.send(writer, 429, b'{"error": {"message": "busy"}}', {"Retry-After": str(behaviour.wait)})
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            spread = 1.0 if behaviour.steady else 0.5 + random.Random(f"{behaviour.seed} {digest} {self.came[digest]}").random()
            await asyncio.sleep(behaviour.latency * spread)
        finally:
            self.now -= 1
        down = behaviour.down_after is not None and self.answered.total() >= behaviour.down_after
        if down or share(behaviour, digest, "always") < behaviour.always:
            return self.send(writer, 500, b'{"error": {"message": "always"}}')
        fault = self.fault(digest)
        if fault in ("seconds", "date"):
            wait = behaviour.wait if fault == "seconds" else email.utils.formatdate(time.time() + max(behaviour.wait, 1.0), usegmt=True)
            return self.send(writer, 429, b'{"error": {"message": "slow down"}}', {"Retry-After": str(wait)})
        if fault == "server":
            return self.send(writer, 500, b'{"error": {"message": "it hurts"}}')
        if fault == "malformed":
            return self.send(writer, 200, b'{"choices": [{"message": {"content": "half')
        if fault == "shape":
            return self.send(writer, 200, b'{"choices": [{"message": "text"}]}')
        if fault == "refused":
            return False
        data = json.dumps(self.completion(asked, digest, bad=fault)).encode()
        if fault == "dropped":
            writer.write(
                b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(data), data[: len(data) // 2])
            )
            await writer.drain()
            return False
        if fault is None:
            self.answered[digest] += 1
        return self.send(writer, 200, data)

    def fault(self, digest: str) -> str | None:
        behaviour, place = self.behaviour, share(self.behaviour, digest, "fault")
        for kind, part in behaviour.faults.items():
            if place < part:
                lasting = kind in ("schema", "empty")  # an answer follows from what is asked, its seed included
                return kind if lasting or self.came[digest] <= 1 + (share(behaviour, digest, "twice") < 0.3) else None
            place -= part
        return None

    def completion(self, asked: dict, digest: str, bad: str | None = None) -> dict:
        behaviour, draw = self.behaviour, random.Random(f"{behaviour_seed(self.behaviour)} {digest}")
        schema = ((asked.get("response_format") or {}).get("json_schema") or {}).get("schema")
        text = f"{digest} " + " ".join(draw.choice(WORDS) for _ in range(behaviour.words))
        if schema:
            text = json.dumps(instance(schema, draw, digest))
        if bad == "schema":
            text = "I would rather say it in words."
        if bad == "empty":
            text = ""
        cut = share(behaviour, digest, "cut") < behaviour.cut
        given = json.dumps(asked.get("messages") or asked.get("prompt"), ensure_ascii=False)
        usage = {"prompt_tokens": max(1, int(len(given.encode()) * behaviour.tokens_per_byte)), "completion_tokens": len(text.split())}
        self.prompt_tokens += usage["prompt_tokens"]
        self.tokens += usage["completion_tokens"]
        thought = f"I think of {digest}." if behaviour.thinks and not schema else None
        before = {"inline": f"<think>\n{thought}\n</think>\n\n", "closed": f"{thought}\n</think>\n\n"}
        message = {"role": "assistant", "content": before.get(behaviour.thinks or "", "") + text if thought else text}
        message |= {"reasoning_content": thought} if behaviour.thinks == "field" and thought else {}
        said = {"text": text} if "prompt" in asked else {"message": message}
        found = {"object": "completion", "choices": [{"index": 0, **said, "finish_reason": "length" if cut else "stop"}]}
        return found | ({"usage": usage} if behaviour.usage else {})

    def batch(self, method, path, headers, body, writer) -> bool:
        """Files and batches as OpenAI's API reference has them."""
        _, _, kind, *rest = path.partition("?")[0].split("/")
        if kind == "files" and method == "POST":
            lines = body.split(b"\r\n\r\n", 2)[2].rpartition(b"\r\n--")[0] if b"\r\n\r\n" in body else b""
            id = f"file-{len(self.files)}"
            self.files[id] = b"\n".join(line for line in lines.split(b"\n") if line.startswith(b"{"))
            return self.send(writer, 200, json.dumps({"id": id, "object": "file", "purpose": "batch"}).encode())
        if kind == "files":
            return self.send(writer, 200, self.files[rest[0]])
        if method == "POST":
            id = f"batch-{len(self.batches)}"
            self.batches[id] = json.loads(body) | {"id": id, "status": "in_progress", "made": time.time()}
            return self.send(writer, 200, json.dumps(self.batches[id]).encode())
        if not rest:
            return self.send(writer, 200, json.dumps({"data": list(self.batches.values()), "has_more": False}).encode())
        found = self.batches[rest[0]]
        if found["status"] == "in_progress" and time.time() - found["made"] >= self.behaviour.batch_seconds:
            self.finish(found)
        return self.send(writer, 200, json.dumps(found).encode())

    def finish(self, batch: dict) -> None:
        done, failed = [], []
        for line in self.files[batch["input_file_id"]].decode().splitlines():
            entry = json.loads(line)
            digest = content(entry["body"])
            self.came[digest] += 1
            if self.came[digest] == 1 and share(self.behaviour, digest, "lost") < self.behaviour.batch_lost:
                failed.append({"custom_id": entry["custom_id"], "response": None, "error": {"code": "batch_expired", "message": "expired"}})
                continue
            self.answered[digest] += 1
            body = self.completion(entry["body"], digest)
            done.append({"custom_id": entry["custom_id"], "response": {"status_code": 200, "body": body}, "error": None})
        batch["status"] = "completed"
        for name, rows in (("output_file_id", done), ("error_file_id", failed)):
            if rows:
                batch[name] = f"file-{len(self.files)}"
                self.files[batch[name]] = "\n".join(json.dumps(row) for row in rows).encode()

    def send(self, writer, status: int, data: bytes, headers: dict | None = None) -> bool:
        self.statuses[str(status)] += 1
        more = "".join(f"{k}: {v}\r\n" for k, v in (headers or {}).items())
        writer.write(f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\n{more}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        return True


WORDS = [
    "river",
    "stone",
    "lamp",
    "green",
    "quick",
    "seven",
    "paper",
    "garden",
    "window",
    "honest",
    "bread",
    "morning",
    "little",
    "cloud",
    "answer",
    "thought",
]


def behaviour_seed(behaviour: Behaviour) -> int:
    return behaviour.seed


def content(asked: dict) -> str:
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]


def share(behaviour: Behaviour, digest: str, word: str) -> float:
    """A number between 0 and 1 that follows from the request alone."""
    return int(hashlib.sha256(f"{behaviour.seed} {word} {digest}".encode()).hexdigest()[:8], 16) / 2**32


def instance(schema: dict, draw: random.Random, digest: str):
    """Some value that fits a plain JSON schema."""
    if "enum" in schema:
        return draw.choice(schema["enum"])
    kind = schema.get("type")
    if kind == "object":
        return {name: instance(part, draw, digest) for name, part in schema.get("properties", {}).items()}
    if kind == "array":
        low = schema.get("minItems", 1)
        return [instance(schema.get("items", {}), draw, digest) for _ in range(draw.randint(low, max(low, schema.get("maxItems", low))))]
    if kind in ("integer", "number"):
        return draw.randint(int(schema.get("minimum", 0)), int(schema.get("maximum", 10)))
    if kind == "boolean":
        return draw.random() < 0.5
    return f"{digest} " + " ".join(draw.choice(WORDS) for _ in range(8))


async def main() -> None:
    server = Server(Behaviour(**json.loads(sys.argv[1] if len(sys.argv) > 1 else "{}")))
    listening = await asyncio.start_server(server.serve, "127.0.0.1", 0, limit=1 << 26, backlog=1024)
    print(listening.sockets[0].getsockname()[1], flush=True)
    async with listening:
        await listening.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
