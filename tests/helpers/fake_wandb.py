"""A stand-in of the Weights & Biases server on loopback, for tests only. It takes what wandb-core 0.31 sends and keeps
it to be looked at; it answers no more than the client needs to go on. Whatever it does not know lands in
`unknown_requests`, so that a new version of the client is noticed."""

import gzip
import json
import os
import re
import sys
import threading
import zlib
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

ENTITY = "tester"
API_KEY = "local-" + "f" * 40  # the client looks at the form of a key only
TIMESTAMP = "2026-01-01T00:00:00Z"

Json = dict[str, Any]


def child_env(**variables: str) -> dict[str, str]:
    """The environment of a child process: this project, one thread, and none of the caller's own W&B."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    tests_dir = Path(__file__).parents[1]
    path = f"{tests_dir.parent}{os.pathsep}{tests_dir}"
    return {**inherited, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **variables}


@dataclass
class FakeRun:
    """What the server was told of one run."""

    entity: str
    project: str
    name: str
    fields: Json = field(default_factory=dict)  #: displayName, groupName, jobType, tags and so on
    config: Json = field(default_factory=dict)  #: {key: {"value": ...}}, with the client's own under "_wandb"
    summary: Json = field(default_factory=dict)
    history: list[Json] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    exit_code: int | None = None

    def config_values(self) -> Json:
        """The config as the user set it: {key: value}."""
        return {key: entry["value"] for key, entry in self.config.items() if key != "_wandb"}

    def metric_definitions(self) -> dict[str, Json]:
        """What define_metric said, {name or pattern: {"axis": ...}}. The client packs it into config._wandb.value.m,
        keyed by field numbers of its own protocol (1 name, 2 pattern, 5 place of the x axis in this list counted from
        1)."""
        definitions = self.config.get("_wandb", {}).get("value", {}).get("m", [])
        names = [each.get("1") or each.get("2") for each in definitions]
        axes = (names[each["5"] - 1] if each.get("5") else None for each in definitions)
        return {name: {"axis": axis} for name, axis in zip(names, axes, strict=True)}

    def to_graphql(self) -> Json:
        """The run as answers name it."""
        return {
            "id": f"id-{self.name}",
            "name": self.name,
            "displayName": self.fields.get("displayName") or self.name,
            "tags": self.fields.get("tags") or [],
            "config": json.dumps(self.config),
            "summaryMetrics": json.dumps(self.summary),
            "wandbConfig": json.dumps({"t": 1}),
            "historyLineCount": len(self.history),
            "historyTail": json.dumps([json.dumps(row) for row in self.history[-1:]]),
            "eventsLineCount": 0,
            "eventsTail": "[]",
            "logLineCount": 0,
            "project": project_response(self.entity, self.project),
            **dict.fromkeys(("description", "sweepName")),
        }


def project_response(entity: str | None, name: str | None) -> Json:
    entity, name = entity or ENTITY, name or "uncategorized"
    return {
        "__typename": "Project",
        "id": f"id-{name}",
        "internalId": "UHJvamVjdDox",
        "name": name,
        "entityName": entity,
        "entity": {"id": "id-entity", "name": entity},
        "access": "PRIVATE",
        "views": "{}",
        "createdAt": TIMESTAMP,
        "isBenchmark": False,
        **dict.fromkeys(("description", "user")),
    }


class FakeWandb:
    """The server; what it was sent: `runs`, `views` (reports) and `artifacts` by id, `operations` in order,
    `unknown_requests`. `connections` counts all that were opened, whatever was asked on them; `unanswered`: operations
    it does not know; `row_status`: of its answers to rows, which it takes with 200 only."""

    def __init__(self, unanswered: Container[str] = (), row_status: int = 200) -> None:
        self.unanswered, self.row_status = unanswered, row_status
        self.alerts: list[str] = []
        self.runs: dict[str, FakeRun] = {}
        self.projects: set[tuple[str, str]] = set()
        self.views: dict[str, Json] = {}
        self.artifacts: dict[str, Json] = {}
        self.operations: list[str] = []
        self.unknown_requests: list[str] = []
        self.connections = 0
        self._lock = threading.Lock()
        self._http = _Server(("127.0.0.1", 0), _Handler)
        self._http.fake = self
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> "FakeWandb":
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def env(self, folder: Path) -> dict[str, str]:
        """The variables that send a child process here, logged in, with wandb's own files under `folder`."""
        return {
            "WANDB_BASE_URL": self.url,
            "WANDB_API_KEY": API_KEY,
            "WANDB_ENTITY": ENTITY,
            **{f"WANDB_{name.upper()}_DIR": str(folder / name) for name in ("cache", "data", "config")},
            "WANDB_ERROR_REPORTING": "false",
            "no_proxy": "127.0.0.1",
            "NO_PROXY": "127.0.0.1",
        }

    def respond(self, method: str, path: str, body: bytes) -> tuple[int, Json]:
        with self._lock:
            path = urlsplit(path).path
            if path == "/graphql":
                request = json.loads(body)
                query = re.search(r"(?:query|mutation)\s+(\w+)", request.get("query", ""))
                name = request.get("operationName") or (query[1] if query else "")
                self.operations.append(name)
                if name in OPERATIONS and name not in self.unanswered:
                    return 200, {"data": OPERATIONS[name](self, request.get("variables") or {})}
                self.unknown_requests.append(name)
                return 200, {"data": {}}
            if match := re.fullmatch(r"/files/([^/]+)/([^/]+)/([^/]+)/file_stream", path):
                if self.row_status != 200:
                    return self.row_status, {"error": "permission denied"}
                run, message = self.run(*map(unquote, match.groups())), json.loads(body)
                for file, chunk in (message.get("files") or {}).items():  # lines, and the number of the first one
                    start, lines = chunk.get("offset", 0), chunk.get("content") or []
                    if file == "wandb-history.jsonl":
                        run.history[start:] = [json.loads(line) for line in lines]
                    elif file == "wandb-summary.json" and lines:
                        run.summary = json.loads(lines[-1])
                if message.get("complete"):
                    run.exit_code = message.get("exitcode")
                return 200, {"exitcode": None, "limits": {}}
            if method == "PUT" and (match := re.fullmatch(r"/upload/(run|artifact)/([^/]+)/(.+)", path)):
                kind, owner, name = map(unquote, match.groups())
                files = self.runs[owner].files if kind == "run" else self.artifacts[owner]["content"]
                files[name] = body
                return 200, {}
            self.unknown_requests.append(f"{method} {path}")
            return 404, {"error": "not known to the stand-in"}

    def run(self, entity: str | None, project: str | None, name: str) -> FakeRun:
        entity, project = entity or ENTITY, project or "uncategorized"
        self.projects.add((entity, project))
        return self.runs.setdefault(name, FakeRun(entity, project, name))

    def upload_url(self, kind: str, owner: str, name: str) -> Json:
        return {"uploadUrl": f"{self.url}/upload/{kind}/{owner}/{name}", "uploadHeaders": []}


def edges(nodes: Iterable[Json]) -> Json:
    page = {"__typename": "PageInfo", "endCursor": None, "hasNextPage": False}
    return {"edges": [{"node": node, "cursor": node.get("id", "")} for node in nodes], "pageInfo": page}


def get_viewer(server: FakeWandb, variables: Json) -> Json:
    viewer = {"id": "id-user", "entity": ENTITY, "username": ENTITY, "name": ENTITY, "email": "tester@localhost"}
    teams = edges([{"id": "id-entity", "name": ENTITY}])
    return {"viewer": {**viewer, "admin": False, "flags": "{}", "apiKeys": {"edges": []}, "teams": teams}}


def get_resume_status(server: FakeWandb, variables: Json) -> Json:
    run = server.runs.get(variables["name"])
    project = project_response(variables.get("entity"), variables.get("project"))
    return {"model": {**project, "bucket": run.to_graphql() if run else None}}


def upsert_run(server: FakeWandb, variables: Json) -> Json:
    is_new = variables["name"] not in server.runs
    run = server.run(variables.get("entity"), variables.get("project"), variables["name"])
    if variables.get("config"):
        run.config = json.loads(variables["config"])
    run.fields.update({key: value for key, value in variables.items() if value is not None and key != "config"})
    return {"upsertBucket": {"bucket": run.to_graphql(), "inserted": is_new}}


def create_run_files(server: FakeWandb, variables: Json) -> Json:
    run = variables["run"]
    files = [{"name": name, **server.upload_url("run", run, name)} for name in variables["files"]]
    return {"createRunFiles": {"runID": f"id-{run}", "uploadHeaders": [], "files": files}}


def create_artifact(server: FakeWandb, variables: Json) -> Json:
    name = f"artifact-{len(server.artifacts)}"
    server.artifacts[name] = {**variables["input"], "content": {}}
    sequence = {"id": f"sequence-{name}", "latestArtifact": None}
    return {"createArtifact": {"artifact": {"id": name, "state": "PENDING", "artifactSequence": sequence}}}


def create_manifest(server: FakeWandb, variables: Json) -> Json:
    owner = variables["artifactID"]
    file = {"id": "f", **server.upload_url("artifact", owner, "manifest.json")}
    return {"createArtifactManifest": {"artifactManifest": {"id": f"manifest-{owner}", "file": file}}}


def create_artifact_files(server: FakeWandb, variables: Json) -> Json:
    nodes = []
    for file in variables["input"]["artifactFiles"]:
        owner, name = file["artifactID"], file["name"]
        target: Json = {**server.upload_url("artifact", owner, name), "uploadMultipartUrls": None}
        nodes.append({"storagePath": f"{owner}/{name}", "artifact": {"id": owner}, **target})
    return {"createArtifactFiles": {"files": edges(nodes)}}


def commit_artifact(server: FakeWandb, variables: Json) -> Json:
    name = variables["artifactID"]
    return {"commitArtifact": {"artifact": {"id": name, "digest": server.artifacts[name]["digest"]}}}


def get_project(server: FakeWandb, variables: Json) -> Json:
    key = (variables["entityName"], variables["projectName"])
    return {"project": project_response(*key) if key in server.projects else None}


def create_project(server: FakeWandb, variables: Json) -> Json:
    project = variables["input"]
    key = (project.get("entityName") or project.get("entity_name") or ENTITY, project["name"])
    server.projects.add(key)
    return {"result": {"project": project_response(*key), "model": project_response(*key), "inserted": True}}


def view_response(view: Json) -> Json:
    fields = {key: view.get(key) for key in ("id", "type", "name", "displayName", "description")}
    project = project_response(view.get("entityName"), view["projectName"])
    times = {"createdAt": TIMESTAMP, "updatedAt": TIMESTAMP}
    return {**fields, "spec": json.dumps(view["spec"]), "project": project, "user": None, **times}


def save_view(server: FakeWandb, variables: Json) -> Json:
    name = variables.get("id") or f"view-{len(server.views)}"
    is_new = name not in server.views
    server.views[name] = {**variables, "id": name, "spec": json.loads(variables["spec"])}
    return {"upsertView": {"inserted": is_new, "view": view_response(server.views[name])}}


def save_alert(server: FakeWandb, variables: Json) -> Json:
    server.alerts.append(f"{variables['severity']} {variables['title']}: {variables['text']}")
    return {"notifyScriptableRunAlert": {"success": True}}


def read_run(server: FakeWandb, variables: Json) -> Json:
    """A run as wandb.Api().run() reads it, whole or a page of its rows."""
    run = server.runs.get(variables.get("name") or variables.get("run") or variables.get("runName") or "")
    if run is None or run.project != variables["project"]:
        return {"project": {"run": None}}
    more = {"createdAt": TIMESTAMP, "heartbeatAt": TIMESTAMP, "projectId": "1", "state": "finished", "readOnly": False}
    more |= {"user": {"name": ENTITY, "username": ENTITY}, "systemMetrics": "{}"}
    more["historyKeys"] = {"lastStep": max((row["_step"] for row in run.history), default=-1), "sets": [], "keys": {}}
    steps = range(variables.get("minStep", 0), variables.get("maxStep", 2**62))
    more["history"] = [json.dumps(row) for row in run.history if row["_step"] in steps][: variables.get("pageSize")]
    more["parquetHistory"] = {"parquetUrls": [], "liveData": run.history}
    return {"project": {"run": run.to_graphql() | more}}


OPERATIONS: dict[str, Callable[[FakeWandb, Json], Json]] = {
    # every start
    "Viewer": get_viewer,
    "ServerFeaturesQuery": lambda server, variables: {"serverInfo": {"features": []}},
    "OrganizationCoreWeaveOrganizationID": lambda server, variables: {"entity": {"organization": None}},
    # runs
    "RunResumeStatus": get_resume_status,
    "UpsertBucket": upsert_run,
    "CreateRunFiles": create_run_files,
    "MarkRunFilesUploaded": lambda server, variables: {"markRunFilesUploaded": {"success": True}},
    "RunState": lambda server, variables: {"project": {"run": {"id": f"id-{variables['run']}", "state": "running"}}},
    # artifacts: an empty answer to CreateArtifact would make the client panic
    "CreateArtifact": create_artifact,
    "CreateArtifactManifest": create_manifest,
    "CreateArtifactFiles": create_artifact_files,
    "CommitArtifact": commit_artifact,
    "ArtifactType": lambda server, variables: {"project": {"artifact": None}},
    "NotifyScriptableRunAlert": save_alert,
    # runs read back
    **dict.fromkeys(("Run", "RunHistoryKeys", "RunParquetHistory", "HistoryPage"), read_run),
    # reports
    "ProjectInternalId": get_project,
    "CreateProject": create_project,
    "upsertView": save_view,
    "GetProjects": lambda server, variables: {
        "models": edges(project_response(*key) for key in sorted(server.projects) if key[0] == variables["entity"])
    },
    "ProjectViews": lambda server, variables: {
        "project": {
            "allViews": edges(
                view_response(view) for view in server.views.values() if view["projectName"] == variables["project"]
            )
        }
    },
}


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64
    fake: FakeWandb

    def verify_request(self, request: Any, client_address: Any) -> bool:
        self.fake.connections += 1
        return True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """wandb-core resets connections that it no longer needs; that is no error."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_POST(self) -> None:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            body = b"".join(iter(self.read_chunk, b""))
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        decompress = {"gzip": gzip.decompress, "deflate": zlib.decompress}.get(self.headers.get("Content-Encoding", ""))
        status, response = self.server.fake.respond(self.command, self.path, decompress(body) if decompress else body)
        content = json.dumps(response).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_PUT = do_POST

    def read_chunk(self) -> bytes:
        content = self.rfile.read(int(self.rfile.readline().split(b";")[0], 16))
        self.rfile.readline()
        return content

    def log_message(self, format: str, *args: Any) -> None:
        pass
