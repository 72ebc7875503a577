"""A small Hugging Face Hub on loopback, for tests that drive the real ``huggingface_hub`` and timm in processes.

    with HubServer() as hub:
        hub.add_repo("timm/base", {"config.json": b"{}", "model.safetensors": weights})
        hub.drop(("POST", r"/commit/"), when="after")                    # the commit is made, its answer is lost
        subprocess.run([sys.executable, "-c", CODE], env=hub.env(tmp_path, hub.token("alice")), check=True)
        assert hub.repos["alice/model"].head().files["config.json"] == b"{}"
        assert hub.count("PUT", "/storage/") == 1 and not hub.leaks

There are two origins, as on the real Hub: the API, and the storage where LFS files go to and come from. Everything is
held in memory and follows from what was sent: no clock, no random number.
"""

import base64
import json
import os
import re
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import parse_qs, quote, unquote

Match = tuple[str, str]  # regular expressions: the whole method ("GET|HEAD"), any part of the path with its query

HARNESSES = "/api/agent-harnesses"  # asked for at most once a home, whatever the call: neither logged nor made to fail
LFS_SUFFIXES = (".bin", ".npz", ".onnx", ".pt", ".pth", ".safetensors")


@dataclass(frozen=True)
class Commit:
    """A snapshot of a repository: all its files, and which of them are stored as LFS objects."""

    sha: str
    files: dict[str, bytes]
    message: str
    author: str = "system"
    lfs: frozenset[str] = frozenset()


@dataclass
class Repo:
    """A model repository; ``branches`` also holds the pull requests ("refs/pr/1"), the oldest commit comes first."""

    id: str
    private: bool = False
    branches: dict[str, list[Commit]] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)  # LFS content by sha256, committed or not

    def head(self, branch="main"):
        """The last commit of a branch."""
        return self.branches[branch][-1]

    def make(self, history, files, message, **fields):
        """A commit on top of ``history``, named by a hash of all that it is made of."""
        parts = [self.id, history[-1].sha if history else "", message, fields.get("author", "system")]
        parts += [f"{path} {sha256(data).hexdigest()}" for path, data in sorted(files.items())]
        return Commit(sha1("\n".join(parts).encode()).hexdigest(), files, message, **fields)


@dataclass(frozen=True)
class Request:
    """A request, noted when its head has come."""

    method: str
    path: str
    headers: Mapping[str, str]
    origin: str


@dataclass
class Fault:
    """What goes wrong with the next ``times`` requests that match (None: with all of them); ``hits`` counts them."""

    kind: Literal["fail", "before", "after", "stall", "truncate", "alter"]
    match: Match
    times: int | None = 1
    status: int = 0
    seconds: float = 0.0
    change: Callable[[bytes], bytes] = bytes
    hits: int = 0


class HubServer:
    """The Hub, which serves while this context manager is open.

    Attributes:
        url: Where the API is; the storage has an origin of its own.
        tokens: Users by their tokens: alice and bob.
        orgs: Organisations, and who may write to them.
        repos: What is stored, by id.
        requests: All requests, in the order they came.
    """

    def __init__(self):
        self.tokens = {self.token(user): user for user in ("alice", "bob")}
        self.orgs = {"lab": ["alice"]}
        self.repos: dict[str, Repo] = {}
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.errors: list[BaseException] = []  # the server's own, raised when it is closed
        self.lock = threading.RLock()
        self.closed = threading.Event()

    def __enter__(self):
        self._servers = [_Server(self, origin) for origin in ("hub", "storage")]
        self.url, self.storage_url = (f"http://127.0.0.1:{server.server_port}" for server in self._servers)
        for server in self._servers:
            server.thread.start()
        return self

    def __exit__(self, kind, *_):
        self.closed.set()
        for server in self._servers:
            server.shutdown()
            server.thread.join()
            server.server_close()
        if self.errors and kind is None:
            raise self.errors[0]

    def token(self, user):
        """The token of a user."""
        return f"hf_{user}_write"

    def env(self, home, token=None, **extra):
        """The environment of a client: this Hub, a home of its own, a token or none, no proxy, no Xet."""
        kept = {k: v for k, v in os.environ.items() if not re.match(r"HF_|HUGGING|.*_proxy$", k, re.IGNORECASE)}
        kept |= {"HF_ENDPOINT": self.url, "HF_HOME": str(home)} | ({"HF_TOKEN": token} if token else {})
        switches = ("HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_PROGRESS_BARS")
        return kept | dict.fromkeys(switches, "1") | extra

    def add_repo(self, repo_id, files=None, private=False):
        """Creates a repository as the site does, with a ``.gitattributes``, then commits ``files`` if there are any."""
        attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()
        repo = self.repos[repo_id] = Repo(repo_id, private)
        history = repo.branches["main"] = [repo.make([], {".gitattributes": attributes}, "initial commit")]
        if files:
            lfs = frozenset(path for path in files if path.endswith(LFS_SUFFIXES))
            repo.objects |= {sha256(files[path]).hexdigest(): files[path] for path in lfs}
            author = repo_id.split("/")[0]
            history.append(repo.make(history, history[0].files | dict(files), "Add files", author=author, lfs=lfs))
        return repo

    def fail(self, match, status=500, times=1):
        """Answers with an error and does no work."""
        return self._add(Fault("fail", match, times, status=status))

    def drop(self, match, when="before"):
        """Closes the connection before the work, or after it (a lost answer)."""
        return self._add(Fault(when, match))

    def stall(self, match, seconds):
        """Waits before the work, at most until the server is closed."""
        return self._add(Fault("stall", match, seconds=seconds))

    def truncate(self, match):
        """Announces the whole body, sends half of it and closes; LFS files come from ``/storage/...?filename=``."""
        return self._add(Fault("truncate", match))

    def alter(self, match, change):
        """Sends another body under the same headers."""
        return self._add(Fault("alter", match, change=change))

    def _add(self, fault):
        self.faults.append(fault)
        return fault

    def take_fault(self, method, path):
        """The first fault that is left for a request, which uses it up."""
        with self.lock:
            for fault in self.faults:
                left = fault.times is None or fault.hits < fault.times
                if left and re.fullmatch(fault.match[0], method) and re.search(fault.match[1], path):
                    fault.hits += 1
                    return fault

    def select(self, method=".*", path=""):
        """The requests with this method and this in their path."""
        return [r for r in list(self.requests) if re.fullmatch(method, r.method) and re.search(path, r.path)]

    def count(self, method=".*", path=""):
        """How many requests ``select`` finds."""
        return len(self.select(method, path))

    @property
    def leaks(self):
        """Requests that show a token where none belongs: in the path, or to the storage."""
        in_path = self.select(path="|".join(self.tokens))
        return in_path + [r for r in self.requests if r.origin == "storage" and "authorization" in r.headers]


# -------------------------------------------------------------------------------------------------------- the transport
@dataclass
class Answer:
    """What is sent back."""

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


def _json(data, status=200, **headers):
    return Answer(status, json.dumps(data).encode(), {"Content-Type": "application/json"} | headers)


class HubError(Exception):
    """A refusal, as the Hub puts it."""

    def __init__(self, status, message, code="", **more):
        super().__init__(message)
        self.answer = _json({"error": message} | more, status, **{"X-Error-Message": message, "X-Error-Code": code})


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, hub, origin):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub, self.origin = hub, origin
        self.thread = threading.Thread(target=self.serve_forever, args=(0.02,), name=f"hub-server-{origin}")

    def handle_error(self, request, client_address):
        error = sys.exc_info()[1]
        if error is not None and not isinstance(error, ConnectionError | TimeoutError):  # clients may hang up
            self.hub.errors.append(error)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = 60

    def _serve(self):
        hub, origin, quiet = self.server.hub, self.server.origin, self.path == HARNESSES
        if not quiet:
            hub.requests.append(Request(self.command, self.path, self.headers, origin))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = None if quiet else hub.take_fault(self.command, self.path)
        kind, answer = fault.kind if fault else "", None
        if kind == "stall":
            hub.closed.wait(fault.seconds)
        if kind == "fail":
            page = Answer(fault.status, b"<html>Unavailable</html>", {"Content-Type": "text/html"})
            answer = _json({"error": "Internal Error"}, fault.status) if fault.status <= 500 else page
        elif kind != "before":
            with hub.lock:
                answer = Call(hub, origin, self.command, self.path, self.headers, body).answer()
        if kind == "alter":
            answer = replace(answer, body=fault.change(answer.body))
        if answer is None or kind == "after":
            self.close_connection = True
        else:
            self._send(answer, kind == "truncate")

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _send(self, answer, truncate):
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body[: len(answer.body) // 2] if truncate else answer.body)
        self.close_connection = self.close_connection or truncate

    def log_message(self, format, *args):
        pass


# -------------------------------------------------------------------------------------------------------------- the API
_ROUTES = []  # methods, pattern of the path, origin, function
_REPO = r"(?P<repo>[^/]+/[^/]+)"
_MODEL = rf"/api/models/{_REPO}"
_REV = r"(?P<rev>[^/]+)"


def _route(methods, pattern, origin="hub"):
    def register(function):
        _ROUTES.append((methods.split(), re.compile(pattern), origin, function))
        return function

    return register


def _blob_id(data):
    return sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _part(answer, asked):
    """The part of a body that a Range header asks for."""
    found = re.fullmatch(r"bytes=(\d+)-(\d*)", asked)
    if found is None or answer.status != 200:
        return answer
    size, start = len(answer.body), int(found[1])
    stop = min(int(found[2]) + 1, size) if found[2] else size
    return Answer(206, answer.body[start:stop], {**answer.headers, "Content-Range": f"bytes {start}-{stop - 1}/{size}"})


@dataclass
class Call:
    """A request on its way to the function that answers it."""

    hub: HubServer
    origin: str
    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes
    args: dict[str, str] = field(default_factory=dict)  # the groups of the route's pattern, unquoted

    def answer(self):
        """What the first route that fits has to say."""
        for methods, pattern, origin, function in _ROUTES:
            found = pattern.fullmatch(self.path.partition("?")[0])
            if found and origin == self.origin and self.method in methods:
                self.args = {name: unquote(value) for name, value in found.groupdict().items() if value is not None}
                try:
                    return _part(function(self), self.headers.get("range", ""))
                except HubError as error:
                    return error.answer
        return HubError(404, f"The tests' Hub does not know {self.method} {self.path}").answer

    @property
    def asks_for_pull_request(self):
        """Whether a commit is to open a pull request."""
        return "create_pr" in parse_qs(self.path.partition("?")[2])

    @property
    def caller(self):
        """The user who asks; None without a token."""
        header = self.headers.get("authorization", "")
        if header and header.removeprefix("Bearer ") not in self.hub.tokens:
            raise HubError(401, "Invalid credentials in Authorization header")
        return self.hub.tokens[header.removeprefix("Bearer ")] if header else None

    def owns(self, namespace):
        """Whether the caller is, or belongs to, a namespace."""
        return self.caller == namespace or self.caller in self.hub.orgs.get(namespace, ())

    def repo(self, need: Literal["read", "pull", "write"] = "read"):
        """The repository, if the caller may read it, open a pull request on it, or write to it."""
        repo, caller = self.hub.repos.get(self.args["repo"]), self.caller
        owner = self.owns(self.args["repo"].split("/")[0])
        if caller is None and (need != "read" or repo is None or repo.private):
            raise HubError(401, "Invalid username or password.", "RepoNotFound")
        if repo is None or (repo.private and not owner):
            raise HubError(404, "Repository not found", "RepoNotFound")
        if need == "write" and not owner:
            raise HubError(403, "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request")
        return repo

    def history(self, repo):
        """The commits up to the revision that is asked for: the branch's own list, or what led to a commit."""
        revision = self.args.get("rev") or "main"
        if revision in repo.branches:
            return repo.branches[revision]
        for history in repo.branches.values():
            shas = [commit.sha for commit in history]
            if revision in shas:
                return history[: shas.index(revision) + 1]
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def target(self):
        """The repository and the history that an upload is for."""
        pull = self.asks_for_pull_request or self.args["rev"].startswith("refs/pr/")
        repo = self.repo("pull" if pull else "write")
        if self.args["rev"] not in repo.branches:
            raise HubError(404, f"Invalid rev id: {self.args['rev']}", "RevisionNotFound")
        return repo, repo.branches[self.args["rev"]]

    # ---------------------------------------------------------------------------------------------- users, repositories
    @_route("GET", HARNESSES)
    def _harnesses(self):
        return _json({"standardEnvVars": [], "harnesses": {}})

    @_route("GET", "/api/whoami-v2")
    def _whoami(self):
        if self.caller is None:
            raise HubError(401, "Invalid username or password.")
        orgs = [{"type": "org", "name": org} for org, members in self.hub.orgs.items() if self.caller in members]
        return _json({"type": "user", "id": self.caller, "name": self.caller, "orgs": orgs})

    @_route("POST", "/api/repos/create")
    def _create_repo(self):
        asked = json.loads(self.body)
        if self.caller is None:
            raise HubError(401, "Invalid username or password.")
        owner = asked.get("organization") or self.caller
        if not self.owns(owner):
            raise HubError(403, f'You don\'t have the rights to create a model under the namespace "{owner}"')
        repo_id = f"{owner}/{asked['name']}"
        url = f"{self.hub.url}/{repo_id}"
        if repo_id in self.hub.repos:
            raise HubError(409, "You already created this model repo", url=url)
        self.hub.add_repo(repo_id, private=asked.get("visibility") == "private" or asked.get("private") is True)
        return _json({"url": url, "name": repo_id})

    @_route("POST", f"{_MODEL}/branch/(?P<name>[^/]+)")
    def _create_branch(self):
        repo, name = self.repo("write"), self.args["name"]
        if name in repo.branches:
            raise HubError(409, f"Reference already exists: {name}")
        self.args["rev"] = json.loads(self.body or b"{}").get("startingPoint", "main")
        repo.branches[name] = list(self.history(repo))
        return _json({})

    @_route("GET", f"{_MODEL}/refs")
    def _refs(self):
        refs = {"branches": [], "pullRequests": [], "tags": [], "converts": []}
        for name, history in self.repo().branches.items():
            pull = name.startswith("refs/pr/")
            ref = {"name": name, "ref": name if pull else f"refs/heads/{name}", "targetCommit": history[-1].sha}
            refs["pullRequests" if pull else "branches"].append(ref)
        return _json(refs)

    # ---------------------------------------------------------------------------------------------------------- reading
    @_route("GET", f"{_MODEL}(/revision/{_REV})?")
    def _model_info(self):
        repo = self.repo()
        commit, rows = self.history(repo)[-1], []
        for path, data in sorted(commit.files.items()):
            rows.append({"rfilename": path, "size": len(data), "blobId": _blob_id(data)})
            if path in commit.lfs:
                rows[-1]["lfs"] = {"sha256": sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        return _json({"id": repo.id, "sha": commit.sha, "private": repo.private, "tags": [], "siblings": rows})

    @_route("GET HEAD", f"/{_REPO}/resolve/{_REV}/(?P<path>.+)")
    def _resolve(self):
        repo, path = self.repo(), self.args["path"]
        commit = self.history(repo)[-1]
        if path not in commit.files:
            raise HubError(404, "Entry not found", "EntryNotFound")
        data, headers = commit.files[path], {"X-Repo-Commit": commit.sha}
        if path not in commit.lfs:
            return Answer(200, data, headers | {"ETag": f'"{_blob_id(data)}"'})
        oid = sha256(data).hexdigest()
        headers |= {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(data))}
        location = f"{self.hub.storage_url}/storage/{repo.id}/{oid}?filename={quote(path)}"
        return Answer(302, headers=headers | {"Location": location})

    # ------------------------------------------------------------------------------------------------------ LFS storage
    @_route("GET PUT", f"/storage/{_REPO}/(?P<oid>[0-9a-f]+)", origin="storage")
    def _object(self):
        repo, oid = self.hub.repos[self.args["repo"]], self.args["oid"]
        if self.method == "GET":
            return Answer(200, repo.objects[oid], {"Content-Type": "application/octet-stream"})
        if sha256(self.body).hexdigest() != oid:
            raise HubError(400, "BadDigest")
        repo.objects[oid] = self.body
        return Answer()

    @_route("POST", rf"/{_REPO}\.git/info/lfs/objects/batch")
    def _lfs_batch(self):
        asked = json.loads(self.body)
        branch = asked.get("ref", {}).get("name", "refs/pr/")  # the client names none where it opens a pull request
        repo = self.repo("pull" if branch.startswith("refs/pr/") else "write")
        objects = [{"oid": thing["oid"], "size": thing["size"]} for thing in asked["objects"]]
        for thing in objects:
            if thing["oid"] not in repo.objects:
                href = f"{self.hub.storage_url}/storage/{repo.id}/{thing['oid']}"
                thing["actions"] = {"upload": {"href": href}}
        return _json({"transfer": "basic", "objects": objects})

    # ---------------------------------------------------------------------------------------------------------- writing
    @_route("POST", "/api/validate-yaml")
    def _validate_yaml(self):
        return _json({"errors": [], "warnings": []})

    @_route("POST", f"{_MODEL}/preupload/{_REV}")
    def _preupload(self):
        self.target()
        paths = [file["path"] for file in json.loads(self.body)["files"]]
        modes = {path: "lfs" if path.endswith(LFS_SUFFIXES) else "regular" for path in paths}
        return _json({"files": [{"path": p, "uploadMode": mode, "shouldIgnore": False} for p, mode in modes.items()]})

    @_route("POST", f"{_MODEL}/commit/{_REV}")
    def _commit(self):
        (repo, history), pull = self.target(), self.asks_for_pull_request
        header, *lines = [json.loads(line) for line in self.body.splitlines() if line]
        self.args["rev"] = header["value"].get("parentCommit") or history[-1].sha
        if self.args["rev"] != history[-1].sha and not pull:
            raise HubError(412, "The branch was updated since you opened this page. Please refresh and try again.")
        files, lfs = dict(self.history(repo)[-1].files), set(self.history(repo)[-1].lfs)
        for line in lines:
            value, path = line["value"], line["value"]["path"]
            if line["key"] == "lfsFile":
                files[path] = repo.objects[value["oid"]]
                lfs.add(path)
            else:
                files[path] = base64.b64decode(value["content"])
        fields = {"lfs": frozenset(lfs), "author": self.caller}
        made = repo.make(self.history(repo), files, header["value"]["summary"], **fields)
        info = {"success": True, "commitOid": made.sha, "commitUrl": f"{self.hub.url}/{repo.id}/commit/{made.sha}"}
        if not pull:
            history.append(made)
            return _json(info)
        number = 1 + sum(name.startswith("refs/pr/") for name in repo.branches)
        repo.branches[f"refs/pr/{number}"] = [*self.history(repo), made]
        return _json(info | {"pullRequestUrl": f"{self.hub.url}/{repo.id}/discussions/{number}"})
