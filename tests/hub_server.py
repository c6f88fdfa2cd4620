"""A Hub on the loopback interface: enough of its REST API for the real client to create, upload, commit and load."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_ThisIsTheSecretOfTheTests"
OWNER = "me"
CUT, SILENCE = 0, 1
LARGE_SUFFIXES = (".safetensors", ".png", ".parquet")


@dataclass
class Fault:
    """
    What the next `times` requests to a path with `path_part` in it get instead of an answer.

    `CUT` closes the connection in the middle of the request's body, `SILENCE` never answers.
    """

    path_part: str
    status: int
    times: int = 1_000_000
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Repository:
    """Files by path at each commit, oldest first, and the newest commit of each branch."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    branches: dict[str, str] = field(default_factory=dict)

    @property
    def head(self) -> str:
        return self.branches["main"]

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[self.head]

    def at(self, revision: str) -> tuple[str, dict[str, bytes]]:
        """Commit and files of a commit or a branch, or of the newest."""
        sha = revision if revision in self.commits else self.branches.get(revision, self.head)
        return sha, self.commits[sha]

    def commit(self, files: dict[str, bytes], message: str, branch: str = "main") -> str:
        sha = hashlib.sha1(f"{len(self.commits)} {message} {sorted(files)}".encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        self.messages.append(message)
        return sha


class HubServer(ThreadingHTTPServer):
    """
    `repositories` by full name (`datasets/owner/name` for data sets), `large` objects by sha256, `faults` to come, all
    `received` bodies, `requests`.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.received: list[bytes] = []
        self.requests: list[str] = []
        self.lock = threading.Lock()
        self.closing = threading.Event()

    def handle_error(self, request: object, client_address: object) -> None:
        """Connections that are cut are meant to be."""

    def next_fault(self, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.path_part in path and fault.times > 0:
                    fault.times -= 1
                    return fault
        return None


class Handler(BaseHTTPRequestHandler):
    """One request: reads it, answers by the first matching route."""

    server: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def answer(self, status: int, body: bytes | dict | list = b"", **headers: str) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def handle_request(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        length = int(self.headers.get("Content-Length", 0))
        fault = self.server.next_fault(path)
        if fault is not None and fault.status in (CUT, SILENCE):
            self.rfile.read(length // 2)
            if fault.status == SILENCE:
                self.server.closing.wait()
            self.close_connection = True
            self.connection.close()
            return
        body = self.rfile.read(length) if length else self.read_chunks()
        self.server.received.append(body)
        if fault is not None:
            self.answer(fault.status, {"error": "as ordered"}, **fault.headers)
        elif self.command != "GET" and self.command != "HEAD" and not self.is_allowed(path):
            self.answer(401, {"error": "Invalid credentials in Authorization header"})
        elif self.command == "PUT":
            self.put_large(path, body)
        elif self.command == "POST":
            self.post(path, body)
        else:
            self.get(path)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def read_chunks(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return b""
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def is_allowed(self, path: str) -> bool:
        # Like the storage behind the Hub, which takes signed addresses.
        return path.startswith("/storage/") or self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def put_large(self, path: str, body: bytes) -> None:
        oid = path.rpartition("/")[2]
        if hashlib.sha256(body).hexdigest() != oid:
            self.answer(400, {"error": "the content is not that of its name"})
            return
        self.server.large[oid] = body
        self.answer(200)

    def post(self, path: str, body: bytes) -> None:
        parts = path.strip("/").split("/")
        if path == "/api/repos/create":
            self.create(json.loads(body))
        elif path == "/api/validate-yaml":
            self.validate(json.loads(body)["content"])
        elif path.endswith(".git/info/lfs/objects/batch"):
            self.batch(json.loads(body)["objects"])
        elif path == "/verify":
            self.answer(200 if json.loads(body)["oid"] in self.server.large else 404, {})
        elif len(parts) == 6 and repository_name(parts[1], parts[2:4]) not in self.server.repositories:
            self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        elif len(parts) == 6 and parts[4] == "preupload":
            self.preupload(repository_name(parts[1], parts[2:4]), json.loads(body)["files"])
        elif len(parts) == 6 and parts[4] == "commit":
            self.commit(repository_name(parts[1], parts[2:4]), parts[5], body)
        elif len(parts) == 6 and parts[4] == "branch":
            self.create_branch(repository_name(parts[1], parts[2:4]), parts[5])
        elif len(parts) == 6 and parts[4] == "paths-info":
            repository = self.server.repositories[repository_name(parts[1], parts[2:4])]
            self.paths_info(repository.at(parts[5])[1], parse_qs(body.decode())["paths"])
        else:
            self.answer(404, {"error": f"no such address: {path}"})

    def create(self, wanted: dict) -> None:
        names = [wanted["organization"] or OWNER, wanted["name"]]
        name = repository_name(f"{wanted.get('type') or 'model'}s", names)
        known = name in self.server.repositories
        repository = self.server.repositories.setdefault(name, Repository())
        if not known:
            repository.private = wanted.get("visibility") == "private"
            repository.commit({}, "initial commit")
        self.answer(409 if known else 200, {"url": f"{self.server.url}/{name}", "name": "/".join(names)})

    def validate(self, content: str) -> None:
        try:
            front_matter = yaml.safe_load(content.split("---")[1])
            problem = None if isinstance(front_matter, dict) else "no keys"
            for key in ("language", "license"):
                values = front_matter.get(key) if problem is None else None
                values = values if isinstance(values, list) else [values]
                if not all(value is None or isinstance(value, str) and value == value.lower() for value in values):
                    problem = f"{key} must be a string in lower case"
        except (IndexError, yaml.YAMLError) as error:
            problem = str(error)
        errors = [{"message": problem}] if problem else []
        self.answer(400 if errors else 200, {"errors": errors, "warnings": []})

    def preupload(self, name: str, files: list[dict]) -> None:
        known = self.server.repositories[name].files
        answers = []
        for file in files:
            is_large = file["path"].endswith(LARGE_SUFFIXES)
            answer = {"path": file["path"], "uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False}
            if file["path"] in known:
                content = known[file["path"]]
                answer["oid"] = hashlib.sha256(content).hexdigest() if is_large else git_hash(content)
            answers.append(answer)
        self.answer(200, {"files": answers})

    def batch(self, objects: list[dict]) -> None:
        answers = []
        for entry in objects:
            known = {"oid": entry["oid"], "size": entry["size"]}
            if entry["oid"] not in self.server.large:
                known["actions"] = {
                    "upload": {"href": f"{self.server.url}/storage/{entry['oid']}"},
                    "verify": {"href": f"{self.server.url}/verify"},
                }
            answers.append(known)
        self.answer(200, {"transfer": "basic", "objects": answers})

    def create_branch(self, name: str, branch: str) -> None:
        repository = self.server.repositories[name]
        known = branch in repository.branches
        repository.branches.setdefault(branch, repository.head)
        self.answer(409 if known else 200, {"error": "Reference already exists"} if known else {})

    def commit(self, name: str, branch: str, body: bytes) -> None:
        repository = self.server.repositories[name]
        if branch not in repository.branches:
            self.answer(404, {"error": f"Invalid rev id: {branch}"}, X_Error_Code="RevisionNotFound")
            return
        files, message = dict(repository.at(branch)[1]), ""
        for line in filter(None, body.splitlines()):
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                message = value["summary"]
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.server.large[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        sha = repository.commit(files, message, branch)
        self.answer(200, {"commitUrl": f"{self.server.url}/{name}/commit/{sha}", "commitOid": sha})

    def get(self, path: str) -> None:
        parts = path.strip("/").split("/")
        is_api = parts[0] == "api"
        kind = parts[1] if is_api else "datasets" if parts[0] == "datasets" else "models"
        rest = parts[2:] if is_api else parts[1:] if kind == "datasets" else parts
        name, rest = repository_name(kind, rest[:2]), rest[2:]
        repository = self.server.repositories.get(name)
        if repository is None:
            self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            return
        sha, files = repository.at(rest[1] if len(rest) > 1 else "main")
        if is_api and rest[:1] == ["tree"]:
            self.tree(files, "/".join(rest[2:]), sha)
        elif is_api:
            siblings = [{"rfilename": file} for file in files]
            own_name = name.removeprefix("datasets/")
            self.answer(200, {"id": own_name, "modelId": own_name, "sha": sha, "siblings": siblings, "tags": []})
        else:
            self.resolve(files.get("/".join(rest[2:])), sha)

    def tree(self, files: dict[str, bytes], folder: str, sha: str) -> None:
        prefix = f"{folder}/" if folder else ""
        is_recursive = parse_qs(urlsplit(self.path).query).get("recursive", ["false"])[0].lower() == "true"
        below = [file for file in files if file.startswith(prefix)]
        if folder and not below:
            self.answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
            return
        listed = [file for file in below if is_recursive or "/" not in file.removeprefix(prefix)]
        folders = {prefix + file.removeprefix(prefix).split("/")[0] for file in below if file not in listed}
        entries = [folder_entry(name) for name in sorted(folders)]
        self.answer(200, entries + [file_entry(file, files[file]) for file in listed])

    def paths_info(self, files: dict[str, bytes], paths: list[str]) -> None:
        entries = [file_entry(path, files[path]) for path in paths if path in files]
        folders = [path for path in paths if any(file.startswith(f"{path}/") for file in files)]
        self.answer(200, entries + [folder_entry(path) for path in folders])

    def resolve(self, content: bytes | None, sha: str) -> None:
        if content is None:
            self.answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
            return
        headers = {"X_Repo_Commit": sha, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
        wanted = self.headers.get("Range", "").removeprefix("bytes=")
        if wanted:
            first, _, last = wanted.partition("-")
            end = min(int(last or len(content)), len(content) - 1)
            place = f"bytes {first}-{end}/{len(content)}"
            self.answer(206, content[int(first) : end + 1], Content_Range=place, **headers)
        else:
            self.answer(200, content, **headers)


def repository_name(kind: str, names: list[str]) -> str:
    """The key of a repository: models go by their own name."""
    return "/".join(names if kind == "models" else [kind, *names])


def git_hash(content: bytes) -> str:
    """The name that git gives to a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def file_entry(path: str, content: bytes) -> dict:
    """A file as listings have it."""
    entry = {"type": "file", "path": path, "size": len(content), "oid": git_hash(content)}
    if path.endswith(LARGE_SUFFIXES):
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return entry


def folder_entry(path: str) -> dict:
    """A folder as listings have it."""
    return {"type": "directory", "path": path, "oid": hashlib.sha1(path.encode()).hexdigest()}


@contextmanager
def running_hub() -> Iterator[HubServer]:
    """A server in a thread of its own, for as long as the block runs."""
    with HubServer() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.closing.set()
        server.shutdown()
        thread.join()
