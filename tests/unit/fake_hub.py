"""A Hub on the loopback interface: enough of its protocol for downloads and uploads, what was asked of it,
and faults on demand."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

SHA = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Fault:
    """Answers the next ``times`` requests that match with ``status`` (and ``headers``), or does something
    else: ``drop`` closes the connection before anything is done, ``lose`` after it was done but before the
    answer, ``stall`` holds the request for a minute, ``echo`` is a 400 that repeats what was sent."""

    method: str
    path: str
    kind: int | str
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)
    seen: threading.Event = field(default_factory=threading.Event)


@dataclass
class FakeHub:
    """``repos`` maps ids to files by name; ``status`` maps an id to an HTTP status that is sent instead.

    ``tokens`` maps tokens to users; without any all may do everything. ``chunk`` makes uploads come in parts
    of so many bytes; the file ``spoil`` loses its last byte on arrival. ``objects`` is what was sent for the
    large files, ``puts`` each time that something was, ``requests`` all that was asked for. Without
    ``ranges`` whole files are sent when parts are asked for, as some mirrors do. ``sha`` is the commit that
    repositories are at.
    """

    repos: dict[str, dict[str, bytes]]
    status: dict[str, int] = field(default_factory=dict)
    fetched: list[str] = field(default_factory=list)
    sent: int = 0
    url: str = ""
    tokens: dict[str, str] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    chunk: int | None = None
    ranges: bool = True
    sha: str = SHA
    spoil: str = ""
    faults: list[Fault] = field(default_factory=list)
    objects: dict[str, bytes] = field(default_factory=dict)
    parts: dict[str, dict[int, bytes]] = field(default_factory=dict)
    puts: list[str] = field(default_factory=list)
    commits: list[tuple[str, list[str]]] = field(default_factory=list)
    collections: list[dict[str, Any]] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def fault(self, method: str, path: str, kind: int | str, times: int = 1, **headers: str) -> Fault:
        """Make the next requests go wrong."""
        made = Fault(
            method, path, kind, times, {name.replace("_", "-"): value for name, value in headers.items()}
        )
        self.faults.append(made)
        return made


class Refused(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, code: str = "", message: str = "refused", **body: Any) -> None:
        self.status, self.code, self.message, self.body = status, code, message, body


@contextmanager
def fake_hub(
    repos: dict[str, dict[str, bytes]], status: dict[str, int] | None = None, **options: Any
) -> Iterator[FakeHub]:
    hub = FakeHub(repos, status or {}, **options)

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = _Server(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """Clients that go away, killed by a test, are no error."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    do_GET = do_POST = do_PUT = do_HEAD

    def _answer(self) -> None:
        parts = urlsplit(self.path)
        self.path_only, self.query = unquote(parts.path), parse_qs(parts.query)
        self.hub.requests.append(f"{self.command} {self.path_only}")
        fault = self._fault()
        if fault is not None and fault.kind == "drop":
            self._hang_up()
            return
        if fault is not None and fault.kind == "stall":
            fault.seen.set()
            time.sleep(60)
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if fault is not None and fault.kind == "echo":
            told = f"you sent {dict(self.headers)}".replace("\n", " ")
            self._send(400, json.dumps({"error": told}).encode(), {"X-Error-Message": told})
            return
        if fault is not None and isinstance(fault.kind, int):
            self._send(fault.kind, b'{"error": "a fault"}', fault.headers)
            return
        try:
            self._route(data)
            if fault is not None:  # "lose": all was done, and the answer does not arrive
                self._hang_up()
        except Refused as error:
            body = json.dumps({"error": error.message, **error.body}).encode()
            self._send(error.status, body, {"X-Error-Code": error.code, "X-Error-Message": error.message})

    def _fault(self) -> Fault | None:
        with self.hub.lock:
            for fault in self.hub.faults:
                if fault.times and fault.method == self.command and re.search(fault.path, self.path_only):
                    fault.times -= 1
                    self.muted = fault.kind == "lose"
                    return fault
        self.muted = False
        return None

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _route(self, data: bytes) -> None:
        for pattern, action in ROUTES:
            method, _, path = pattern.partition(" ")
            found = re.fullmatch(path, self.path_only)
            if found and self.command in method.split("|"):
                action(self, data, *found.groups())
                return
        raise Refused(404, "EntryNotFound", "no such page")

    # what the actions use

    def user(self) -> str:
        """Who asks. Raises Refused for a token that is not known."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if not self.hub.tokens:
            return "user"
        if token not in self.hub.tokens:
            raise Refused(401, message="Invalid user token." if token else "Invalid username or password.")
        return self.hub.tokens[token]

    def writer(self, repo: str) -> None:
        """Raises Refused when who asks may not write to a repository, or there is none."""
        if repo.partition("/")[0] != self.user():
            raise Refused(403, message="you have no write access")
        if repo not in self.hub.repos:
            raise Refused(404, "RepoNotFound", "no such repository")

    def files(self, repo: str) -> dict[str, bytes]:
        """The files of a repository that who asks may read."""
        if "Authorization" in self.headers:
            self.user()
        refused = self.hub.status.get(repo, 404 if repo not in self.hub.repos else 0)
        if self.hub.private.get(repo) and self.hub.tokens:
            refused = refused or (0 if repo.partition("/")[0] == self.user() else 404)
        if refused:
            code = {401: "GatedRepo", 403: "GatedRepo", 404: "RepoNotFound"}.get(refused, "")
            raise Refused(refused, code)
        return self.hub.repos[repo]

    def json(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {})

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        if getattr(self, "muted", False):
            return
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


# Downloads


def info(h: _Handler, _: bytes, repo: str, revision: str | None = None) -> None:
    files = h.files(repo)
    if revision not in (None, "main", h.hub.sha):
        raise Refused(404, "RevisionNotFound")
    siblings = [{"rfilename": name} for name in files]
    h.json({"id": repo, "sha": h.hub.sha, "siblings": siblings, "private": h.hub.private.get(repo, False)})


def refs(h: _Handler, _: bytes, repo: str) -> None:
    h.files(repo)
    h.json({"branches": [{"name": "main", "ref": "refs/heads/main", "targetCommit": h.hub.sha}], "tags": []})


def tree(h: _Handler, _: bytes, repo: str) -> None:
    entries = []
    for name, data in sorted(h.files(repo).items(), key=lambda file: file[0].encode()):  # as git has them
        entry: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": git_id(data)}
        if is_large(name):
            entry["lfs"] = {"oid": sha256(data), "size": len(data), "pointerSize": 134}
        entries.append(entry)
    h.json(entries)


def resolve(h: _Handler, _: bytes, repo: str, name: str) -> None:
    files = h.files(repo)
    if name not in files:
        raise Refused(404, "EntryNotFound")
    body = h.command != "HEAD"
    if body:
        h.hub.fetched.append(f"{repo}/{name}")
    etag = hashlib.sha1(files[name]).hexdigest()
    headers = {"ETag": f'"{etag}"', "X-Repo-Commit": h.hub.sha, "Accept-Ranges": "bytes"}
    data, status = files[name], 200
    wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", h.headers.get("Range", ""))
    if wanted and h.hub.ranges:
        start, end = int(wanted[1]), min(int(wanted[2]), len(data) - 1)
        headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
        data, status = data[start : end + 1], 206
    h.hub.sent += len(data) if body else 0
    h._send(status, data, headers)


# Uploads


def whoami(h: _Handler, _: bytes) -> None:
    h.json({"type": "user", "name": h.user(), "orgs": [], "auth": {"type": "access_token"}})


def create(h: _Handler, data: bytes) -> None:
    asked = json.loads(data)
    repo = f"{asked.get('organization') or h.user()}/{asked['name']}"
    if repo.partition("/")[0] != h.user():
        raise Refused(403, message="you have no rights in this namespace")
    if repo in h.hub.repos:
        raise Refused(409, message="You already created this model repo", url=f"{h.hub.url}/{repo}")
    h.hub.repos[repo] = {".gitattributes": b"*.gguf filter=lfs diff=lfs merge=lfs -text\n"}
    h.hub.private[repo] = asked.get("visibility") == "private" or bool(asked.get("private"))
    h.json({"url": f"{h.hub.url}/{repo}", "name": repo})


def settings(h: _Handler, data: bytes, repo: str) -> None:
    h.writer(repo)
    asked = json.loads(data)
    h.hub.private[repo] = asked.get("visibility") == "private" or asked.get("private") is True
    h.json({})


def preupload(h: _Handler, data: bytes, repo: str) -> None:
    h.writer(repo)
    there = h.hub.repos[repo]
    answers = []
    for file in json.loads(data)["files"]:
        name = file["path"]
        mode = "lfs" if is_large(name) else "regular"
        known = None
        if name in there:
            known = sha256(there[name]) if mode == "lfs" else git_id(there[name])
        answers.append({"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": known})
    h.json({"files": answers})


def batch(h: _Handler, data: bytes, repo: str) -> None:
    h.writer(repo)
    objects = []
    for wanted in json.loads(data)["objects"]:
        oid, size = wanted["oid"], wanted["size"]
        answer: dict[str, Any] = {"oid": oid, "size": size}
        if oid not in h.hub.objects:
            upload: dict[str, Any] = {"href": f"{h.hub.url}/lfs/{oid}?signature=secret"}
            if h.hub.chunk is not None:
                count = -(-size // h.hub.chunk)
                upload["header"] = {"chunk_size": str(h.hub.chunk)} | {
                    str(n): f"{h.hub.url}/lfs/{oid}/{n}" for n in range(1, count + 1)
                }
            verify = {"href": f"{h.hub.url}/lfs-verify", "header": {}}
            answer["actions"] = {"upload": upload, "verify": verify}
        objects.append(answer)
    h.json({"transfer": "multipart" if h.hub.chunk else "basic", "objects": objects})


def put(h: _Handler, data: bytes, oid: str) -> None:
    if sha256(data) != oid:
        raise Refused(400, message="the content is not what its name says")
    h.hub.puts.append(oid)
    h.hub.objects[oid] = data
    h._send(200, b"", {"ETag": "whole"})


def put_part(h: _Handler, data: bytes, oid: str, number: str) -> None:
    h.hub.puts.append(f"{oid}/{number}")
    h.hub.parts.setdefault(oid, {})[int(number)] = data
    h._send(200, b"", {"ETag": f'"{number}"'})


def complete(h: _Handler, data: bytes, oid: str) -> None:
    asked = json.loads(data)
    whole = b"".join(h.hub.parts[oid][part["partNumber"]] for part in asked["parts"])
    if asked["oid"] != oid or sha256(whole) != oid:
        raise Refused(400, message="the parts are not the whole")
    h.hub.objects[oid] = whole
    h.json({})


def verify(h: _Handler, data: bytes) -> None:
    asked = json.loads(data)
    if len(h.hub.objects.get(asked["oid"], b"")) != asked["size"]:
        raise Refused(404, message="no such object")
    h.json({})


def commit(h: _Handler, data: bytes, repo: str) -> None:
    h.writer(repo)
    new: dict[str, bytes] = {}
    for line in map(json.loads, data.splitlines()):
        value = line["value"]
        if line["key"] == "file":
            new[value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "lfsFile":
            if value["oid"] not in h.hub.objects:
                raise Refused(400, message=f"the object of {value['path']} was not sent")
            new[value["path"]] = h.hub.objects[value["oid"]]
    if h.hub.spoil in new:
        new[h.hub.spoil] = new[h.hub.spoil][:-1]
    with h.hub.lock:
        h.hub.repos[repo].update(new)
        h.hub.commits.append((repo, list(new)))
        oid = f"{len(h.hub.commits):040x}"
    h.json({"commitUrl": f"{h.hub.url}/{repo}/commit/{oid}", "commitOid": oid, "success": True})


def validate_yaml(h: _Handler, data: bytes) -> None:
    content = json.loads(data)["content"]
    if not re.match(r"---\n.*?\n---\n", content, re.DOTALL):
        h.json({"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]})
    elif "license: nonsense" in content:
        h.json({"errors": [{"message": '"license" must be one of [apache-2.0, mit]'}], "warnings": []}, 400)
    else:
        h.json({"errors": [], "warnings": []})


def list_collections(h: _Handler, _: bytes) -> None:
    owner = h.query.get("owner", [""])[0]
    found = [c for c in h.hub.collections if c["owner"]["name"] == owner]
    h.json([{key: value for key, value in c.items() if key != "position"} for c in found])


def create_collection(h: _Handler, data: bytes) -> None:
    asked = json.loads(data)
    if asked["namespace"] != h.user():
        raise Refused(403)
    slug = (
        f"{asked['namespace']}/{re.sub(r'[^a-z0-9]+', '-', asked['title'].lower())}-0123456789abcdef01234567"
    )
    if any(c["slug"] == slug for c in h.hub.collections):
        raise Refused(409, slug=slug)
    h.hub.collections.append(
        {
            "slug": slug,
            "title": asked["title"],
            "owner": {"name": asked["namespace"], "type": "user"},
            "items": [],
            "lastUpdated": "2026-11-25T00:00:00.000Z",
            "position": 0,
            "private": asked["private"],
            "theme": "green",
            "upvotes": 0,
        }
    )
    h.json(h.hub.collections[-1])


def get_collection(h: _Handler, _: bytes, slug: str) -> None:
    found = next((c for c in h.hub.collections if c["slug"] == slug), None)
    if found is None:
        raise Refused(404)
    h.json(found)


def add_item(h: _Handler, data: bytes, slug: str) -> None:
    found = next(c for c in h.hub.collections if c["slug"] == slug)
    item = json.loads(data)["item"]
    if any(known["id"] == item["id"] for known in found["items"]):
        raise Refused(409)
    found["items"].append(
        {"_id": f"{len(found['items']):024x}", "id": item["id"], "type": item["type"], "position": 0}
    )
    h.json(found)


_REPO = r"([\w.-]+/[\w.-]+)"
_SLUG = r"([\w.-]+/[\w.-]+)"
ROUTES: list[tuple[str, Callable[..., None]]] = [
    ("GET /api/whoami-v2", whoami),
    ("POST /api/repos/create", create),
    ("POST /api/validate-yaml", validate_yaml),
    ("GET /api/collections", list_collections),
    ("POST /api/collections", create_collection),
    (f"GET /api/collections/{_SLUG}", get_collection),
    (f"POST /api/collections/{_SLUG}/items", add_item),
    (f"GET /api/models/{_REPO}", info),
    (f"GET /api/models/{_REPO}/refs", refs),
    (f"GET /api/models/{_REPO}/revision/(.+)", info),
    (f"GET /api/models/{_REPO}/tree/.+", tree),
    (f"PUT /api/models/{_REPO}/settings", settings),
    (f"POST /api/models/{_REPO}/preupload/.+", preupload),
    (f"POST /api/models/{_REPO}/commit/.+", commit),
    (f"POST /{_REPO}.git/info/lfs/objects/batch", batch),
    ("PUT /lfs/([0-9a-f]{64})", put),
    (r"PUT /lfs/([0-9a-f]{64})/(\d+)", put_part),
    ("POST /lfs/([0-9a-f]{64})", complete),
    ("POST /lfs-verify", verify),
    (f"GET|HEAD /{_REPO}/resolve/[^/]+/(.+)", resolve),
]


def is_large(name: str) -> bool:
    """Whether a file is kept apart from the repository itself."""
    return name.endswith((".gguf", ".safetensors"))


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def git_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
