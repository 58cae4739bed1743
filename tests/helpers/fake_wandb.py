"""A stand-in of the Weights & Biases server on loopback, for tests only.

It takes what wandb-core 0.31 sends (runs, history, summaries, files, artifacts, reports) and keeps it to be looked
at; it answers no more than the client needs to go on. It knows nothing of the real server's rules: it shows what
*we* send. Whatever it does not know lands in `unknown_requests`, so that a new version of the client is noticed.

    with FakeWandb() as server:
        subprocess.run([...], env=child_env(**server.env(tmp_path)))
        assert server.runs["abcd1234"].history[-1]["val/loss"] == 1.0
        assert not server.unknown_requests
"""

import gzip
import json
import os
import re
import sys
import threading
import zlib
from collections.abc import Callable, Iterable
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
        """What define_metric said, {name or pattern: {"axis": ..., "summary": [numbers]}}.

        The client packs it into config._wandb.value.m, keyed by field numbers of its own protocol (1 name,
        2 pattern, 5 place of the x axis in this list counted from 1, 7 what the summary keeps).
        """
        definitions = self.config.get("_wandb", {}).get("value", {}).get("m", [])
        names = [definition.get("1") or definition.get("2") for definition in definitions]
        return {
            name: {"axis": names[definition["5"] - 1] if definition.get("5") else None, "summary": definition.get("7")}
            for name, definition in zip(names, definitions, strict=True)
        }

    def to_graphql(self) -> Json:
        """The run as GraphQL answers name it."""
        return {
            "id": f"id-{self.name}",
            "name": self.name,
            "displayName": self.fields.get("displayName") or self.name,
            "description": None,
            "sweepName": None,
            "tags": self.fields.get("tags") or [],
            "config": json.dumps(self.config),
            "summaryMetrics": json.dumps(self.summary),
            "wandbConfig": json.dumps({"t": 1}),
            "historyLineCount": len(self.history),
            "historyTail": json.dumps([json.dumps(row) for row in self.history[-1:]]),
            "eventsLineCount": 0,
            "eventsTail": "[]",
            "logLineCount": 0,
            "project": _project_response(self.entity, self.project),
        }


def _project_response(entity: str, name: str) -> Json:
    return {
        "__typename": "Project",
        "id": f"id-{name}",
        "internalId": "UHJvamVjdDox",
        "name": name,
        "entityName": entity,
        "entity": {"id": "id-entity", "name": entity},
        "description": None,
        "access": "PRIVATE",
        "views": "{}",
        "createdAt": TIMESTAMP,
        "isBenchmark": False,
        "user": None,
    }


class FakeWandb:
    """The server; what it was sent: `runs`, `views` (reports) and `artifacts` by id, `operations` in order,
    `unknown_requests`.

    `connections` counts all that were opened, whatever was asked on them.
    """

    def __init__(self) -> None:
        self.runs: dict[str, FakeRun] = {}
        self.projects: set[tuple[str, str]] = set()
        self.views: dict[str, Json] = {}
        self.artifacts: dict[str, Json] = {}
        self.operations: list[str] = []
        self.unknown_requests: list[str] = []
        self.connections = 0
        self._lock = threading.Lock()
        self._http = _Server(self)
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
        """Status and JSON for one request."""
        with self._lock:
            path = urlsplit(path).path
            if path == "/graphql":
                return 200, {"data": self._graphql(json.loads(body))}
            if stream := re.fullmatch(r"/files/([^/]+)/([^/]+)/([^/]+)/file_stream", path):
                entity, project, name = map(unquote, stream.groups())
                return 200, self._stream(self.run(entity, project, name), json.loads(body))
            if method == "PUT" and (upload := re.fullmatch(r"/upload/(run|artifact)/([^/]+)/(.+)", path)):
                owner_type, owner, name = map(unquote, upload.groups())
                return 200, self._upload(owner_type, owner, name, body)
            self.unknown_requests.append(f"{method} {path}")
            return 404, {"error": "not known to the stand-in"}

    def _graphql(self, request: Json) -> Json:
        query, variables = request.get("query", ""), request.get("variables") or {}
        match = re.search(r"(?:query|mutation)\s+(\w+)", query)
        name = request.get("operationName") or (match.group(1) if match else "")
        self.operations.append(name)
        if name not in OPERATIONS:
            self.unknown_requests.append(name)
            return {}
        return OPERATIONS[name](self, variables)

    def _stream(self, run: FakeRun, message: Json) -> Json:
        """Rows of a running run: each named file brings lines and the number of the first one."""
        for file, chunk in (message.get("files") or {}).items():
            start, lines = chunk.get("offset", 0), chunk.get("content") or []
            if file == "wandb-history.jsonl":
                run.history[start:] = [json.loads(line) for line in lines]
            elif file == "wandb-summary.json" and lines:
                run.summary = json.loads(lines[-1])
        if message.get("complete"):
            run.exit_code = message.get("exitcode")
        return {"exitcode": None, "limits": {}}

    def _upload(self, owner_type: str, owner: str, name: str, body: bytes) -> Json:
        files = self.runs[owner].files if owner_type == "run" else self.artifacts[owner]["content"]
        files[name] = body
        return {}

    def run(self, entity: str | None, project: str | None, name: str) -> FakeRun:
        """The run of this id, made where it is new."""
        entity, project = entity or ENTITY, project or "uncategorized"
        self.projects.add((entity, project))
        return self.runs.setdefault(name, FakeRun(entity, project, name))

    def upload_url(self, owner_type: str, owner: str, name: str) -> str:
        """Where the client may put a file."""
        return f"{self.url}/upload/{owner_type}/{owner}/{name}"


def _edges(nodes: Iterable[Json]) -> Json:
    """A page that has no next one."""
    page = {"endCursor": None, "hasNextPage": False}
    return {"edges": [{"node": node, "cursor": node.get("id", "")} for node in nodes], "pageInfo": page}


def _get_viewer(server: FakeWandb, variables: Json) -> Json:
    viewer = {"id": "id-user", "entity": ENTITY, "username": ENTITY, "name": ENTITY, "email": "tester@localhost"}
    teams = _edges([{"id": "id-entity", "name": ENTITY}])
    return {"viewer": {**viewer, "admin": False, "flags": "{}", "apiKeys": {"edges": []}, "teams": teams}}


def _get_resume_status(server: FakeWandb, variables: Json) -> Json:
    run = server.runs.get(variables["name"])
    project = _project_response(variables.get("entity") or ENTITY, variables.get("project") or "uncategorized")
    return {"model": {**project, "bucket": run.to_graphql() if run else None}}


def _upsert_run(server: FakeWandb, variables: Json) -> Json:
    is_new = variables["name"] not in server.runs
    run = server.run(variables.get("entity"), variables.get("project"), variables["name"])
    if variables.get("config"):
        run.config = json.loads(variables["config"])
    run.fields.update({key: value for key, value in variables.items() if value is not None and key != "config"})
    return {"upsertBucket": {"bucket": run.to_graphql(), "inserted": is_new}}


def _create_run_files(server: FakeWandb, variables: Json) -> Json:
    run = variables["run"]
    files = [{"name": name, "uploadUrl": server.upload_url("run", run, name)} for name in variables["files"]]
    return {"createRunFiles": {"runID": f"id-{run}", "uploadHeaders": [], "files": files}}


def _create_artifact(server: FakeWandb, variables: Json) -> Json:
    name = f"artifact-{len(server.artifacts)}"
    server.artifacts[name] = {**variables["input"], "state": "PENDING", "content": {}}
    sequence = {"id": f"sequence-{name}", "latestArtifact": None}
    return {"createArtifact": {"artifact": {"id": name, "state": "PENDING", "artifactSequence": sequence}}}


def _save_manifest(server: FakeWandb, variables: Json) -> Json:
    owner = variables.get("artifactID") or variables["artifactManifestID"].removeprefix("manifest-")
    url = server.upload_url("artifact", owner, "manifest.json")
    manifest = {"id": f"manifest-{owner}", "file": {"id": "f", "uploadUrl": url, "uploadHeaders": []}}
    answer = {"artifactManifest": manifest}
    return {"createArtifactManifest": answer, "updateArtifactManifest": answer}


def _create_artifact_files(server: FakeWandb, variables: Json) -> Json:
    nodes = []
    for file in variables["input"]["artifactFiles"]:
        owner, name = file["artifactID"], file["name"]
        url = server.upload_url("artifact", owner, name)
        target: Json = {"uploadUrl": url, "uploadHeaders": [], "uploadMultipartUrls": None}
        nodes.append({"storagePath": f"{owner}/{name}", "artifact": {"id": owner}, **target})
    return {"createArtifactFiles": {"files": _edges(nodes)}}


def _commit_artifact(server: FakeWandb, variables: Json) -> Json:
    artifact = server.artifacts[variables["artifactID"]]
    artifact["state"] = "COMMITTED"
    return {"commitArtifact": {"artifact": {"id": variables["artifactID"], "digest": artifact["digest"]}}}


def _get_artifact_by_client_id(server: FakeWandb, variables: Json) -> Json:
    ids = [name for name, artifact in server.artifacts.items() if artifact.get("clientID") == variables["clientID"]]
    return {"clientIDMapping": {"serverID": ids[0]} if ids else None}


def _get_project(server: FakeWandb, variables: Json) -> Json:
    key = (variables["entityName"], variables["projectName"])
    return {"project": _project_response(*key) if key in server.projects else None}


def _list_projects(server: FakeWandb, variables: Json) -> Json:
    projects = _edges(_project_response(*key) for key in sorted(server.projects) if key[0] == variables["entity"])
    return {"models": {**projects, "pageInfo": {"__typename": "PageInfo", **projects["pageInfo"]}}}


def _create_project(server: FakeWandb, variables: Json) -> Json:
    project_input = variables["input"]
    key = (project_input.get("entityName") or project_input.get("entity_name") or ENTITY, project_input["name"])
    server.projects.add(key)
    return {"result": {"project": _project_response(*key), "model": _project_response(*key), "inserted": True}}


def _view_response(view: Json) -> Json:
    """A report as GraphQL answers name it."""
    fields = {key: view.get(key) for key in ("id", "type", "name", "displayName", "description")}
    project = _project_response(view.get("entityName") or ENTITY, view["projectName"])
    times = {"createdAt": TIMESTAMP, "updatedAt": TIMESTAMP}
    return {**fields, "spec": json.dumps(view["spec"]), "project": project, "user": None, **times}


def _save_view(server: FakeWandb, variables: Json) -> Json:
    name = variables.get("id") or f"view-{len(server.views)}"
    is_new = name not in server.views
    server.views[name] = {**variables, "id": name, "spec": json.loads(variables["spec"])}
    return {"upsertView": {"inserted": is_new, "view": _view_response(server.views[name])}}


def _list_views(server: FakeWandb, variables: Json) -> Json:
    views = (view for view in server.views.values() if view["projectName"] == variables["project"])
    return {"project": {"allViews": _edges(map(_view_response, views))}}


def _read_run(server: FakeWandb, variables: Json) -> Json:
    """A run as wandb.Api().run() reads it, whole or a page of its rows."""
    run = server.runs.get(variables.get("name") or variables.get("run") or variables.get("runName") or "")
    if run is None or run.project != variables["project"]:
        return {"project": {"run": None}}
    last_step = max((row["_step"] for row in run.history), default=-1)
    rows = [row for row in run.history if variables.get("minStep", 0) <= row["_step"] < variables.get("maxStep", 2**62)]
    run_fields = {
        "group": run.fields.get("groupName"),
        "jobType": run.fields.get("jobType"),
        "projectId": "1",
        "state": {None: "running", 0: "finished"}.get(run.exit_code, "failed"),
        "user": {"name": ENTITY, "username": ENTITY},
        "commit": None,
        "readOnly": False,
        "createdAt": TIMESTAMP,
        "heartbeatAt": TIMESTAMP,
        "notes": None,
        "systemMetrics": "{}",
        "historyKeys": {"lastStep": last_step, "sets": [], "keys": {}},
        "history": [json.dumps(row) for row in rows[: variables.get("pageSize")]],
        "parquetHistory": {"parquetUrls": [], "liveData": run.history},
    }
    return {"project": {"run": {**run.to_graphql(), **run_fields}}}


OPERATIONS: dict[str, Callable[[FakeWandb, Json], Json]] = {
    # every start
    "Viewer": _get_viewer,
    "ServerFeaturesQuery": lambda server, variables: {"serverInfo": {"features": []}},
    "OrganizationCoreWeaveOrganizationID": lambda server, variables: {"entity": {"organization": None}},
    # runs
    "RunResumeStatus": _get_resume_status,
    "UpsertBucket": _upsert_run,
    "CreateRunFiles": _create_run_files,
    "MarkRunFilesUploaded": lambda server, variables: {"markRunFilesUploaded": {"success": True}},
    "RunState": lambda server, variables: {"project": {"run": {"id": f"id-{variables['run']}", "state": "running"}}},
    # artifacts: an empty answer to CreateArtifact would make the client panic
    "CreateArtifact": _create_artifact,
    "CreateArtifactManifest": _save_manifest,
    "UpdateArtifactManifest": _save_manifest,
    "CreateArtifactFiles": _create_artifact_files,
    "CommitArtifact": _commit_artifact,
    "ClientIDMapping": _get_artifact_by_client_id,
    "XXHashDigestsEnabled": lambda server, variables: {"entity": {"xxhashDigestsEnabled": False}},
    "FetchArtifactDigestAlgorithm": lambda server, variables: {"project": None},
    # runs read back
    **dict.fromkeys(("Run", "RunHistoryKeys", "RunParquetHistory", "HistoryPage"), _read_run),
    # reports
    "ProjectViews": _list_views,
    "ProjectInternalId": _get_project,
    "GetProjects": _list_projects,
    "CreateProject": _create_project,
    "upsertView": _save_view,
    "SpecificReport": lambda server, variables: {"view": _view_response(server.views[variables["reportId"]])},
}


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, fake: FakeWandb) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.fake = fake

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Count every connection, whatever is then asked on it."""
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
        status, response = self.server.fake.respond(self.command, self.path, self._body())
        content = json.dumps(response).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_PUT = do_POST

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the tests look at what was kept."""

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            body = b"".join(iter(self._chunk, b""))
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        encoding = self.headers.get("Content-Encoding", "")
        if encoding == "gzip":
            return gzip.decompress(body)
        return zlib.decompress(body) if encoding == "deflate" else body

    def _chunk(self) -> bytes:
        size = int(self.rfile.readline().split(b";")[0], 16)
        content = self.rfile.read(size)
        self.rfile.readline()
        return content
