"""A Hub on 127.0.0.1 that speaks the part of the protocol which huggingface_hub's client uses for models.

Large files go through LFS (basic or in parts) and are served, like the Hub's, by another host that refuses credentials:
the same port under the name localhost. It knows nothing of adapters. `Hub.faults` makes it fail on purpose.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import struct
import threading
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, quote, unquote, urlsplit

from front_matter import metadata, metadata_errors, tags_of

TOKEN = "hf_" + "A1b2C3d4E5" * 3
OTHER_TOKEN = "hf_" + "Z9y8X7w6V5" * 3
XET_TOKEN = "xet-token-of-the-loopback"
LARGE = (".safetensors", ".bin", ".pt", ".gguf")
REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"


@dataclass
class Fault:
    """What happens to the next `times` requests whose "METHOD /path" matches `pattern`.

    what: a status to answer with, "drop" to close the connection in the middle of the body, "hang" to say nothing for a
    while, or "lost" to do what was asked and close the connection before the answer.
    """

    pattern: str
    what: int | str
    times: int = 1


@dataclass
class Repo:
    private: bool = False
    gated: bool = False
    branches: dict[str, str] = field(default_factory=dict)  # name -> commit
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # commit -> path -> content
    messages: dict[str, str] = field(default_factory=dict)
    pull_requests: int = 0
    downloads: int = 0
    likes: int = 0
    created: float = field(default_factory=time.time)


class RefusedError(Exception):
    def __init__(self, status: int, message: str, code: str = "", body: dict | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code
        self.body = body or {"error": message}


class Hub:
    """The server and its state.

    Attributes:
        users: name of the owner of each token.
        readers: the tokens' owners who may only read.
        expired: tokens whose time is over.
        repos: the models.
        large: contents of the LFS store by SHA-256.
        parts_of: size in bytes from which an upload goes in parts of that size.
        faults: what is to go wrong.
        requests: (method, path with query, whether it carried a token) of every request so far.
        hang: seconds of silence of the fault "hang".
        cas: address of Xet's content store; this server's own by default.
        shards: what was registered there.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        port = self.server.server_port
        self.url, self.cdn = f"http://127.0.0.1:{port}", f"http://localhost:{port}"
        self.reset()
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def reset(self) -> None:
        self.users: dict[str, str] = {}
        self.readers: set[str] = set()
        self.expired: set[str] = set()
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}
        self.received: dict[tuple[str, int], bytes] = {}
        self.parts_of = 10**9
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str, bool]] = []
        self.hang = 30.0
        self.cas = ""
        self.shards: list[bytes] = []

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def add(self, repo_id: str, files: dict[str, bytes], **fields) -> Repo:
        """A repository as if somebody had made it."""
        repo = self.repos.setdefault(repo_id, Repo(**fields))
        self.commit(repo, "main", files, "by hand")
        return repo

    def files(self, repo_id: str, branch: str = "main") -> dict[str, bytes]:
        repo = self.repos[repo_id]
        return repo.commits[repo.branches[branch]]

    def commit(self, repo: Repo, branch: str, files: dict[str, bytes], message: str) -> str:
        state = hashlib.sha1(repr((branch, message, len(repo.commits), sorted(files), time.time())).encode())
        commit = state.hexdigest()
        repo.commits[commit], repo.messages[commit], repo.branches[branch] = files, message, commit
        return commit

    def seen(self, pattern: str) -> int:
        """How many requests "METHOD /path" matched `pattern`."""
        return sum(bool(re.search(pattern, f"{method} {path}")) for method, path, _ in self.requests)


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments) -> None:
        pass

    def _serve(self) -> None:
        hub = self.hub
        parts = urlsplit(self.path)
        self.route, self.query = parts.path, parse_qs(parts.query)
        length = int(self.headers.get("Content-Length") or 0)
        with hub.lock:
            hub.requests.append((self.command, self.path, "Authorization" in self.headers))
            request = f"{self.command} {self.route}"
            fault = next((f for f in hub.faults if f.times > 0 and re.search(f.pattern, request)), None)
            if fault:
                fault.times -= 1
        if fault and fault.what == "drop":
            self.rfile.read(length // 2)
            return self._drop()
        self.body = self._read_body(length)
        if fault and fault.what == "hang":
            time.sleep(hub.hang)
            return self._drop()
        if fault and isinstance(fault.what, int):
            return self._send(fault.what, b"<html>out of order</html>", {"Content-Type": "text/html"})
        try:
            with hub.lock:
                status, answer, headers = self._answer()
        except RefusedError as refusal:
            headers = {"X-Error-Message": refusal.message, "X-Request-Id": "loopback"}
            headers |= {"X-Error-Code": refusal.code} if refusal.code else {}
            status, answer = refusal.status, refusal.body
        if fault and fault.what == "lost":
            return self._drop()
        if isinstance(answer, bytes):
            return self._send(status, answer, headers)
        return self._send(status, json.dumps(answer).encode(), {"Content-Type": "application/json", **headers})

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve  # noqa: N815

    def _read_body(self, length: int) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(length)
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _drop(self) -> None:
        # a reset, as when a cable is pulled, and no orderly end
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        try:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            if "Content-Length" not in headers:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    # What is asked for

    def _answer(self) -> tuple[int, dict | list | bytes, dict[str, str]]:
        for method, pattern, action in ROUTES:
            found = re.fullmatch(pattern, self.route)
            if found and self.command in method:
                return action(self, **{name: unquote(value) for name, value in found.groupdict().items()})
        raise RefusedError(404, f"no such page {self.route}")

    def _user(self, needed: bool = False) -> str | None:
        given = self.headers.get("Authorization", "")
        token = given.removeprefix("Bearer ")
        if token in self.hub.expired:
            raise RefusedError(401, "User Access Token is expired")
        if given and token not in self.hub.users:
            raise RefusedError(401, "Invalid credentials in Authorization header")
        if needed and not given:
            raise RefusedError(401, "Invalid username or password.")
        return self.hub.users.get(token)

    def _repo(self, repo_id: str, write: bool = False) -> Repo:
        user = self._user(needed=write)
        repo = self.hub.repos.get(repo_id)
        owner = repo_id.partition("/")[0]
        if repo is None or (repo.private and user != owner):
            raise RefusedError(404 if user else 401, "Repository not found", "RepoNotFound")
        if write and (user != owner or user in self.hub.readers):
            raise RefusedError(403, "You don't have the rights to write to this repository")
        return repo

    def _at(self, repo: Repo, revision: str) -> tuple[str, dict[str, bytes]]:
        commit = repo.branches.get(revision, revision)
        if commit not in repo.commits:
            raise RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit, repo.commits[commit]

    def create(self):
        user, wanted = self._user(needed=True), json.loads(self.body)
        owner = wanted.get("organization") or user
        if owner != user or user in self.hub.readers:
            raise RefusedError(403, f"You don't have the rights to create a model under the namespace {owner!r}")
        repo_id = f"{owner}/{wanted['name']}"
        url = f"{self.hub.url}/{repo_id}"
        if repo_id in self.hub.repos:
            raise RefusedError(409, "You already created this model repo", body={"error": "exists", "url": url})
        repo = self.hub.repos[repo_id] = Repo(private=wanted.get("visibility") == "private")
        self.hub.commit(repo, "main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
        return 200, {"url": url, "name": repo_id}, {}

    def validate(self):
        errors = metadata_errors(json.loads(self.body)["content"])
        if errors:
            raise RefusedError(
                400, "Invalid metadata", body={"errors": [{"message": e} for e in errors], "warnings": []}
            )
        return 200, {"errors": [], "warnings": []}, {}

    def who(self):
        return 200, {"type": "user", "name": self._user(needed=True), "orgs": []}, {}

    def preupload(self, repo, revision):
        target = self._repo(repo, write="create_pr" not in self.query)
        _, files = self._at(target, revision)
        return 200, {"files": [self._mode(entry, files) for entry in json.loads(self.body)["files"]]}, {}

    def _mode(self, entry: dict, files: dict[str, bytes]) -> dict:
        there, large = files.get(entry["path"]), entry["path"].endswith(LARGE)
        oid = None if there is None else sha256(there) if large else git_oid(there)
        mode = "lfs" if large else "regular"
        return {"path": entry["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid}

    def batch(self, repo):
        self._user(needed=True)
        objects = []
        for entry in json.loads(self.body)["objects"]:
            oid, size = entry["oid"], entry["size"]
            if oid in self.hub.large:
                objects.append({"oid": oid, "size": size})
                continue
            upload: dict = {"href": f"{self.hub.cdn}/upload/{oid}/0"}
            if size > self.hub.parts_of:
                count = -(-size // self.hub.parts_of)
                urls = {str(n + 1): f"{self.hub.cdn}/upload/{oid}/{n + 1}" for n in range(count)}
                header = {"chunk_size": str(self.hub.parts_of), **urls}
                upload = {"href": f"{self.hub.url}/complete/{oid}", "header": header}
            verify = {"href": f"{self.hub.url}/{repo}.git/info/lfs/objects/verify"}
            objects.append({"oid": oid, "size": size, "actions": {"upload": upload, "verify": verify}})
        return 200, {"transfer": "basic", "objects": objects}, {}

    def upload(self, oid, part):
        if "Authorization" in self.headers:
            raise RefusedError(400, "this host takes signed URLs and no credentials")
        self.hub.received[oid, int(part)] = self.body
        if part == "0":
            self._store(oid, self.body)
        return 200, b"", {"ETag": f'"{hashlib.md5(self.body).hexdigest()}"'}

    def complete(self, oid):
        parts = [(part["partNumber"], part["etag"].strip('"')) for part in json.loads(self.body)["parts"]]
        pieces = [self.hub.received[oid, number] for number, _ in sorted(parts)]
        if [hashlib.md5(piece).hexdigest() for piece in pieces] != [etag for _, etag in sorted(parts)]:
            raise RefusedError(400, "an ETag is not that of its part")
        self._store(oid, b"".join(pieces))
        return 200, {"success": True}, {}

    def _store(self, oid: str, content: bytes) -> None:
        if sha256(content) != oid:
            raise RefusedError(400, "the content is not that of its SHA-256")
        self.hub.large[oid] = content

    def verify(self, repo):
        wanted = json.loads(self.body)
        if len(self.hub.large.get(wanted["oid"], b"")) != wanted["size"]:
            raise RefusedError(404, "no such object")
        return 200, {}, {}

    def xet_token(self, repo, revision):
        self._repo(repo, write=True)
        exp = int(time.time()) + 3600
        headers = {"X-Xet-Cas-Url": self.hub.cas or f"{self.hub.url}/cas", "X-Xet-Access-Token": XET_TOKEN}
        headers["X-Xet-Token-Expiration"] = str(exp)
        return 200, {"casUrl": headers["X-Xet-Cas-Url"], "accessToken": XET_TOKEN, "exp": exp}, headers

    def cas(self, path):
        """The content store of Xet, as far as uploads need it: it takes chunks, and a shard that names the files."""
        if self.headers.get("Authorization") != f"Bearer {XET_TOKEN}":
            raise RefusedError(401, "not the token of Xet")
        if self.command == "GET":
            raise RefusedError(404, "no such chunk is known")
        self.hub.shards += [self.body] * ("shard" in path)
        return 200, {"type": "result", "result": 1}, {}

    def _from_xet(self, oid: str) -> bool:
        """Whether a shard registered the file: SHA-256 stands in it as four numbers of eight bytes, the first first."""
        words = [bytes.fromhex(oid)[i : i + 8] for i in range(0, 32, 8)]
        return any(b"".join(words) in s or b"".join(w[::-1] for w in words) in s for s in self.hub.shards)

    def write(self, repo, revision):
        pull_request = self.query.get("create_pr") == ["1"]
        target = self._repo(repo, write=not pull_request)
        self._user(needed=True)
        _, files = self._at(target, revision)
        lines = [json.loads(line) for line in self.body.splitlines()]
        header, files = lines[0]["value"], dict(files)
        for line in lines[1:]:
            key, value = line["key"], line["value"]
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                if self._from_xet(value["oid"]):
                    self.hub.large[value["oid"]] = b"kept by Xet"
                if value["oid"] not in self.hub.large:
                    raise RefusedError(400, f"the content of {value['path']} was not uploaded")
                files[value["path"]] = self.hub.large[value["oid"]]
            elif key == "deletedFile":
                if files.pop(value["path"], None) is None:
                    raise RefusedError(404, "A file with this name doesn't exist", "EntryNotFound")
            else:
                raise RefusedError(400, f"unknown operation {key}")
        if "README.md" in files and (errors := metadata_errors(files["README.md"].decode())):
            raise RefusedError(400, "; ".join(errors))
        branch, url = revision, None
        if pull_request:
            target.pull_requests += 1
            branch = f"refs/pr/{target.pull_requests}"
            url = f"{self.hub.url}/{repo}/discussions/{target.pull_requests}"
        commit = self.hub.commit(target, branch, files, header["summary"])
        where = f"{self.hub.url}/{repo}/commit/{commit}"
        return 200, {"success": True, "commitOid": commit, "commitUrl": where, "pullRequestUrl": url}, {}

    def branch(self, repo, revision):
        target = self._repo(repo, write=True)
        if revision in target.branches:
            raise RefusedError(409, "Reference already exists")
        start = (json.loads(self.body) if self.body else {}).get("startingPoint", "main")
        target.branches[revision] = self._at(target, start)[0]
        return 200, {}, {}

    def refs(self, repo):
        target = self._repo(repo)
        listed = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit}
            for name, commit in target.branches.items()
            if not name.startswith("refs/pr/")
        ]
        return 200, {"branches": listed, "converts": [], "tags": []}, {}

    def info(self, repo, revision="main"):
        target = self._repo(repo)
        commit, files = self._at(target, revision)
        return 200, {**describe(repo, target, commit, files, blobs="blobs" in self.query)}, {}

    def tree(self, repo, revision):
        _, files = self._at(self._repo(repo), revision)
        return 200, [{"type": "file", "path": path, **file_info(path, files[path])} for path in sorted(files)], {}

    def resolve(self, repo, revision, path):
        target = self._repo(repo)
        if target.gated and self._user() != repo.partition("/")[0]:
            raise RefusedError(403 if self._user() else 401, f"Access to model {repo} is restricted.", "GatedRepo")
        commit, files = self._at(target, revision)
        headers = {"X-Repo-Commit": commit}
        if path not in files:
            raise RefusedError(404, "Entry not found", "EntryNotFound")
        content = files[path]
        if path.endswith(LARGE):
            oid = sha256(content)
            self.hub.large[oid] = content
            headers |= {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(content))}
            return 302, b"", {**headers, "Location": f"{self.hub.cdn}/object/{oid}"}
        headers["ETag"] = f'"{git_oid(content)}"'
        if self.command == "GET":
            target.downloads += 1
        return 200, content, headers

    def object(self, oid):
        if "Authorization" in self.headers:
            raise RefusedError(400, "this host takes signed URLs and no credentials")
        content = self.hub.large[oid]
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if not wanted:
            return 200, content, {"ETag": f'"{oid}"'}
        start = int(wanted[1])
        headers = {"ETag": f'"{oid}"', "Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
        return 206, content[start:], headers

    def models(self):
        user = self._user()
        wanted = set(self.query.get("filter", []))
        found = []
        for repo_id, repo in self.hub.repos.items():
            commit, files = self._at(repo, "main")
            described = describe(repo_id, repo, commit, files)
            visible = not repo.private or user == repo_id.partition("/")[0]
            if visible and wanted <= set(described["tags"]):
                found.append(described)
        (sort,) = self.query.get("sort", ["trendingScore"])
        found.sort(key=lambda m: m.get(sort) or 0, reverse=True)
        page, size = int(self.query.get("page", ["0"])[0]), min(int(self.query.get("limit", ["1000"])[0]), 2)
        shown = found[page * size : (page + 1) * size]
        headers = {}
        if len(found) > (page + 1) * size:  # pages of two, so that the client has to follow them
            rest = "&".join(f"{k}={quote(v)}" for k, vs in self.query.items() if k != "page" for v in vs)
            headers["Link"] = f'<{self.hub.url}/api/models?{rest}&page={page + 1}>; rel="next"'
        if expand := self.query.get("expand"):
            shown = [{"id": m["id"], **{name: m.get(name) for name in expand}} for m in shown]
        return 200, shown, headers


ROUTES = (
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.validate),
    ("GET", "/api/whoami-v2", Handler.who),
    ("GET", "/api/models", Handler.models),
    ("POST", rf"/api/models/{REPO}/preupload/(?P<revision>[^/]+)", Handler.preupload),
    ("POST", rf"/api/models/{REPO}/commit/(?P<revision>.+)", Handler.write),
    ("POST", rf"/api/models/{REPO}/branch/(?P<revision>.+)", Handler.branch),
    ("GET", rf"/api/models/{REPO}/refs", Handler.refs),
    ("GET", rf"/api/models/{REPO}/tree/(?P<revision>[^/]+)", Handler.tree),
    ("GET", rf"/api/models/{REPO}/revision/(?P<revision>.+)", Handler.info),
    ("GET", rf"/api/models/{REPO}", Handler.info),
    ("GET", rf"/api/models/{REPO}/xet-write-token/(?P<revision>.+)", Handler.xet_token),
    (("GET", "POST", "PUT", "HEAD"), r"/cas/(?P<path>.+)", Handler.cas),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", Handler.batch),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/verify", Handler.verify),
    ("PUT", r"/upload/(?P<oid>\w+)/(?P<part>\d+)", Handler.upload),
    ("POST", r"/complete/(?P<oid>\w+)", Handler.complete),
    ("GET", r"/object/(?P<oid>\w+)", Handler.object),
    (("GET", "HEAD"), rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Handler.resolve),
)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_oid(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


def file_info(path: str, content: bytes) -> dict:
    info: dict = {"oid": git_oid(content), "size": len(content)}
    if path.endswith(LARGE):
        info["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 134}
    return info


def describe(repo_id: str, repo: Repo, commit: str, files: dict[str, bytes], blobs: bool = False) -> dict:
    siblings = []
    for path in sorted(files):
        info = file_info(path, files[path]) if blobs else {}
        lfs = info.get("lfs") and {**info["lfs"], "sha256": info["lfs"]["oid"]}
        siblings.append({"rfilename": path, "size": info.get("size"), "blobId": info.get("oid"), "lfs": lfs})
    card = metadata(files.get("README.md", b"").decode()) or {}
    when = datetime.fromtimestamp(repo.created, UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
    return {
        "id": repo_id,
        "modelId": repo_id,
        "author": repo_id.partition("/")[0],
        "sha": commit,
        "private": repo.private,
        "gated": "manual" if repo.gated else False,
        "downloads": repo.downloads,
        "likes": repo.likes,
        "createdAt": when,
        "lastModified": when,
        "tags": tags_of(card),
        "cardData": card,
        "library_name": card.get("library_name"),
        "siblings": siblings,
    }
