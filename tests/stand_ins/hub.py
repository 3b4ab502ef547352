"""A hub with one data set, people/chats, as far as `datasets` and huggingface_hub ask: what it is of, its tree, its files."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "c" * 40
API, FILES = "/api/datasets/people/chats", "/datasets/people/chats/resolve/"


class Hub(BaseHTTPRequestHandler):
    """root: the folder that holds the data set; got: names of the files that were sent."""

    protocol_version = "HTTP/1.1"
    root: Path
    got: list[str]

    def log_message(self, *_) -> None:
        pass

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        names = sorted(p.relative_to(self.root).as_posix() for p in self.root.rglob("*") if p.is_file())
        if path.startswith(f"{API}/tree/"):
            self.send_json(self.tree(path.split("/tree/")[1].partition("/")[2], names))
        elif path.startswith(API):
            self.send_json({"id": "people/chats", "sha": COMMIT, "siblings": [{"rfilename": name} for name in names], "cardData": {}})
        elif path.startswith(FILES):
            name = path.removeprefix(FILES).partition("/")[2]
            self.send_file(name) if name in names else self.send(404, b"", "X-Error-Code: EntryNotFound", f"X-Repo-Commit: {COMMIT}")
        else:
            self.send(404, b"{}", "X-Error-Code: RepoNotFound")

    do_GET = do_HEAD = do_POST = answer

    def tree(self, folder: str, names: list[str]) -> list[dict]:
        found = {}
        for name in names:
            if not folder or name.startswith(f"{folder}/"):
                inside, _, rest = name.removeprefix(folder).lstrip("/").partition("/")
                path = f"{folder}/{inside}".lstrip("/")
                found[path] = {"type": "directory" if rest else "file", "path": path, "size": 0, "oid": "0" * 40}
                if not rest:
                    found[path]["size"] = (self.root / name).stat().st_size
        return list(found.values())

    def send_file(self, name: str) -> None:
        content = (self.root / name).read_bytes()
        if self.command == "GET":
            self.got.append(name)
        self.send(200, content, f'ETag: "{hashlib.sha1(content).hexdigest()}"', f"X-Repo-Commit: {COMMIT}")

    def send_json(self, value: object) -> None:
        self.send(200, json.dumps(value).encode(), "Content-Type: application/json")

    def send(self, code: int, body: bytes, *headers: str) -> None:
        self.send_response(code)
        for header in headers:
            self.send_header(*header.split(": ", 1))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def serve(root: Path) -> tuple[str, list[str], ThreadingHTTPServer]:
    """The address of a hub in this process, the files it sent, and the server, to be shut down."""
    handler = type("Handler", (Hub,), {"root": root, "got": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}", handler.got, server
