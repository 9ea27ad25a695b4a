"""A hub of Hugging Face in small: the few addresses that huggingface_hub asks when it downloads a repository."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

REVISION = 'a' * 40


class Hub(ThreadingHTTPServer):
    """Serves one repository.

    :ivar requests: method and path of what was asked, and where in a file it was to start.
    :ivar breaks_after: bytes of a download of a large file after which the connection ends; None: never.
    :ivar tree_lies: files whose hash in the listing is that of other bytes.
    """

    def __init__(self, repo: str, files: Mapping[str, bytes]) -> None:
        super().__init__(('127.0.0.1', 0), _Handler)
        self.repo = repo
        self.files = dict(files)
        self.requests: list[tuple[str, str, int]] = []
        self.breaks_after: int | None = None
        self.tree_lies: dict[str, bytes] = {}

    @property
    def address(self) -> str:
        return f'http://127.0.0.1:{self.server_address[1]}'

    def handle_error(self, request: object, client_address: object) -> None:
        """Nothing: connections are broken on purpose."""


@contextmanager
def serve(repo: str, files: Mapping[str, bytes]) -> Iterator[Hub]:
    hub = Hub(repo, files)
    thread = threading.Thread(target=hub.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


def _lfs(data: bytes) -> dict[str, object]:
    return {'oid': hashlib.sha256(data).hexdigest(), 'size': len(data), 'pointerSize': 134}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    server: Hub

    def log_message(self, *args: object) -> None:
        """Nothing."""

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        path = self.path.partition('?')[0]
        start = int(self.headers.get('Range', 'bytes=0-').removeprefix('bytes=').partition('-')[0])
        self.server.requests.append((self.command, path, start))
        api = f'/api/models/{self.server.repo}'
        resolve = f'/{self.server.repo}/resolve/{REVISION}/'
        if path == f'{api}/tree/{REVISION}':
            tree = [
                {
                    'type': 'file',
                    'path': name,
                    'size': len(data),
                    'oid': hashlib.sha1(data).hexdigest(),
                    **({'lfs': _lfs(self.server.tree_lies.get(name, data))} if name.endswith('.bin') else {}),
                }
                for name, data in self.server.files.items()
            ]
            tree.append({'type': 'directory', 'path': 'sub', 'oid': '0' * 40})
            self._send(200, json.dumps(tree).encode(), {'Content-Type': 'application/json'}, body)
        elif path == f'{api}/commits/main':
            commit = {'id': REVISION, 'title': '', 'message': '', 'date': '2024-02-06T03:00:00.000Z', 'authors': []}
            self._send(200, json.dumps([commit]).encode(), {'Content-Type': 'application/json'}, body)
        elif path.startswith(resolve) and path.endswith(('.bin', '.safetensors')):
            # Large files lie elsewhere.
            self._send(302, b'', {'Location': f'/elsewhere/{path.removeprefix(resolve)}'}, body)
        elif (name := path.removeprefix(resolve).removeprefix('/elsewhere/')) in self.server.files:
            data = self.server.files[name]
            headers = {'ETag': f'"{hashlib.sha1(data).hexdigest()}"', 'X-Repo-Commit': REVISION}
            if start:
                headers['Content-Range'] = f'bytes {start}-{len(data) - 1}/{len(data)}'
            self._send(206 if start else 200, data[start:], headers, body)
        else:
            missing = 'RevisionNotFound' if self.server.repo in path else 'RepoNotFound'
            self._send(404, b'{}', {'X-Error-Code': missing}, body)

    def _send(self, status: int, data: bytes, headers: Mapping[str, str], body: bool) -> None:
        self.send_response(status)
        for name, value in {**headers, 'Content-Length': str(len(data)), 'Accept-Ranges': 'bytes'}.items():
            self.send_header(name, value)
        self.end_headers()
        limit = self.server.breaks_after
        if body and limit is not None and self.path.startswith('/elsewhere/') and len(data) > limit:
            self.wfile.write(data[:limit])
            self.wfile.flush()
            self.close_connection = True
        elif body:
            self.wfile.write(data)
