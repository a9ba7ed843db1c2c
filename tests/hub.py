"""A Hub on 127.0.0.1, in memory: as much of its API as `huggingface_hub` uses to push a repository and to load it,
and `datasets` to stream from it, with faults where a test wants them.

Clients need `HF_ENDPOINT`, `HF_TOKEN` (any), and `HF_HUB_DISABLE_XET=1`, since large files go by LFS.
"""

import base64
import hashlib
import json
import re
import socket
import struct
import threading
from collections import deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from urllib.parse import parse_qs, unquote, urlsplit


LARGE = (".safetensors", ".parquet")  # what goes by LFS


class Repository:
    """One branch; a revision is its name or the latest commit. A gated one lets nobody read its files."""

    def __init__(self, private: bool, gated: bool = False):
        self.private = private
        self.gated = gated
        self.files: dict[str, bytes] = {}
        self.commit = hashlib.sha1(b"").hexdigest()

    def change(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


class Hub(ThreadingHTTPServer):
    """Serves until the `with` ends; `url` is its address, `repositories` what it holds, by `models/user/name`.

    `faults` are what happens to the next requests for a part of a file, in turn: "" (nothing), "reset" (the connection
    breaks in the middle of the answer), "stall" (so does the answer, but the connection stays), or a status such as
    "503". When they are used up, `last_fault` happens to all others.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, Repository] = {}
        self.large_files: dict[str, bytes] = {}  # by sha256
        self.lock = threading.Lock()
        self.faults: deque[str] = deque()
        self.last_fault = ""
        self.bytes_sent = 0  # of parts of files, so far
        self.closing = threading.Event()

    def next_fault(self) -> str:
        with self.lock:
            return self.faults.popleft() if self.faults else self.last_fault

    def add_dataset(self, name: str, files: dict[str, bytes], gated: bool = False) -> None:
        repository = self.repositories[f"datasets/{name}"] = Repository(private=False, gated=gated)
        repository.change(files)
        self.large_files |= {hashlib.sha256(content).hexdigest(): content for content in files.values()}

    def add_model(self, name: str, folder: Path) -> None:
        repository = self.repositories[f"models/{name}"] = Repository(private=False)
        repository.change({path.name: path.read_bytes() for path in folder.iterdir()})

    def handle_error(self, request, client_address) -> None:
        """A client that has gone is no matter."""

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.closing.set()
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_) -> None:
        pass

    def answer(self, content, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json", "Content-Length": str(len(body))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.fault in ("reset", "stall"):
            self.wfile.write(body[: len(body) // 2])
        elif self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, code: str, status: int = 404, **headers: str) -> None:
        self.answer({"error": code}, status, X_Error_Code=code, X_Error_Message=code, **headers)

    def handle_request(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.fault = self.server.next_fault() if "Range" in self.headers and self.command == "GET" else ""
        if self.fault.isdigit():
            return self.answer({"error": "fault"}, int(self.fault))
        with self.server.lock:
            for pattern, method in ROUTES:
                if found := re.fullmatch(pattern, path):
                    method(self, body, **found.groupdict())
                    break
            else:
                self.refuse("NotImplemented")
        if self.fault == "stall":
            self.server.closing.wait(600)
        if self.fault:
            self.wfile.flush()
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # no farewell
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def who_am_i(self, body: bytes) -> None:
        token = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
        self.answer({"type": "user", "id": "0", "name": "tester", "fullname": "tester", "orgs": [], "auth": token})

    def validate_yaml(self, body: bytes) -> None:
        self.answer({"errors": [], "warnings": []})

    def create(self, body: bytes) -> None:
        wanted = json.loads(body)
        name = f"{wanted.get('organization') or 'tester'}/{wanted['name']}"
        kind = wanted.get("type", "model")
        url = f"{self.server.url}/{'' if kind == 'model' else kind + 's/'}{name}"
        key = f"{kind}s/{name}"
        exists = key in self.server.repositories
        if not exists:
            self.server.repositories[key] = Repository(
                bool(wanted.get("private")) or wanted.get("visibility") == "private"
            )
        self.answer({"url": url, "name": name, "id": "0"}, 409 if exists else 200)

    def start_upload(self, body: bytes, repository: str) -> None:
        objects = [
            {
                "oid": file["oid"],
                "size": file["size"],
                "actions": {"upload": {"href": f"{self.server.url}/large/{file['oid']}", "header": {}}},
            }
            for file in json.loads(body)["objects"]
        ]
        self.answer({"transfer": "basic", "objects": objects}, Content_Type="application/vnd.git-lfs+json")

    def upload(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.large_files[oid] = body
        self.answer({})

    def api(self, body: bytes, kind: str, name: str, rest: str | None) -> None:
        repository = self.server.repositories.get(f"{kind}/{name}")
        if repository is None:
            return self.refuse("RepoNotFound")
        action, _, argument = (rest or "").partition("/")
        if action in ("", "revision"):
            siblings = [{"rfilename": path} for path in sorted(repository.files)]
            self.answer({"id": name, "modelId": name, "sha": repository.commit, "private": repository.private,
                         "tags": [], "downloads": 0, "likes": 0, "gated": repository.gated, "disabled": False,
                         "siblings": siblings})  # fmt: skip
        elif action == "preupload":
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for file in json.loads(body)["files"]
            ]
            self.answer({"files": modes})
        elif action == "commit":
            self.commit(repository, name, [json.loads(line) for line in body.decode().splitlines() if line.strip()])
        elif action == "tree":
            _, _, folder = argument.partition("/")
            within = [path for path in sorted(repository.files) if path.startswith(f"{folder}/" if folder else "")]
            folders = {str(parent) for path in within for parent in PurePosixPath(path).parents} - {".", folder}
            entries = [{"type": "directory", "path": path, "oid": "0" * 40} for path in sorted(folders)]
            self.answer(entries + [self.entry(path, repository) for path in within])
        elif action == "paths-info":
            text = body.decode()
            paths = json.loads(text)["paths"] if text.startswith("{") else parse_qs(text).get("paths", [])
            self.answer([self.entry(path, repository) for path in paths if path in repository.files])
        else:
            self.refuse("NotImplemented")

    def commit(self, repository: Repository, name: str, operations: list[dict]) -> None:
        files = dict(repository.files)
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.server.large_files[value["oid"]]
            else:
                assert operation["key"] == "header", operation["key"]
        repository.change(files)
        url = f"{self.server.url}/{name}/commit/{repository.commit}"
        self.answer({"success": True, "commitUrl": url, "commitOid": repository.commit, "hookOutput": ""})

    def entry(self, path: str, repository: Repository) -> dict:
        content = repository.files[path]
        entry = {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
        sha = hashlib.sha256(content).hexdigest()
        large = {"lfs": {"oid": sha, "size": len(content), "pointerSize": 130}}
        return entry | (large if sha in self.server.large_files else {})

    def resolve(self, body: bytes, name: str, path: str, kind: str | None = None) -> None:
        repository = self.server.repositories.get(f"{kind or 'models/'}{name}")
        if repository is None:
            return self.refuse("RepoNotFound")
        if repository.gated:
            return self.refuse("GatedRepo", 403)
        if path not in repository.files:
            return self.refuse("EntryNotFound", X_Repo_Commit=repository.commit)
        content = repository.files[path]
        sha = hashlib.sha256(content).hexdigest()
        headers = {"ETag": f'"{sha}"', "X_Repo_Commit": repository.commit, "Content_Type": "application/octet-stream"}
        if sha in self.server.large_files:
            headers |= {"X_Linked_ETag": f'"{sha}"', "X_Linked_Size": str(len(content))}
        if part := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(part[1]), min(int(part[2] or len(content)), len(content) - 1)
            headers["Content_Range"] = f"bytes {first}-{last}/{len(content)}"
            self.server.bytes_sent += last + 1 - first
            return self.answer(content[first : last + 1], 206, **headers)
        self.answer(content, **headers)


ROUTES = [
    (r"/api/whoami-v2", Handler.who_am_i),
    (r"/api/validate-yaml", Handler.validate_yaml),
    (r"/api/repos/create", Handler.create),
    (r"/(?P<repository>.+)\.git/info/lfs/objects/batch", Handler.start_upload),
    (r"/large/(?P<oid>\w+)", Handler.upload),
    (r"/api/(?P<kind>models|datasets)/(?P<name>[^/]+/[^/]+)(?:/(?P<rest>.*))?", Handler.api),
    (r"/(?P<kind>datasets/)?(?P<name>[^/]+/[^/]+)/resolve/[^/]+/(?P<path>.+)", Handler.resolve),
]
