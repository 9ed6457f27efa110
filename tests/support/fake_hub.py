"""A server with the part of the Hugging Face Hub's HTTP API that `HfFileSystem` reads data sets through."""

import hashlib
import json
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import parse_qs, unquote, urlsplit

PAGE = 8  # entries of a listing in one answer; the Hub has 1,000


@contextmanager
def serve_hub(root: Path):
    """Serves ``root/USER/NAME/`` as the data set ``USER/NAME``; yields the address and a `Counter` of requests by kind
    (info, tree, file). Files with "forbidden" in their names are listed and not given."""
    asked = Counter()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"root": root, "asked": asked}))
    Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    root: Path
    asked: Counter

    def do_GET(self):
        url = urlsplit(self.path)
        match [unquote(part) for part in url.path.strip("/").split("/")]:
            case ["api", "datasets", user, name, *rest] if rest in ([], ["revision", "main"]):
                self.asked["info"] += 1
                found = (self.root / user / name).is_dir()
                self._json({"id": f"{user}/{name}", "sha": "0" * 40, "siblings": []} if found else None, "RepoNotFound")
            case ["api", "datasets", user, name, "tree", "main", *path]:
                self.asked["tree"] += 1
                self._tree(self.root / user / name, "/".join(path), parse_qs(url.query))
            case ["datasets", user, name, "resolve", "main", *path]:
                self.asked["file"] += 1
                self._file(self.root / user / name / "/".join(path))
            case _:
                self._json(None, "EntryNotFound")

    def log_message(self, *args):
        pass

    def _tree(self, repository, folder, query):
        inside = repository / folder
        if not inside.is_dir():
            self._json(None, "EntryNotFound")
            return
        recursive = query.get("recursive", ["false"])[0].lower() == "true"
        entries = sorted(inside.rglob("*") if recursive else inside.iterdir())
        start = int(query.get("cursor", ["0"])[0])
        following = {}
        if start + PAGE < len(entries):
            where = urlsplit(self.path).path
            address = f"http://{self.headers['Host']}{where}?recursive={recursive}&cursor={start + PAGE}"
            following = {"Link": f'<{address}>; rel="next"'}
        self._json([_entry(path, repository) for path in entries[start : start + PAGE]], headers=following)

    def _file(self, path):
        if "forbidden" in path.name:
            self._send(403, b"{}", {})
            return
        if not path.is_file():
            self._json(None, "EntryNotFound")
            return
        data = path.read_bytes()
        status, headers = 200, {}
        if given := self.headers.get("Range"):
            first, _, last = given.removeprefix("bytes=").partition("-")
            first, last = int(first), min(int(last or len(data)), len(data) - 1)
            status, headers = 206, {"Content-Range": f"bytes {first}-{last}/{len(data)}"}
            data = data[first : last + 1]
        self._send(status, data, headers)

    def _json(self, value, error="", headers=None):
        if value is None:
            self._send(404, json.dumps({"error": error}).encode(), {"X-Error-Code": error})
        else:
            self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _send(self, status, data, headers):
        self.send_response(status)
        for name, text in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(data)


def _entry(path, repository):
    name = path.relative_to(repository).as_posix()
    if path.is_dir():
        return {"type": "directory", "oid": hashlib.sha1(name.encode()).hexdigest(), "size": 0, "path": name}
    data = path.read_bytes()
    return {"type": "file", "oid": hashlib.sha1(data).hexdigest(), "size": len(data), "path": name}
