"""A hub that takes what is pushed to it, as far as huggingface_hub's client asks: repositories made, files announced, large ones by LFS, commits, read back.

It keeps what it got in memory: `repos` is {(kind, id): Repo}, `asked` every request, `accepts` the only token it knows.
"""

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

LARGE = 1000
"""bytes from which a file goes by LFS"""
TOKEN = "hf_" + "t" * 34


@dataclass
class Repo:
    """private: whether only its owner sees it. files: the head's. commits: messages, the oldest first."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)


class HubOfRepos(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    repos: dict[tuple[str, str], Repo]
    large: dict[str, bytes]
    asked: list[str]
    breaks: dict[str, int]
    """beginning of a request -> the HTTP status that it is answered by, once"""

    def log_message(self, *_) -> None:
        pass

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.asked.append(f"{self.command} {path}")
        if trouble := next((one for one in self.breaks if f"{self.command} {path}".startswith(one)), None):
            return self.send(self.breaks.pop(trouble), {"error": "out of order", "errors": [{"message": "out of order"}]})
        if path.startswith("/large/"):  # its address is the permission
            self.large[path.removeprefix("/large/")] = body
            return self.send(200, {})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.send(401, {"error": "Invalid credentials"})
        if path == "/api/validate-yaml":
            return self.validate(json.loads(body)["content"])
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        kind, id, rest = self.parts(path)
        if (repo := self.repos.get((kind, id))) is None:
            return self.send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        if rest.startswith("preupload/"):
            files = [self.announced(repo, file) for file in json.loads(body)["files"]]
            return self.send(200, {"files": files})
        if rest == "info/lfs/objects/batch":
            return self.batch(json.loads(body)["objects"])
        if rest.startswith("commit/"):
            return self.commit(kind, id, repo, [json.loads(line) for line in body.splitlines()])
        if rest.startswith("resolve/"):
            return self.resolve(repo, rest.split("/", 2)[2])
        if rest.startswith("tree/"):
            return self.send(200, [{"type": "file", "path": n, "size": len(f), "oid": git_oid(f)} for n, f in repo.files.items()])
        siblings = [{"rfilename": name} for name in repo.files]
        return self.send(200, {"id": id, "sha": sha_of(repo), "private": repo.private, "siblings": siblings, "tags": [], "downloads": 0})

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def parts(self, path: str) -> tuple[str, str, str]:
        """(model or dataset, people/name, the rest) of an address."""
        words = path.strip("/").removeprefix("api/").split("/")
        kind = "model"
        if words[0] in ("models", "datasets"):
            kind = words.pop(0).removesuffix("s")
        return kind, "/".join(words[:2]).removesuffix(".git"), "/".join(words[2:])

    def validate(self, content: str) -> None:
        """The hub's own check is its own; here: a head that is YAML, whose base model is a name and no path."""
        head = yaml.safe_load(content.split("---\n")[1])
        faults = [f"{name} is a path" for name in ("base_model", "license") if str(head.get(name, "")).startswith((".", "/"))]
        self.send(400 if faults else 200, {"errors": [{"message": fault} for fault in faults], "warnings": []})

    def create(self, asked: dict) -> None:
        id = f"{asked.get('organization') or 'people'}/{asked['name']}"
        if not id.startswith("people/"):
            return self.send(403, {"error": f"You don't have the rights to create a model under the namespace {id.split('/')[0]}"})
        key = (asked.get("type") or "model", id)
        if key in self.repos:
            return self.send(409, {"error": "You already created this repo", "url": f"http://{self.headers['Host']}/{id}"})
        self.repos[key] = Repo(private=bool(asked.get("private")) or asked.get("visibility") == "private")
        return self.send(200, {"url": f"http://{self.headers['Host']}/{id}", "name": id, "id": id})

    def announced(self, repo: Repo, file: dict) -> dict:
        there = repo.files.get(file["path"])
        large = file["size"] >= LARGE
        oid = None if there is None else hashlib.sha256(there).hexdigest() if large else git_oid(there)
        return {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}

    def batch(self, objects: list[dict]) -> None:
        host = self.headers["Host"]
        new = [
            one | ({} if one["oid"] in self.large else {"actions": {"upload": {"href": f"http://{host}/large/{one['oid']}"}}})
            for one in objects
        ]
        self.send(200, {"transfer": "basic", "objects": new})

    def commit(self, kind: str, id: str, repo: Repo, lines: list[dict]) -> None:
        files = dict(repo.files)
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                content = self.large.get(value["oid"], b"")
                if hashlib.sha256(content).hexdigest() != value["oid"]:
                    return self.send(400, {"error": f"{value['path']}: LFS object is not there, or has other bytes"})
                files[value["path"]] = content
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        repo.files = files
        repo.commits.append(lines[0]["value"]["summary"])
        oid = sha_of(repo)
        return self.send(200, {"commitUrl": f"http://{self.headers['Host']}/{kind}s/{id}/commit/{oid}", "commitOid": oid})

    def resolve(self, repo: Repo, name: str) -> None:
        if name not in repo.files:
            return self.send(404, {}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha_of(repo)})
        content = repo.files[name]
        return self.send(200, content, {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": sha_of(repo)})

    def send(self, code: int, value: object, headers: dict[str, str] | None = None) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(code)
        for name, text in ({"Content-Type": "application/json"} | (headers or {})).items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def sha_of(repo: Repo) -> str:
    return hashlib.sha1(json.dumps([len(repo.commits), *sorted(map(git_oid, repo.files.values()))]).encode()).hexdigest()


def serve() -> tuple[str, type[HubOfRepos], ThreadingHTTPServer]:
    """The address of a hub in this process, what it holds, and the server, to be shut down."""
    handler = type("Handler", (HubOfRepos,), {"repos": {}, "large": {}, "asked": [], "breaks": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}", handler, server
