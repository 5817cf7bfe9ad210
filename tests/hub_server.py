"""A Hub on loopback, for tests: repos, branches, commits, large files and tokens, as huggingface_hub asks for them.

Everything is kept in memory. Knows HTTP and content by hash; knows nothing of models. Faults are switched on by tests.
"""

import base64
import hashlib
import json
import re
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from huggingface_hub.repocard_data import model_index_to_eval_results


TOKEN, USER = "hf_loopback", "me"
LARGE_BYTES = 10_000_000  # from here on any file is a large one, as on the Hub
LARGE_SUFFIXES = (".safetensors", ".png", ".bin")
TEXT_FIELDS = ("license", "library_name", "pipeline_tag")
LIST_FIELDS = {"tags", "datasets", "metrics"}
TASKS = {"text-to-image", "image-to-image", "image-to-text", "any-to-any", "zero-shot-image-classification"}


@dataclass
class File:
    """Content of a file in a commit; of a large one its hash stands for it."""

    content: bytes | None
    size: int
    sha256: str | None = None

    @property
    def oid(self) -> str:
        content = self.content if self.content is not None else f"sha256:{self.sha256} {self.size}".encode()
        return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


@dataclass
class Commit:
    oid: str
    message: str
    files: dict[str, File] = field(default_factory=dict)


@dataclass
class Repo:
    name: str
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.commit("main", "initial commit", {".gitattributes": File(b"*.safetensors filter=lfs\n", 25)})

    def commit(self, branch: str, message: str, files: dict[str, File]) -> Commit:
        told = json.dumps([self.name, branch, message, len(self.commits), {p: f.oid for p, f in files.items()}])
        commit = Commit(hashlib.sha1(told.encode()).hexdigest(), message, files)
        self.commits[commit.oid], self.branches[branch] = commit, commit.oid
        return commit

    def find(self, revision: str) -> Commit | None:
        return self.commits.get(self.branches.get(revision, revision))


class HubServer:
    """Answers until the `with` block ends.

    Attributes:
        requests: What was asked: method, path, and bytes received.
        cuts_uploads_from: The number of the upload (0 is the first) that breaks off in the middle, with all after it.
        refused: Status for requests whose path has these words in it, as `{"/commit/": 503}`.
        part_bytes: Size of the parts in which large files are to be sent; none: whole.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.requests: list[tuple[str, str, int]] = []
        self.cuts_uploads_from: int | None = None
        self.num_uploads = 0
        self.refused: dict[str, int] = {}
        self.part_bytes: int | None = None
        self.lock = threading.RLock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *reason: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home: Any, token: str | None = TOKEN) -> dict[str, str]:
        """What a process needs to talk to this Hub alone."""
        told = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        told |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1"}
        return told | ({} if token is None else {"HF_TOKEN": token})

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """The files of a repo as a visitor reads them."""
        commit = self.repos[repo_id].find(revision)
        assert commit is not None
        return {path: self.read(file) for path, file in commit.files.items()}

    def read(self, file: File) -> bytes:
        return self.large[file.sha256] if file.content is None and file.sha256 else file.content or b""

    def uploads(self) -> list[str]:
        """Paths that large content was sent to."""
        return [path for method, path, _ in self.requests if method == "PUT"]


class Handler(BaseHTTPRequestHandler):
    """Takes a request apart and answers it."""

    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        """Stays quiet."""

    def do_GET(self) -> None:
        self.answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def answer(self) -> None:
        url = urlsplit(self.path)
        path, self.query = url.path, parse_qs(url.query)
        if self.command == "PUT" and self.breaks_off():
            return
        self.body = self.read_body()
        with self.hub.lock:
            self.hub.requests.append((self.command, path, len(self.body)))
            for words, status in self.hub.refused.items():
                if words in path:
                    return self.fail(status, "Refused")
            if self.user_of_token() is False:
                return self.fail(401, message="Invalid credentials in Authorization header")
            for method, pattern, act in ROUTES:
                if method == self.command.replace("HEAD", "GET") and (match := re.fullmatch(pattern, path)):
                    return act(self, *map(unquote, match.groups()))
        self.fail(404, "NotFound")

    def breaks_off(self) -> bool:
        """Reads half of an upload and hangs up, if that is asked for."""
        with self.hub.lock:
            number, first = self.hub.num_uploads, self.hub.cuts_uploads_from
            self.hub.num_uploads += 1
        if first is None or number < first:
            return False
        self.rfile.read(int(self.headers.get("Content-Length") or 2) // 2)
        self.close_connection = True
        self.connection.close()
        return True

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        pieces = []
        while size := int(self.rfile.readline(), 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def user_of_token(self) -> str | bool | None:
        """The user; None without a token, False with a wrong one."""
        sent = self.headers.get("Authorization")
        return None if sent is None else sent == f"Bearer {TOKEN}" and USER

    def say(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def fail(self, status: int, code: str | None = None, message: str = "") -> None:
        told = {"X-Error-Code": code, "X-Error-Message": message}
        self.say({"error": message or code}, status, {name: text for name, text in told.items() if text})

    def find(self, repo_id: str, revision: str = "main") -> tuple[Repo, Commit] | None:
        """Finds a commit that the asker may see; answers why not otherwise."""
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and not self.user_of_token()):
            self.fail(401, "RepoNotFound", "Repository not found")
        elif (commit := repo.find(revision)) is None:
            self.fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        else:
            return repo, commit
        return None

    def who(self) -> None:
        if not self.user_of_token():
            return self.fail(401, message="Invalid credentials in Authorization header")
        self.say({"type": "user", "name": USER, "fullname": USER, "orgs": [], "auth": {"type": "access_token"}})

    def create(self) -> None:
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        if not self.user_of_token():
            return self.fail(401, message="Invalid username or password.")
        if not name.startswith(f"{USER}/"):
            return self.fail(403, message=f"You don't have the rights to create a model under the namespace {name}")
        url = {"url": f"{self.hub.url}/{name}", "id": name, "name": name}
        if name in self.hub.repos:
            return self.say({**url, "error": "You already created this model repo"}, 409)
        self.hub.repos[name] = Repo(name, asked.get("visibility") == "private" or bool(asked.get("private")))
        self.say(url)

    def info(self, repo_id: str, revision: str = "main") -> None:
        if found := self.find(repo_id, revision):
            repo, commit = found
            card = read_front_matter(self.hub.read(commit.files["README.md"])) if "README.md" in commit.files else {}
            library = card.get("library_name")
            told = {"id": repo.name, "modelId": repo.name, "sha": commit.oid, "private": repo.private}
            told |= {"tags": [*card.get("tags", []), *([library] if library else [])], "downloads": 0, "likes": 0}
            told |= {"siblings": [{"rfilename": path} for path in sorted(commit.files)], "library_name": library}
            self.say(told | ({"cardData": card} if card else {}))

    def tree(self, repo_id: str, revision: str) -> None:
        if found := self.find(repo_id, revision):
            self.say([describe(path, file) for path, file in sorted(found[1].files.items())])

    def paths_info(self, repo_id: str, revision: str) -> None:
        if found := self.find(repo_id, revision):
            files, asked = found[1].files, parse_qs(self.body.decode())["paths"]
            self.say([describe(path, files[path]) for path in asked if path in files])

    def refs(self, repo_id: str) -> None:
        if found := self.find(repo_id):
            named = found[0].branches.items()
            told = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": oid} for name, oid in named]
            self.say({"branches": told, "tags": [], "converts": []})

    def branch(self, repo_id: str, name: str) -> None:
        if self.may_write() and (
            found := self.find(repo_id, json.loads(self.body or b"{}").get("startingPoint", "main"))
        ):
            if name in found[0].branches:
                return self.fail(409, message=f"Reference already exists: {name}")
            found[0].branches[name] = found[1].oid
            self.say({})

    def may_write(self) -> bool:
        if not self.user_of_token():
            self.fail(401, message="Invalid username or password.")
            return False
        return True

    def preupload(self, repo_id: str, revision: str) -> None:
        if not (self.may_write() and (found := self.find(repo_id, revision))):
            return
        told = []
        for asked in json.loads(self.body)["files"]:
            path = asked["path"]
            is_large = asked["size"] >= LARGE_BYTES or path.endswith(LARGE_SUFFIXES)
            file = found[1].files.get(path)
            entry = {"path": path, "uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False}
            told.append(entry | ({} if file is None else {"oid": file.sha256 or file.oid}))
        self.say({"files": told})

    def batch(self, repo_id: str) -> None:
        if not (self.may_write() and self.find(repo_id)):
            return
        objects = []
        for asked in json.loads(self.body)["objects"]:
            entry = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.hub.large:
                entry["actions"] = {"upload": self.upload_action(asked["oid"], asked["size"])}
                entry["actions"]["verify"] = {"href": f"{self.hub.url}/large/{asked['oid']}/verify"}
            objects.append(entry)
        self.say({"transfer": "basic", "objects": objects})

    def upload_action(self, oid: str, size: int) -> dict[str, Any]:
        url, part = f"{self.hub.url}/large/{oid}", self.hub.part_bytes
        if part is None or size <= part:
            return {"href": url}
        parts = {str(number + 1): f"{url}/{number + 1}" for number in range(-(-size // part))}
        return {"href": f"{url}/complete", "header": {"chunk_size": str(part), **parts}}

    def put_large(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self.fail(400, message="The content is not that of its hash")
        self.hub.large[oid] = self.body
        self.say(b"")

    def put_part(self, oid: str, number: str) -> None:
        self.hub.parts[oid, int(number)] = self.body
        self.say(b"", headers={"ETag": hashlib.md5(self.body).hexdigest()})

    def complete(self, oid: str) -> None:
        numbers = [part["partNumber"] for part in json.loads(self.body)["parts"]]
        self.body = b"".join(self.hub.parts[oid, number] for number in numbers)
        self.put_large(oid)

    def verify(self, oid: str) -> None:
        self.say({}) if oid in self.hub.large else self.fail(404, message="No such object")

    def commit(self, repo_id: str, branch: str) -> None:
        if not (self.may_write() and (found := self.find(repo_id, branch))):
            return
        lines = [json.loads(line) for line in self.body.splitlines()]
        files = dict(found[1].files)
        header = next(line["value"] for line in lines if line["key"] == "header")
        if header.get("parentCommit", found[1].oid) != found[1].oid:
            return self.fail(412, message="A commit has happened since. Please refresh and try again.")
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                content = base64.b64decode(value["content"])
                files[value["path"]] = File(content, len(content))
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.large:
                    return self.fail(400, message=f"Large file {value['path']} was not uploaded")
                files[value["path"]] = File(None, value["size"], value["oid"])
            elif line["key"] == "deletedFile":
                files.pop(value["path"])
        commit = found[0].commit(branch, header["summary"], files)
        self.say({"commitUrl": f"{self.hub.url}/{repo_id}/commit/{commit.oid}", "commitOid": commit.oid})

    def validate_yaml(self) -> None:
        try:
            card = read_front_matter(json.loads(self.body)["content"].encode())
            faults = find_faults(card)
        except yaml.YAMLError as error:
            card, faults = {}, [str(error)]
        if faults:
            return self.say({"errors": [{"message": fault} for fault in faults], "warnings": []}, 400)
        missing = [] if card else [{"message": "empty or missing yaml metadata in repo card"}]
        self.say({"errors": [], "warnings": missing})

    def resolve(self, repo_id: str, revision: str, path: str) -> None:
        if not (found := self.find(repo_id, revision)):
            return
        if (file := found[1].files.get(path)) is None:
            return self.fail(404, "EntryNotFound", "Entry not found")
        content = self.hub.read(file)
        told = {"X-Repo-Commit": found[1].oid, "ETag": f'"{file.sha256 or file.oid}"', "Accept-Ranges": "bytes"}
        if file.sha256 is not None:
            told |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(file.size)}
        if part := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(part[1]), int(part[2] or len(content) - 1)
            told["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
            return self.say(content[start : end + 1], 206, told)
        self.say(content, 200, told)


def describe(path: str, file: File) -> dict[str, Any]:
    told = {"type": "file", "path": path, "size": file.size, "oid": file.oid}
    if file.sha256 is not None:
        told["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": 130}
    return told


def find_faults(card: dict[str, Any]) -> list[str]:
    """Says what the Hub would not take in the front matter of a model's card."""
    faults = [f'"{name}" must be a string' for name in TEXT_FIELDS if name in card and not isinstance(card[name], str)]
    for name in LIST_FIELDS & card.keys():
        if not isinstance(card[name], list) or not all(isinstance(item, str) for item in card[name]):
            faults.append(f'"{name}" must be a list of strings')
    if "pipeline_tag" in card and card["pipeline_tag"] not in TASKS:
        faults.append(f'"pipeline_tag" must be one of {sorted(TASKS)}')
    faults += [f"{name!r} is no Hub id" for name in card.get("datasets", []) if not re.fullmatch(NAME, name)]
    try:
        model_index_to_eval_results(card.get("model-index", []) or [{"name": "none", "results": []}])
    except (KeyError, TypeError) as error:
        faults.append(f'"model-index" cannot be read: {error!r}')
    return faults


def read_front_matter(card: bytes) -> dict[str, Any]:
    match = re.match(r"---\s*\n(.*?)\n---", card.decode(), re.DOTALL)
    return (yaml.safe_load(match[1]) or {}) if match else {}


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("GET", "/api/whoami-v2", Handler.who),
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.validate_yaml),
    ("GET", f"/api/models/{NAME}", Handler.info),
    ("GET", f"/api/models/{NAME}/revision/([^/]+)", Handler.info),
    ("GET", f"/api/models/{NAME}/tree/([^/]+)", Handler.tree),
    ("POST", f"/api/models/{NAME}/paths-info/([^/]+)", Handler.paths_info),
    ("GET", f"/api/models/{NAME}/refs", Handler.refs),
    ("POST", f"/api/models/{NAME}/branch/([^/]+)", Handler.branch),
    ("POST", f"/api/models/{NAME}/preupload/([^/]+)", Handler.preupload),
    ("POST", f"/api/models/{NAME}/commit/([^/]+)", Handler.commit),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", Handler.batch),
    ("POST", "/large/([0-9a-f]+)/complete", Handler.complete),
    ("POST", "/large/([0-9a-f]+)/verify", Handler.verify),
    ("PUT", r"/large/([0-9a-f]+)/(\d+)", Handler.put_part),
    ("PUT", "/large/([0-9a-f]+)", Handler.put_large),
    ("GET", f"/{NAME}/resolve/([^/]+)/(.+)", Handler.resolve),
]


if __name__ == "__main__":
    with HubServer() as server:
        for name, value in server.environment(tempfile.mkdtemp()).items():
            print(f"export {name}={value}", flush=True)
        threading.Event().wait()
