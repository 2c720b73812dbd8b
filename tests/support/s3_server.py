"""An S3 server in this process that keeps objects in memory: as much of the protocol as pyarrow speaks to move files.

Nothing is signed or checked; there is one level of names, and a listing is never cut into pages.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import md5
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

_DATE = "2026-01-01T00:00:00.000Z"
_HTTP_DATE = "Thu, 01 Jan 2026 00:00:00 GMT"


class Objects:
    """What the server holds: bytes by "/bucket/key", and uploads of which not all parts are there."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.buckets: set[str] = set()
        self.uploads: dict[str, dict[int, bytes]] = {}


@contextmanager
def s3_server() -> Iterator[tuple[str, Objects]]:
    """ "HOST:PORT" of a running server, and what it holds."""
    held = Objects()
    handler = type("Bound", (_Handler,), {"held": held})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"127.0.0.1:{server.server_port}", held
    server.shutdown()
    server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    held: Objects

    def _asked(self) -> tuple[str, dict[str, str]]:
        url = urlsplit(self.path)
        options = {name: values[0] for name, values in parse_qs(url.query, keep_blank_values=True).items()}
        return unquote(url.path).rstrip("/"), options

    def do_HEAD(self) -> None:
        path, _ = self._asked()
        if path.count("/") == 1:
            self._answer(200 if path[1:] in self.held.buckets else 404)
        else:
            self._object(path)

    def do_GET(self) -> None:
        path, options = self._asked()
        if path.count("/") > 1:
            self._object(path)
        elif path[1:] not in self.held.buckets:
            self._missing("NoSuchBucket")
        else:
            self._list(path[1:], options)

    def do_PUT(self) -> None:
        path, options = self._asked()
        body = self._body()
        if path.count("/") > 1 and path.split("/")[1] not in self.held.buckets:
            self._missing("NoSuchBucket")
            return
        if "partNumber" in options:
            self.held.uploads[options["uploadId"]][int(options["partNumber"])] = body
        elif path.count("/") == 1:
            self.held.buckets.add(path[1:])
        else:
            self.held.objects[path] = body
        self._answer(200, headers={"ETag": _etag(body)})

    def do_POST(self) -> None:
        path, options = self._asked()
        body = self._body()
        if path.split("/")[1] not in self.held.buckets:
            self._missing("NoSuchBucket")
        elif "uploads" in options:
            number = uuid.uuid4().hex
            self.held.uploads[number] = {}
            self._xml("InitiateMultipartUploadResult", f"<Key>{escape(path)}</Key><UploadId>{number}</UploadId>")
        else:
            assert "uploadId" in options, body
            parts = self.held.uploads.pop(options["uploadId"])
            self.held.objects[path] = b"".join(parts[number] for number in sorted(parts))
            self._xml("CompleteMultipartUploadResult", f"<ETag>{_etag(self.held.objects[path])}</ETag>")

    def do_DELETE(self) -> None:
        path, _ = self._asked()
        self.held.objects.pop(path, None)
        self._answer(204)

    def _object(self, path: str) -> None:
        """The bytes of an object, or those of a range."""
        whole = self.held.objects.get(path)
        if whole is None:
            self._missing("NoSuchKey")
            return
        headers = {"ETag": _etag(whole), "Last-Modified": _HTTP_DATE, "Content-Type": "application/octet-stream"}
        status, body = 200, whole
        if "Range" in self.headers:
            start, _, end = self.headers["Range"].removeprefix("bytes=").partition("-")
            last = min(int(end), len(whole) - 1) if end else len(whole) - 1
            status, body = 206, whole[int(start) : last + 1]
            headers["Content-Range"] = f"bytes {start}-{last}/{len(whole)}"
        self._answer(status, body, headers)

    def _list(self, bucket: str, options: dict[str, str]) -> None:
        prefix, delimiter = options.get("prefix", ""), options.get("delimiter", "")
        root = f"/{bucket}/"
        keys = sorted(path.removeprefix(root) for path in self.held.objects if path.startswith(root + prefix))
        found, folders = [], set()
        for key in keys:
            head, cut, _ = key[len(prefix) :].partition(delimiter) if delimiter else ("", "", "")
            if cut:
                folders.add(prefix + head + cut)
            else:
                found.append(key)
        contents = "".join(
            f"<Contents><Key>{escape(key)}</Key><LastModified>{_DATE}</LastModified>"
            f"<Size>{len(self.held.objects[root + key])}</Size></Contents>"
            for key in found
        )
        common = "".join(f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>" for name in sorted(folders))
        count = f"<KeyCount>{len(found) + len(folders)}</KeyCount><IsTruncated>false</IsTruncated>"
        self._xml("ListBucketResult", f"<Name>{bucket}</Name><Prefix>{escape(prefix)}</Prefix>{count}{contents}{common}")

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            body = b"".join(self._chunks())
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        return _unchunked(body) if "aws-chunked" in self.headers.get("Content-Encoding", "") else body

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline().split(b";")[0], 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def _missing(self, code: str) -> None:
        self._answer(404, f"<Error><Code>{code}</Code><Message>not there</Message></Error>".encode())

    def _xml(self, name: str, inside: str) -> None:
        self._answer(200, f'<?xml version="1.0"?><{name}>{inside}</{name}>'.encode(), {"Content-Type": "application/xml"})

    def _answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Nothing: pytest shows what fails."""


def _unchunked(body: bytes) -> bytes:
    """What Amazon's own chunks hold: SIZE;signature CRLF bytes CRLF ..., then a chunk of none and trailers."""
    parts = []
    while body:
        head, _, body = body.partition(b"\r\n")
        size = int(head.split(b";")[0], 16)
        if not size:
            break
        parts.append(body[:size])
        body = body[size + 2 :]
    return b"".join(parts)


def _etag(body: bytes) -> str:
    return f'"{md5(body).hexdigest()}"'
