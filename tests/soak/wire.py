"""Requests over keep-alive connections, written as bytes: a tenth of a general client's CPU, which here would come out of the server's."""

from __future__ import annotations

import asyncio
import base64
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import msgspec
import numpy as np


@dataclass(frozen=True)
class Answer:
    """Status, headers (lower case) and body."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return msgspec.json.decode(self.body)


MAX_IDLE_S = 15.0
"""A connection idle for longer is not used again: the server may be closing it at this moment."""


class Wire:
    """Connections to one server; as many as there are requests at once."""

    def __init__(self, url: str) -> None:
        split = urlsplit(url)
        self.host, self.port = str(split.hostname), int(split.port or 80)
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter, float]] = []

    async def ask(self, method: str, path: str, body: object = None) -> Answer:
        """One request. OSError or EOFError (asyncio.IncompleteReadError) if the connection breaks: the outcome is unknown."""
        return await self.send(self.request(method, path, body))

    def request(self, method: str, path: str, body: object = None) -> bytes:
        """The bytes of a request, for those who send it many times."""
        data = b"" if body is None else msgspec.json.encode(body)
        head = f"{method} {path} HTTP/1.1\r\nHost: {self.host}\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        return head.encode() + data

    async def send(self, request: bytes) -> Answer:
        reader, writer = await self._connection()
        try:
            writer.write(request)
            answer = await _answer(reader)
        except BaseException:
            writer.close()
            raise
        if answer.headers.get("connection") == "close":
            writer.close()
        else:
            self._idle.append((reader, writer, time.monotonic()))
        return answer

    async def _connection(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        while self._idle:
            reader, writer, since_s = self._idle.pop()
            if time.monotonic() - since_s < MAX_IDLE_S and not reader.at_eof():
                return reader, writer
            writer.close()
        return await asyncio.open_connection(self.host, self.port, limit=1 << 22)

    def close(self) -> None:
        for _, writer, _ in self._idle:
            writer.close()
        self._idle.clear()


async def _answer(reader: asyncio.StreamReader) -> Answer:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)}
    return Answer(int(head[0].split()[1]), headers, await _body(reader, headers))


async def _body(reader: asyncio.StreamReader, headers: dict[str, str]) -> bytes:
    if headers.get("transfer-encoding") != "chunked":
        return await reader.readexactly(int(headers.get("content-length", 0)))
    chunks = []
    while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
        chunks.append(await reader.readexactly(size))
        await reader.readexactly(2)
    await reader.readexactly(2)
    return b"".join(chunks)


def vectors(rows: np.ndarray) -> dict[str, Any]:
    """A matrix as the wire has it: base64 of float32 with its shape."""
    return {"embeddings_b64": base64.b64encode(rows.astype("<f4").tobytes()).decode(), "shape": list(rows.shape)}
