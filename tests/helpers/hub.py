"""A small server of repositories' files, with the part of the Hugging Face hub's interface that its clients use."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubServer(ThreadingHTTPServer):
    """Serves directories as repositories at their only commit, which ``main`` names.

    Args:
        repositories: directories by name of the repository; that of a data set begins with "datasets/".

    Attributes:
        requests: method and path of every request so far.
    """

    daemon_threads = True

    def __init__(self, repositories: dict[str, Path]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories = repositories
        self.requests: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def do_HEAD(self) -> None:
        self._respond(with_body=False)

    def do_GET(self) -> None:
        self._respond(with_body=True)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._respond(with_body=True, posted=body)

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _respond(self, *, with_body: bool, posted: bytes = b"") -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        status, headers, body = self._answer(path, posted)
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body)), "X-Repo-Commit": COMMIT} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def _answer(self, path: str, posted: bytes) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of the answer to a request."""
        for name, directory in self.server.repositories.items():
            api = f"/api/{name}" if name.startswith("datasets/") else f"/api/models/{name}"
            for revision in ("main", COMMIT):
                prefix = f"/{name}/resolve/{revision}/"
                if path.startswith(prefix):
                    return self._file(directory, path.removeprefix(prefix))
                if path == f"{api}/revision/{revision}":
                    return self._json(self._information(name, directory))
                if path.startswith(f"{api}/tree/{revision}"):
                    return self._json(self._tree(directory, path.removeprefix(f"{api}/tree/{revision}").strip("/")))
                if path == f"{api}/paths-info/{revision}":
                    return self._json(
                        [entry for entry in self._tree(directory, "") if entry["path"].encode() in posted]
                    )
            if path.startswith((f"{api}/revision/", f"/{name}/resolve/")):
                return 404, {"X-Error-Code": "RevisionNotFound"}, b""
            if path == api:
                return self._json(self._information(name, directory))
        return 404, {"X-Error-Code": "RepoNotFound"}, b""

    def _file(self, directory: Path, name: str) -> tuple[int, dict[str, str], bytes]:
        path = directory / name
        if not path.is_file():
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        body = path.read_bytes()
        return 200, {"ETag": f'"{_digest(body)}"'}, body

    def _information(self, name: str, directory: Path) -> dict[str, object]:
        files = [{"rfilename": entry["path"]} for entry in self._tree(directory, "")]
        return {"id": name.removeprefix("datasets/"), "sha": COMMIT, "siblings": files, "private": False, "tags": []}

    def _tree(self, directory: Path, folder: str) -> list[dict[str, str | int]]:
        return [
            {"type": "file", "path": path.relative_to(directory).as_posix(), "size": path.stat().st_size,
             "oid": _digest(path.read_bytes())}
            for path in sorted((directory / folder).rglob("*"))
            if path.is_file()
        ]  # fmt: skip

    def _json(self, value: object) -> tuple[int, dict[str, str], bytes]:
        return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()


def _digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@contextmanager
def hub_server(repositories: dict[str, Path]) -> Iterator[HubServer]:
    """Runs a server in a thread within this context."""
    with HubServer(repositories) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
