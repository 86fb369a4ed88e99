"""A stand-in for the Hugging Face Hub: the addresses that huggingface_hub calls to look up, upload and download."""

import base64
import contextlib
import hashlib
import json
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_stand_in"


class HubServer:
    """repositories: {owner/name: [{path: contents} after each commit]}. requests: (method, path) of all so far.

    refusals: {(method, start of a path): status} that are refused. large: {sha256: contents} of large files.
    """

    def __init__(self):
        self.repositories, self.requests, self.refusals, self.messages, self.large = {}, [], {}, [], {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()

    def files(self, name):
        return self.repositories[name][-1]


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_args):
        pass

    def do_GET(self):
        self._serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def _serve(self):
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path).strip("/")
        body = self._body()
        self.hub.requests.append((self.command, path))
        refused = (
            s for (method, start), s in self.hub.refusals.items() if method == self.command and path.startswith(start)
        )
        status = next(refused, None)
        if not path.startswith("large/") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            status = 401
        if status:
            return self._answer(status, {"error": "refused"})
        words = path.split("/")
        if words[:2] == ["api", "models"]:
            return self._model("/".join(words[2:4]), words[4:], body)
        if path == "api/repos/create":
            given = json.loads(body)
            name = f"{given['organization']}/{given['name']}"
            self.hub.repositories[name] = [{".gitattributes": b""}]
            return self._answer(
                200, {"url": f"{self.hub.url}/{name}", "name": name, "visibility": given.get("visibility")}
            )
        if path == "api/validate-yaml":
            return self._answer(200, {"errors": [], "warnings": []})
        if words[2:] == ["info", "lfs", "objects", "batch"]:
            objects = json.loads(body)["objects"]
            actions = [{"upload": {"href": f"{self.hub.url}/large/{item['oid']}"}} for item in objects]
            objects = [{**item, "actions": action} for item, action in zip(objects, actions)]
            return self._answer(200, {"transfer": "basic", "objects": objects})
        if words[0] == "large":
            assert hashlib.sha256(body).hexdigest() == words[1]
            self.hub.large[words[1]] = body
            return self._answer(200, {})
        if words[2:3] == ["resolve"]:
            return self._file("/".join(words[:2]), words[3], "/".join(words[4:]))
        return self._answer(404, {"error": "no such address"})

    def _body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _model(self, name, words, body):
        commits = self.hub.repositories.get(name)
        if commits is None:
            return self._answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        if words[:1] == ["preupload"]:
            paths = [file["path"] for file in json.loads(body)["files"]]
            files = [{"path": path, "uploadMode": _mode(path), "shouldIgnore": False} for path in paths]
            return self._answer(200, {"files": files})
        if words[:1] == ["commit"]:
            return self._commit(name, [json.loads(line) for line in body.splitlines()])
        if words[:1] == ["tree"]:
            files = commits[int(words[1], 16)].items()
            entries = [{"type": "file", "path": p, "size": len(c), "oid": _digest(c)} for p, c in files]
            return self._answer(200, entries)
        siblings = [{"rfilename": path} for path in commits[-1]]
        found = {"_id": "0", "id": name, "modelId": name, "sha": _commit_hash(commits), "siblings": siblings}
        return self._answer(200, {**found, "private": False, "tags": [], "downloads": 0})

    def _commit(self, name, lines):
        commits = self.hub.repositories[name]
        files = dict(commits[-1])
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.hub.messages.append(value["summary"])
                if value.get("parentCommit", _commit_hash(commits)) != _commit_hash(commits):
                    return self._answer(412, {"error": "the parent is another commit"})
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        commits.append(files)
        oid = _commit_hash(commits)
        return self._answer(200, {"commitOid": oid, "commitUrl": f"{self.hub.url}/{name}/commit/{oid}"})

    def _file(self, name, commit, path):
        contents = self.hub.repositories[name][int(commit, 16)].get(path)
        if contents is None:
            return self._answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        return self._answer(200, contents, {"ETag": f'"{_digest(contents)}"', "X-Repo-Commit": commit})

    def _answer(self, status, contents, headers=None):
        data = contents if isinstance(contents, bytes) else json.dumps(contents).encode()
        with contextlib.suppress(OSError):
            self.send_response(status)
            for name, value in {
                "Content-Length": str(len(data)),
                "Content-Type": "application/json",
                **(headers or {}),
            }.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)


def _commit_hash(commits):
    return f"{len(commits) - 1:040x}"


def _mode(path):
    """Weights are uploaded on their own, by their hash, before the commit."""
    return "lfs" if path.endswith(".safetensors") else "regular"


def _digest(contents):
    return hashlib.sha1(contents).hexdigest()
