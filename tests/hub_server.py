"""
A small Hub on this machine: repos with commits, branches, tags and pull requests, LFS, tokens, over HTTP.

```bash
python tests/hub_server.py --folder local-hub --port 8400
HF_ENDPOINT=http://127.0.0.1:8400 HF_TOKEN=hf_write HF_HUB_DISABLE_XET=1 hf-selfjudge push my-judge me/my-judge
```

It speaks what `huggingface_hub` asks for, no more. Everything is kept in one folder. For tests it logs requests, and
fails on demand ([`Fault`]).
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import re
import threading
import time
import urllib.parse
from dataclasses import asdict, dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


TYPES = {"models": "", "datasets": "datasets/", "spaces": "spaces/"}
TOKENS = {"hf_write": "write", "hf_read": "read"}
LFS = (".safetensors", ".parquet", ".png")  # what the Hub keeps outside of git, beside all that is large
LARGE = 10 * 2**20


@dataclass
class Fault:
    """
    What goes wrong, `times` times, with the requests whose `METHOD /path` holds a match of `pattern`.

    Args:
        kind (`str`): `"status"`: answered with `status`; `"cut"`: the connection ends in the middle of the answer, or
            of what the client sends; `"slow"`: answered after `seconds`.
    """

    pattern: str
    kind: str
    times: int = 1
    status: int = 503
    seconds: float = 0.0


@dataclass
class Commit:
    oid: str
    parent: str | None
    message: str
    files: dict[str, str]  # path -> SHA-256 of the content


@dataclass
class Repo:
    """Commits, and what points to them: `main`, tags, `refs/pr/N`."""

    kind: str
    name: str
    private: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    tags: list[str] = field(default_factory=list)

    def at(self, revision: str) -> Commit | None:
        return self.commits.get(self.refs.get(revision, revision))

    def commit(self, ref: str, parent: Commit | None, message: str, files: dict[str, str]) -> Commit:
        content = json.dumps([parent.oid if parent else None, message, sorted(files.items()), len(self.commits)])
        made = Commit(hashlib.sha1(content.encode()).hexdigest(), parent.oid if parent else None, message, files)
        self.commits[made.oid] = made
        self.refs[ref] = made.oid
        return made


class Store:
    """Repos and contents in a folder; an index is written with each change."""

    def __init__(self, folder: Path):
        self.folder, self.lock = folder, threading.RLock()
        (folder / "blobs").mkdir(parents=True, exist_ok=True)
        self.repos: dict[tuple[str, str], Repo] = {}
        if (folder / "index.json").is_file():
            for row in json.loads((folder / "index.json").read_text(encoding="utf-8")):
                commits = {oid: Commit(**commit) for oid, commit in row.pop("commits").items()}
                self.repos[row["kind"], row["name"]] = Repo(**row, commits=commits)

    def save(self) -> None:
        temporary = self.folder / "index.incomplete"
        temporary.write_text(json.dumps([asdict(repo) for repo in self.repos.values()]), encoding="utf-8")
        temporary.rename(self.folder / "index.json")

    def put(self, content: bytes) -> str:
        digest = hashlib.sha256(content).hexdigest()
        (self.folder / "blobs" / digest).write_bytes(content)
        return digest

    def get(self, digest: str) -> bytes:
        return (self.folder / "blobs" / digest).read_bytes()

    def has(self, digest: str) -> bool:
        return (self.folder / "blobs" / digest).is_file()


class Refused(Exception):
    """An answer other than 200: its status, and what the client takes as the kind of error."""

    def __init__(self, status: int, code: str = "", message: str = "", headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.code, self.message, self.headers = status, code, message, headers or {}


class Cut(Exception):
    """The connection ends here."""


class Hub(ThreadingHTTPServer):
    """
    The server.

    Args:
        folder (`Path`): Of everything.
        port (`int`): 0 takes a free one.

    Attributes:
        requests (`list[str]`): `METHOD /path` of each so far.
        faults (`list[Fault]`): What shall go wrong.
    """

    daemon_threads = True

    def __init__(self, folder: Path, port: int = 0):
        super().__init__(("127.0.0.1", port), Handler)
        self.store, self.requests, self.faults = Store(Path(folder)), [], []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self.shutdown()
        self.server_close()

    def files(self, name: str, revision: str = "main", kind: str = "models") -> dict[str, bytes]:
        """The content of a repo, for a test to look at."""
        repo = self.store.repos[kind, name]
        return {path: self.store.get(digest) for path, digest in repo.at(revision).files.items()}

    def write(self, name: str, files: dict[str, bytes], kind: str = "models", private: bool = False) -> None:
        """Put files into a repo by hand, whatever they are."""
        with self.store.lock:
            repo = self.store.repos.setdefault((kind, name), Repo(kind, name, private))
            before = repo.at("main")
            content = {path: self.store.put(value) for path, value in files.items()}
            repo.commit("main", before, "by hand", {**(before.files if before else {}), **content})
            self.store.save()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *arguments) -> None:
        pass

    def _serve(self) -> None:
        path, _, query = self.path.partition("?")
        self.status = 200
        self.query = dict(urllib.parse.parse_qsl(query))
        name = f"{self.command} {urllib.parse.unquote(path)}"
        self.server.requests.append(name)
        self.fault = next((f for f in self.server.faults if f.times and re.search(f.pattern, name)), None)
        try:
            if self.fault is not None:
                self.fault.times -= 1
                time.sleep(self.fault.seconds)
                if self.fault.kind == "status":
                    raise Refused(self.fault.status, message="Broken on demand.")
                if self.fault.kind == "cut" and self.command in ("PUT", "POST"):
                    raise Cut
            body = self._body()
            with self.server.store.lock:
                content, headers = self._route(urllib.parse.unquote(path), body)
            self._answer(content, headers, self.status)
        except Refused as refused:
            if self.fault is not None:
                self._body()
            headers = {"X-Error-Code": refused.code, "X-Error-Message": refused.message} if refused.code else {}
            content = json.dumps({"error": refused.message}).encode()
            self._answer(content, headers | refused.headers, refused.status)
        except (Cut, BrokenPipeError, ConnectionResetError):
            self.close_connection = True
            self.connection.close()

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline().strip(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, content: bytes, headers: dict[str, str], status: int = 200) -> None:
        self.send_response(status)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(content))} | headers
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault is not None and self.fault.kind == "cut":
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            raise Cut
        self.wfile.write(content)

    # -- who asks ---------------------------------------------------------------------------------------------------

    def _role(self) -> str | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        return TOKENS.get(token)

    def _must_write(self) -> None:
        if self._role() is None:
            raise Refused(401, message="Invalid username or password.")
        if self._role() != "write":
            raise Refused(403, message="This token can only read.")

    def _repo(self, kind: str, name: str) -> Repo:
        repo = self.server.store.repos.get((kind, name))
        if repo is None or (repo.private and self._role() is None):
            # The Hub does not tell strangers which of the two it is.
            raise Refused(401 if self._role() is None else 404, "RepoNotFound", "Repository not found")
        return repo

    def _commit(self, repo: Repo, revision: str) -> Commit:
        commit = repo.at(revision)
        if commit is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    # -- what is asked ----------------------------------------------------------------------------------------------

    def _route(self, path: str, body: bytes) -> tuple[bytes, dict[str, str]]:
        if self.command == "GET" and path == "/api/whoami-v2":
            if self._role() is None:
                raise Refused(401, message="Invalid user token.")
            auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": self._role()}}
            return _json({"type": "user", "name": "me", "orgs": [], "auth": auth})
        if path == "/api/validate-yaml":
            return _json(_validated(json.loads(body)["content"]))
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/repos/delete":
            self._must_write()
            asked = json.loads(body)
            kind = f"{asked.get('type') or 'model'}s"
            self.server.store.repos.pop((kind, self._full(asked)), None)
            self.server.store.save()
            return _json({})
        if path.startswith("/lfs/"):
            return self._lfs_object(path.removeprefix("/lfs/"), body)
        if match := re.fullmatch(
            r"/(?P<prefix>datasets/|spaces/)?(?P<name>[^/]+/[^/]+)\.git/info/lfs/objects/batch", path
        ):
            return self._lfs_batch(json.loads(body))
        if match := re.fullmatch(r"/api/(?P<kind>models|datasets|spaces)/(?P<name>[^/]+/[^/]+)(?P<rest>/.*)?", path):
            return self._api(self._repo(match["kind"], match["name"]), (match["rest"] or "").strip("/"), body)
        if match := re.fullmatch(
            r"/(?P<prefix>datasets/|spaces/)?(?P<name>[^/]+/[^/]+)/resolve/(?P<rev>refs/pr/\d+|[^/]+)/(?P<file>.+)",
            path,
        ):
            kind = next(kind for kind, prefix in TYPES.items() if prefix == (match["prefix"] or ""))
            return self._file(self._repo(kind, match["name"]), match["rev"], match["file"])
        raise Refused(404, message=f"No such page: {path}")

    def _full(self, asked: dict) -> str:
        return f"{asked.get('organization') or 'me'}/{asked['name']}"

    def _create(self, asked: dict) -> tuple[bytes, dict[str, str]]:
        self._must_write()
        kind, name = f"{asked.get('type') or 'model'}s", self._full(asked)
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        url = {"url": f"{self.server.url}/{TYPES[kind]}{name}", "name": name}
        if (kind, name) in self.server.store.repos:
            self.status = 409
            return _json(url)
        repo = self.server.store.repos[kind, name] = Repo(kind, name, private)
        repo.commit("main", None, "initial commit", {".gitattributes": self.server.store.put(b"")})
        self.server.store.save()
        return _json(url)

    def _api(self, repo: Repo, rest: str, body: bytes) -> tuple[bytes, dict[str, str]]:
        action, _, where = rest.partition("/")
        if action in ("", "revision"):
            commit = self._commit(repo, where or "main")
            files = [{"rfilename": path} for path in sorted(commit.files)]
            return _json({
                "_id": "0", "id": repo.name, "modelId": repo.name, "sha": commit.oid, "private": repo.private,
                "siblings": files, "tags": [], "downloads": 0, "likes": 0, "gated": False, "disabled": False,
            })  # fmt: skip
        if action == "refs":
            refs = {"branches": [], "tags": [], "converts": [], "pullRequests": []}
            for ref, oid in repo.refs.items():
                group = "tags" if ref in repo.tags else "pullRequests" if ref.startswith("refs/pr/") else "branches"
                full = ref if ref.startswith("refs/") else f"refs/{'tags' if group == 'tags' else 'heads'}/{ref}"
                refs[group].append({"name": ref, "ref": full, "targetCommit": oid})
            return _json(refs)
        if action == "tree":
            return self._tree(repo, where)
        if action == "paths-info":
            asked = json.loads(body) if body.startswith(b"{") else urllib.parse.parse_qs(body.decode())
            commit = self._commit(repo, where)
            return _json([self._entry(p, commit.files[p]) for p in asked["paths"] if p in commit.files])
        self._must_write()
        if action == "preupload":
            files = [
                {"path": f["path"], "uploadMode": _mode(f["path"], f["size"]), "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]
            return _json({"files": files})
        if action == "commit":
            return self._write(repo, where, body)
        if action in ("tag", "branch"):
            made = where if action == "branch" else json.loads(body)["tag"]
            start = json.loads(body or b"{}").get("startingPoint", "main") if action == "branch" else where
            if made in repo.refs:
                raise Refused(409, message=f"Reference {made} exists already")
            repo.refs[made] = self._commit(repo, start).oid
            repo.tags += [made] if action == "tag" else []
            self.server.store.save()
            return _json({})
        raise Refused(404, message=f"No such action: {rest}")

    def _write(self, repo: Repo, revision: str, body: bytes) -> tuple[bytes, dict[str, str]]:
        before = self._commit(repo, revision)
        files, message = dict(before.files), ""
        for line in map(json.loads, body.splitlines()):
            key, value = line["key"], line["value"]
            if key == "header":
                message = value["summary"]
                if value.get("parentCommit") not in (None, before.oid):
                    raise Refused(412, message="A commit has happened since. Please refresh and try again.")
            elif key == "file":
                files[value["path"]] = self.server.store.put(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                if not self.server.store.has(value["oid"]):
                    raise Refused(400, message=f"{value['path']}: its content was not uploaded")
                files[value["path"]] = value["oid"]
            elif key == "deletedFile":
                files.pop(value["path"])
            elif key == "deletedFolder":
                files = {path: oid for path, oid in files.items() if not path.startswith(value["path"])}
        ref, told = revision, {}
        if self.query.get("create_pr") == "1":
            number = 1 + sum(ref.startswith("refs/pr/") for ref in repo.refs)
            ref, told = f"refs/pr/{number}", {"pullRequestUrl": f"{self.server.url}/{repo.name}/discussions/{number}"}
        made = repo.commit(ref, before, message, files)
        self.server.store.save()
        url = f"{self.server.url}/{TYPES[repo.kind]}{repo.name}/commit/{made.oid}"
        return _json({"success": True, "commitOid": made.oid, "commitUrl": url, "hookOutput": "", **told})

    def _entry(self, path: str, digest: str) -> dict:
        content = self.server.store.get(digest)
        entry = {"type": "file", "path": path, "size": len(content), "oid": _blob(content)}
        if _mode(path, len(content)) == "lfs":
            entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 130}
        return entry

    def _tree(self, repo: Repo, where: str) -> tuple[bytes, dict[str, str]]:
        revision, _, folder = where.partition("/")
        if where.startswith("refs/pr/"):
            revision, folder = "/".join(where.split("/")[:3]), "/".join(where.split("/")[3:])
        files = self._commit(repo, revision).files
        prefix = f"{folder.strip('/')}/" if folder.strip("/") else ""
        inside = {path: digest for path, digest in files.items() if path.startswith(prefix)}
        if prefix and not inside:
            raise Refused(404, "EntryNotFound", f"{folder} does not exist")
        recursive = self.query.get("recursive", "").lower() in ("true", "1")
        entries, folders = [], set()
        for path, digest in sorted(inside.items()):
            parts = path.removeprefix(prefix).split("/")
            for depth in range(1, len(parts)):
                name = prefix + "/".join(parts[:depth])
                if name not in folders and (recursive or depth == 1):
                    folders.add(name)
                    entries.append({"type": "directory", "path": name, "size": 0, "oid": _blob(name.encode())})
            if recursive or len(parts) == 1:
                entries.append(self._entry(path, digest))
        return _json(entries)

    def _file(self, repo: Repo, revision: str, path: str) -> tuple[bytes, dict[str, str]]:
        commit = self._commit(repo, revision)
        if path not in commit.files:
            headers = {"X-Repo-Commit": commit.oid}
            raise Refused(404, "EntryNotFound", f"{path} does not exist", headers)
        digest = commit.files[path]
        content = self.server.store.get(digest)
        tag = digest if _mode(path, len(content)) == "lfs" else _blob(content)
        headers = {
            "X-Repo-Commit": commit.oid, "ETag": f'"{tag}"', "Content-Type": "application/octet-stream",
            "Accept-Ranges": "bytes",
        }  # fmt: skip
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            first, last = int(match[1]), int(match[2] or len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            self.status = 206
            return content[first : last + 1], headers
        return content, headers

    def _lfs_batch(self, asked: dict) -> tuple[bytes, dict[str, str]]:
        self._must_write()
        objects = []
        for item in asked["objects"]:
            made = {"oid": item["oid"], "size": item["size"]}
            if not self.server.store.has(item["oid"]):
                href = f"{self.server.url}/lfs/{item['oid']}"
                made["actions"] = {"upload": {"href": href}, "verify": {"href": f"{self.server.url}/lfs/verify"}}
            objects.append(made)
        return _json({"transfer": "basic", "objects": objects})

    def _lfs_object(self, name: str, body: bytes) -> tuple[bytes, dict[str, str]]:
        if name == "verify":
            asked = json.loads(body)
            if not self.server.store.has(asked["oid"]) or len(self.server.store.get(asked["oid"])) != asked["size"]:
                raise Refused(400, message="The object is not what was announced")
        elif self.server.store.put(body) != name:
            (self.server.store.folder / "blobs" / hashlib.sha256(body).hexdigest()).unlink()
            raise Refused(400, message="The content is not what its digest says")
        return _json({})


def _json(content: object) -> tuple[bytes, dict[str, str]]:
    return json.dumps(content).encode(), {}


def _mode(path: str, size: int) -> str:
    return "lfs" if path.endswith(LFS) or size > LARGE else "regular"


def _blob(content: bytes) -> str:
    """As git names it."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _validated(card: str) -> dict:
    """What the Hub says of a card's metadata, in small: YAML between two lines of dashes, with a licence it knows."""
    import yaml

    errors = []
    match = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    try:
        data = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError as error:
        data, errors = None, [{"message": str(error)}]
    if not isinstance(data, dict):
        errors = errors or [{"message": "There is no metadata."}]
    elif not re.fullmatch(r"[a-z0-9.-]+", str(data.get("license", "other"))):
        errors.append({"message": f'"license" {data["license"]!r} is not known.'})
    return {"errors": errors, "warnings": []}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="Of everything that is pushed.")
    parser.add_argument("--port", type=int, default=8400)
    arguments = parser.parse_args()
    hub = Hub(arguments.folder, arguments.port)
    print(f"Hub at {hub.url}; tokens: {', '.join(f'{token} ({role})' for token, role in TOKENS.items())}")  # noqa: T201
    hub.serve_forever()
