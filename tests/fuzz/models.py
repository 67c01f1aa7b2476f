"""Model folders: the settings beside a network, and the record of what was fetched. The network and the tokenizer are in encoders.py."""

from __future__ import annotations

import asyncio
import atexit
import json
import shutil
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import msgspec

from engine.encoding.folder import load_from_store
from engine.encoding.onnx import MIN_LENGTH, read_config
from engine.errors import NotFound

from .mutation import mutated_json
from .target import Target, closed_later, is_equal, stored


@cache
def scratch_folder() -> Path:
    """A folder of this process, gone when it ends."""
    root = Path(tempfile.mkdtemp(prefix="tartan-fuzz-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return root


@cache
def _runner() -> asyncio.Runner:
    runner = asyncio.Runner()
    closed_later(runner.close)
    return runner


@dataclass
class _Object:
    data: bytes
    etag: str


class _Store:
    """The model folder as a store has it; the files never change."""

    async def get(self, name: str) -> _Object:
        if not name.endswith((".json", ".onnx")):
            raise NotFound("no such object")
        return _Object(b"{}", "tag")

    async def get_if_changed(self, name: str, etag: str) -> _Object | None:
        return None if etag == "tag" else await self.get(name)


def read_folder(data: bytes) -> bool:
    """As onnx_config.json, and as the record of fetched files, which is only a hint and never an error."""
    path = scratch_folder() / "onnx_config.json"
    path.write_bytes(data)
    accepted, config = stored(lambda: read_config(path))
    if accepted:
        again = msgspec.json.encode(config)
        path.write_bytes(again)
        is_equal(msgspec.json.encode(read_config(path)), again, "settings of a model")
        assert MIN_LENGTH > 0
    fetched = _runner().run(load_from_store(_Store(), "m", scratch_folder()))
    (fetched / "fetched.json").write_bytes(data)
    _runner().run(load_from_store(_Store(), "m", scratch_folder()))
    is_equal((fetched / "model.onnx").read_bytes(), b"{}", "a fetched file")
    return accepted


def _seeds() -> list[bytes]:
    settings = {
        "query_prefix": "[Q] ", "document_prefix": "[D] ", "query_length": 32, "document_length": 180, "do_query_expansion": True, "embedding_dim": 128,
        "uses_token_type_ids": False, "mask_token_id": 103, "pad_token_id": 0, "skiplist_words": [".", "!"], "query_prefix_id": 1, "model_name": "m",
    }  # fmt: skip
    record = {name: {"etag": "tag", "size_bytes": 2, "checksum": 5} for name in ("onnx_config.json", "tokenizer.json", "model.onnx")}
    return [json.dumps(settings).encode(), b"{}", json.dumps(record).encode()]


MODEL = Target("model", "model folders' settings", read_folder, _seeds, mutate=mutated_json)
