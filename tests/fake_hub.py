"""A Hub on loopback for the real client: repositories with commits, in memory, and failures on demand.

It has the routes that `huggingface_hub` uses: create, branch, validate-yaml, preupload, the LFS batch and its PUT,
commit, revision, tree, and resolve with HEAD and ranges. Any token can write. A private repository is visible to
clients with a token only.
"""

import base64
import hashlib
import json
import re
import sys
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

Files = dict[str, bytes]
LFS = (".safetensors", ".png", ".bin", ".pkl")


@dataclass
class Repo:
    """A repository. A branch is the name of a commit, a commit is a whole set of files, and commits never change."""

    private: bool = False
    gated: bool = False
    commits: dict[str, Files] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: Files) -> str:
        """Commit `files` as the whole content of a branch; return the id of the commit."""
        content = repr((sorted(files.items()), self.branches.get(branch), len(self.commits)))
        oid = hashlib.sha1(content.encode()).hexdigest()
        self.commits[oid], self.branches[branch] = dict(files), oid
        return oid

    def at(self, revision: str) -> tuple[str, Files] | None:
        """Return the id and the files of a commit, or None if there is no such revision."""
        oid = self.branches.get(revision, revision)
        return (oid, self.commits[oid]) if oid in self.commits else None


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that close the connection, as some tests do; report other errors."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class FakeHub:
    """The server. `url` is the value for HF_ENDPOINT; `sent` counts the bytes of each file that was sent."""

    def __init__(self) -> None:
        self.server = _Server(("127.0.0.1", 0), _Handler)
        self.server.hub = self  # type: ignore[attr-defined]
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.uploading = threading.Event()
        self.reset()
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def reset(self) -> None:
        """Remove all repositories and all failures."""
        self.lock = threading.RLock()
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}  # LFS objects; a commit puts them into a repository
        self.sent: dict[str, int] = {}
        self.requests: list[str] = []
        self.answer_all: int | None = None  # answer every request with this status
        self.drop_uploads = 0  # close the connection in the middle of this many uploads
        self.drop_answers = 0  # close the connection after this many commits that were made
        self.hold_uploads = False  # read the beginning of an upload, then wait until the client closes
        self.uploading.clear()

    def put(self, repo: str, branch: str = "main", **files: bytes) -> str:
        """Change files of a repository without the client; return the new commit."""
        with self.lock:
            found = self.repos[repo]
            return found.commit(branch, {**found.commits[found.branches[branch]], **files})

    def files(self, repo: str, revision: str = "main") -> Files:
        """Return the files of a repository, without the one that the Hub adds."""
        found = self.repos[repo].at(revision)
        assert found is not None
        return {name: content for name, content in found[1].items() if name != ".gitattributes"}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body in one packet: two of them wait 40 ms for an acknowledgment
    disable_nagle_algorithm = True
    hub: FakeHub

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._route("HEAD")

    def do_GET(self) -> None:
        self._route("GET")

    def do_POST(self) -> None:
        self._route("POST")

    def do_PUT(self) -> None:
        self._route("PUT")

    def _route(self, method: str) -> None:
        self.hub = self.server.hub  # type: ignore[attr-defined]
        path = urlsplit(self.path).path
        self.hub.requests.append(f"{method} {unquote(path)}")
        if self.hub.answer_all is not None:
            self._body()
            return self._answer({"error": "trouble"}, self.hub.answer_all)
        for verbs, pattern, action in _ROUTES:
            if method in verbs and (match := re.fullmatch(pattern, path)):
                return action(self, *(unquote(group or "") for group in match.groups()))
        self._body()
        return self._answer({"error": "not found"}, 404)

    # Routes

    def _whoami(self) -> None:
        self._answer({"name": "me", "type": "user"}, 200 if self._token() else 401)

    def _validate(self) -> None:
        self._body()
        self._answer({"errors": [], "warnings": []})

    def _create(self) -> None:
        wish = json.loads(self._body())
        name = f"{wish.get('organization') or 'me'}/{wish['name']}"
        if not self._token():
            return self._answer({"error": "log in"}, 401)
        with self.hub.lock:
            if name in self.hub.repos:
                return self._answer({"error": "exists", "url": f"{self.hub.url}/{name}"}, 409)
            repo = self.hub.repos[name] = Repo(private=wish.get("visibility") == "private" or bool(wish.get("private")))
            repo.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"})
        return self._answer({"url": f"{self.hub.url}/{name}", "name": name})

    def _branch(self, name: str, branch: str) -> None:
        self._body()
        if (repo := self._repo(name, write=True)) is not None:
            if branch in repo.branches:
                return self._answer({"error": "exists"}, 409)
            repo.branches[branch] = repo.branches["main"]
            self._answer({})
        return None

    def _preupload(self, name: str, revision: str) -> None:
        asked = json.loads(self._body())["files"]
        if (repo := self._repo(name, write=True)) is not None and (found := self._revision(repo, revision)):
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(LFS) else "regular",
                    "shouldIgnore": False,
                    "oid": _oid(file["path"], found[1][file["path"]]) if file["path"] in found[1] else None,
                }
                for file in asked
            ]
            self._answer({"files": modes})

    def _batch(self, name: str) -> None:
        asked = json.loads(self._body())["objects"]
        if self._repo(name, write=True) is not None:
            objects = []
            for item in asked:
                upload = {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}", "header": {}}}
                known = item["oid"] in self.hub.blobs
                objects.append({"oid": item["oid"], "size": item["size"], **({} if known else {"actions": upload})})
            self._answer({"transfer": "basic", "objects": objects})

    def _upload(self, oid: str) -> None:
        length = int(self.headers["Content-Length"])
        if self.hub.drop_uploads > 0 or self.hub.hold_uploads:
            self.rfile.read(min(length // 2, 4096))
            self.hub.uploading.set()
            if self.hub.hold_uploads:
                while self.rfile.read1(1 << 16):  # until the client closes
                    time.sleep(0.01)
            else:
                self.hub.drop_uploads -= 1
            self.close_connection = True
            return self.connection.shutdown(2)
        content = self.rfile.read(length)
        if hashlib.sha256(content).hexdigest() != oid:
            return self._answer({"error": "wrong sha256"}, 400)
        self.hub.blobs[oid] = content
        return self._answer({})

    def _commit(self, name: str, revision: str) -> None:
        lines = [json.loads(line) for line in self._body().splitlines()]
        with self.hub.lock:
            if (repo := self._repo(name, write=True)) is None or not (found := self._revision(repo, revision)):
                return None
            files = dict(found[1])
            for line in lines:
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    if value["oid"] not in self.hub.blobs:
                        return self._answer({"error": f"{value['path']} was never uploaded"}, 400)
                    files[value["path"]] = self.hub.blobs[value["oid"]]
                elif line["key"] == "deletedFile":
                    files.pop(value["path"], None)
            oid = repo.commit(revision, files)
            if self.hub.drop_answers:
                self.hub.drop_answers -= 1
                self.close_connection = True
                return None
        return self._answer({"commitOid": oid, "commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "success": True})

    def _info(self, name: str, revision: str = "main") -> None:
        if (repo := self._repo(name)) is not None and (found := self._revision(repo, revision)):
            siblings = [{"rfilename": path} for path in found[1]]
            self._answer({"id": name, "sha": found[0], "private": repo.private, "siblings": siblings, "tags": []})

    def _tree(self, name: str, revision: str, folder: str) -> None:
        if (repo := self._repo(name)) is not None and (found := self._revision(repo, revision)):
            inside = sorted((path, content) for path, content in found[1].items() if path.startswith(folder))
            if not inside:
                return self._answer({"error": "no such folder"}, 404, {"X-Error-Code": "EntryNotFound"})
            self._answer([{"type": "file", "path": p, "size": len(c), "oid": _git_oid(c)} for p, c in inside])
        return None

    def _resolve(self, name: str, revision: str, path: str) -> None:
        if (repo := self._repo(name)) is None or not (found := self._revision(repo, revision)):
            return None
        oid, files = found
        if path not in files:
            return self._answer({"error": "no such file"}, 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": oid})
        content = files[path]
        headers = {"X-Repo-Commit": oid, "ETag": f'"{_oid(path, content)}"', "Accept-Ranges": "bytes"}
        headers["X-Linked-Size"] = str(len(content))
        status, part = 200, content
        if span := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(span[1]), min(int(span[2] or len(content) - 1), len(content) - 1)
            status, part = 206, content[start : end + 1]
            headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
        if self.command == "GET":
            self.hub.sent[f"{name}/{path}"] = self.hub.sent.get(f"{name}/{path}", 0) + len(part)
        return self._answer(part, status, headers)

    # Permissions and answers

    def _token(self) -> bool:
        return self.headers.get("Authorization", "").startswith("Bearer hf_")

    def _repo(self, name: str, write: bool = False) -> Repo | None:
        """Return a repository if the client may see it; otherwise answer with the error."""
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and not self._token()):
            status = 404 if self._token() else 401  # the Hub does not reveal which private repositories exist
            return self._answer({"error": "Repository not found"}, status, {"X-Error-Code": "RepoNotFound"})
        if write and not self._token():
            return self._answer({"error": "log in"}, 401)
        if repo.gated and not write and self.command in ("GET", "HEAD"):
            return self._answer({"error": "gated"}, 403, {"X-Error-Code": "GatedRepo"})
        return repo

    def _revision(self, repo: Repo, revision: str) -> tuple[str, Files] | None:
        found = repo.at(revision)
        return found or self._answer({"error": "Invalid rev id"}, 404, {"X-Error-Code": "RevisionNotFound"})

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Any:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


_NAME = r"([\w.-]+/[\w.-]+)"
_ROUTES = (
    (("GET",), r"/api/whoami-v2", _Handler._whoami),
    (("POST",), r"/api/validate-yaml", _Handler._validate),
    (("POST",), r"/api/repos/create", _Handler._create),
    (("POST",), rf"/api/models/{_NAME}/branch/([^/]+)", _Handler._branch),
    (("POST",), rf"/api/models/{_NAME}/preupload/([^/]+)", _Handler._preupload),
    (("POST",), rf"/{_NAME}\.git/info/lfs/objects/batch", _Handler._batch),
    (("PUT",), r"/lfs/(\w{64})", _Handler._upload),
    (("POST",), rf"/api/models/{_NAME}/commit/([^/]+)", _Handler._commit),
    (("GET",), rf"/api/models/{_NAME}", _Handler._info),
    (("GET",), rf"/api/models/{_NAME}/revision/([^/]+)", _Handler._info),
    (("GET",), rf"/api/models/{_NAME}/tree/([^/]+)(?:/(.*))?", _Handler._tree),
    (("GET", "HEAD"), rf"/{_NAME}/resolve/([^/]+)/(.+)", _Handler._resolve),
)


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _oid(path: str, content: bytes) -> str:
    """Return the hash that the client compares: git's hash of a small file, SHA-256 of a large one."""
    return hashlib.sha256(content).hexdigest() if path.endswith(LFS) else _git_oid(content)
