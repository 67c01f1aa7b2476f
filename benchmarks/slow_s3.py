"""A stand-in for S3 over HTTP whose requests take as long as S3's do: objects are the files of a directory store, each request first waits.

    python -m benchmarks.slow_s3 FOLDER PORT LEAST_MS MOST_MS

What the engine needs of S3 for one index and no more: GET (whole, or a range, or If-None-Match) and PUT with If-Match or If-None-Match; no listing, no
signatures checked. A bucket is a folder: s3://bucket/name is FOLDER/name. Waits are uniform between the two and do not add up, as in S3: any
number of requests wait at once. server.py measures adds against it.
"""

from __future__ import annotations

import asyncio
import random
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import formatdate
from urllib.parse import unquote

from engine.errors import Conflict, NotFound
from engine.store.base import Buffer
from engine.store.directory import DirectoryStore


@dataclass
class SlowS3:
    """One bucket over one folder."""

    store: DirectoryStore
    least_s: float
    most_s: float

    def __post_init__(self) -> None:
        self._rng = random.Random(0)

    async def serve(self, port: int) -> None:
        server = await asyncio.start_server(self._connection, "127.0.0.1", port, limit=1 << 20)
        await server.serve_forever()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                first, *lines = head.split("\r\n")
                method, target, _ = first.split(" ")
                headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)}
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                await asyncio.sleep(self._rng.uniform(self.least_s, self.most_s))
                status, more, data = await self._answer(method, unquote(target.partition("?")[0]), headers, body)
                lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(data)}", f"Last-Modified: {formatdate(0, usegmt=True)}"]
                writer.write("\r\n".join([*lines, *more, "\r\n"]).encode())
                writer.write(data)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def _answer(self, method: str, path: str, headers: Mapping[str, str], body: bytes) -> tuple[str, list[str], Buffer]:
        name = path.lstrip("/").partition("/")[2]
        try:
            if method == "PUT":
                if "if-match" in headers:
                    etag = await self.store.replace_if_unchanged(name, body, headers["if-match"].strip('"'))
                else:
                    etag = await self.store.put_if_absent(name, body)
                return "200 OK", [f'ETag: "{etag}"'], b""
            found = await self.store.get(name)
        except NotFound:
            return "404 Not Found", [], b"<Error><Code>NoSuchKey</Code></Error>"
        except Conflict:
            return "412 Precondition Failed", [], b"<Error><Code>PreconditionFailed</Code></Error>"
        more = [f'ETag: "{found.etag}"']
        if headers.get("if-none-match", "").strip('"') == found.etag:
            return "304 Not Modified", more, b""
        if "range" not in headers:
            return "200 OK", more, found.data
        start, _, last = headers["range"].partition("=")[2].partition("-")
        end = min(int(last) + 1, len(found.data))
        return "206 Partial Content", [*more, f"Content-Range: bytes {start}-{end - 1}/{len(found.data)}"], found.data[int(start) : end]


if __name__ == "__main__":
    folder, port, least_ms, most_ms = sys.argv[1:]
    asyncio.run(SlowS3(DirectoryStore(folder), int(least_ms) / 1000, int(most_ms) / 1000).serve(int(port)))
