"""A stand-in for the hub on loopback: takes what huggingface_hub pushes, gives it back, and remembers every request."""

import base64
import contextlib
import hashlib
import json
import threading
import warnings
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import parse_qs

import huggingface_hub.constants
import pytest

TOKEN = "hf_AStandInForASecretToken"
COMMIT = "0123456789abcdef" * 2 + "01234567"


class FakeHub:
    """What was asked and what is there. `files`: {repository, with "datasets/" before that of a data set: {path:
    content}}; `created`: bodies of repos/create; `refuses`: answers 401 to a login."""

    def __init__(self, server: ThreadingHTTPServer):
        self.url = f"http://127.0.0.1:{server.server_address[1]}"
        self.files: dict[str, dict[str, bytes]] = {}
        self.created: list[dict[str, Any]] = []
        self.tokens: set[str | None] = set()
        self.requests: list[str] = []
        self.refuses = False
        self.large_files: dict[str, bytes] = {}  # {sha256: content}

    def answer(self, method: str, path: str, body: bytes) -> Any:
        """The JSON of one request; None: 404."""
        parts = path.partition("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "whoami-v2"]:
            return {"name": "me", "type": "user", "orgs": []}
        if parts[:3] == ["api", "repos", "create"]:
            self.created.append(json.loads(body))
            repository = f"{self.created[-1]['organization']}/{self.created[-1]['name']}"
            self.files.setdefault(repository, {})
            return {"url": f"{self.url}/{repository}"}
        if parts[:2] == ["api", "validate-yaml"]:
            return {"errors": [], "warnings": []}
        if "preupload" in parts:
            paths = [file["path"] for file in json.loads(body)["files"]]
            modes = ["lfs" if path.endswith(".safetensors") else "regular" for path in paths]
            files = zip(paths, modes, strict=True)
            return {"files": [{"path": path, "shouldIgnore": False, "uploadMode": mode} for path, mode in files]}
        if parts[-2:] == ["objects", "batch"]:
            objects = json.loads(body)["objects"]
            for item in objects:
                item["actions"] = {"upload": {"href": f"{self.url}/large/{item['oid']}"}}
            return {"transfer": "basic", "objects": objects}
        if parts[0] == "large" and method == "PUT":
            self.large_files[parts[1]] = body
            return {}
        if "commit" in parts:
            repository = "/".join(parts[2:4])
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.files[repository][value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    self.files[repository][value["path"]] = self.large_files[value["oid"]]
            return {"commitUrl": f"{self.url}/{repository}/commit/{'0' * 40}", "commitOid": "0" * 40, "success": True}
        if parts[:2] not in (["api", "models"], ["api", "datasets"]):
            return None
        repository = _repository(parts[1:] if parts[1] == "datasets" else parts[2:])
        if repository not in self.files:
            return None if parts[1] == "datasets" else {"id": repository, "sha": COMMIT, "siblings": []}
        files = self.files[repository]
        if parts[4:5] == ["tree"]:
            folder = "/".join(parts[6:])  # of a model transformers asks for additional_chat_templates/
            return [entry for entry in _entries(files) if entry["path"].startswith(folder)]
        if parts[4:5] == ["paths-info"]:
            paths = json.loads(body)["paths"] if body[:1] == b"{" else parse_qs(body.decode())["paths"]
            return [entry for entry in _entries(files) if entry["path"] in paths]
        return {"id": "/".join(parts[2:4]), "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}

    def find_file(self, path: str) -> bytes | None:
        """The file that NAMESPACE/NAME/resolve/REVISION/FILE asks for, of a data set behind datasets/."""
        repository, _, rest = path.partition("?")[0].strip("/").partition("/resolve/")
        return self.files.get(repository, {}).get(rest.partition("/")[2])


def _repository(parts: list[str]) -> str:
    """NAMESPACE/NAME, or datasets/NAMESPACE/NAME, at the beginning of a path."""
    return "/".join(parts[:3] if parts[0] == "datasets" else parts[:2])


def _entries(files: dict[str, bytes]) -> list[dict[str, Any]]:
    """Files and folders of a repository as the hub lists them."""
    folders = {str(folder) for name in files for folder in PurePosixPath(name).parents} - {"."}
    listed = [{"type": "directory", "path": folder, "oid": "0" * 40, "size": 0} for folder in sorted(folders)]
    for name, content in files.items():
        oid = hashlib.sha1(content).hexdigest()
        listed.append({"type": "file", "path": name, "size": len(content), "oid": oid})
    return listed


@contextlib.contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """The stand-in, which huggingface_hub takes for the hub of this process, logged in with TOKEN."""

    class Handler(BaseHTTPRequestHandler):
        def _handle(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            hub.tokens.add(self.headers.get("Authorization"))
            hub.requests.append(f"{self.command} {self.path}")
            file, answer = hub.find_file(self.path), hub.answer(self.command, self.path, body)
            status = 401 if hub.refuses else 404 if file is None and answer is None else 200
            message = answer if status == 200 else {"error": f"refused, your token is {TOKEN}"}
            content = json.dumps(message).encode() if file is None else file
            self.send_response(status)
            is_repository = _repository(self.path.strip("/").split("/")) in hub.files
            for name, value in {
                "Content-Length": str(len(content)),
                "ETag": hashlib.sha256(content).hexdigest(),
                "X-Repo-Commit": COMMIT,
                "X-Error-Code": "EntryNotFound" if is_repository else "RepoNotFound",
            }.items():
                if name != "X-Error-Code" or status == 404:
                    self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_POST = do_PUT = do_HEAD = _handle

        def log_message(self, *args: Any) -> None:
            pass

    with (
        ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server,
        pytest.MonkeyPatch.context() as patch,
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", message="Use 'content=")  # httpx, of how huggingface_hub 2 uploads
        hub = FakeHub(server)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        patch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        patch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        patch.setenv("HF_TOKEN", TOKEN)
        try:
            yield hub
        finally:
            server.shutdown()
