"""Where a model folder comes from: a local directory, the object store, or the Hugging Face hub. All three end in a local path.

A model folder holds `onnx_config.json`, `tokenizer.json` and exactly one wanted network (`model.onnx`, or `model_int8.onnx` for int8);
other files in it are not fetched and not read. onnx.py opens the path. This module does not know what is inside the files.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Protocol

import msgspec
import xxhash

from engine.errors import InvalidRequest, NotFound, Unavailable

CONFIG_FILE = "onnx_config.json"
TOKENIZER_FILE = "tokenizer.json"


def model_file(int8: bool) -> str:
    """The one network file that is loaded: no falling back from one precision to the other."""
    return "model_int8.onnx" if int8 else "model.onnx"


def model_files(int8: bool) -> tuple[str, ...]:
    return (CONFIG_FILE, TOKENIZER_FILE, model_file(int8))


def check_folder(path: Path, int8: bool) -> Path:
    """Return `path` if it holds the needed files, else raise NotFound with the missing ones and a hint."""
    missing = [name for name in model_files(int8) if not (path / name).is_file()]
    if not missing:
        return path
    other = model_file(not int8)
    hint = ""
    if missing == [model_file(int8)] and (path / other).is_file():
        hint = f"; {other} is there: switch int8 {'off' if int8 else 'on'} to load it"
    raise NotFound(f"the model folder lacks {', '.join(missing)}{hint}", folder=str(path))


class StoredObject(Protocol):
    @property
    def data(self) -> bytes | memoryview: ...
    @property
    def etag(self) -> str: ...


class ModelStore(Protocol):
    """The two calls of an object store (engine/store/base.py) that fetching needs; encoding and store stay strangers."""

    async def get(self, name: str) -> StoredObject: ...
    async def get_if_changed(self, name: str, etag: str) -> StoredObject | None: ...


class _Fetched(msgspec.Struct, frozen=True):
    """What we know of one fetched file, kept beside it so that the next process can reuse it."""

    etag: str
    size_bytes: int
    checksum: int


_RECORD_FILE = "fetched.json"


async def load_from_store(store: ModelStore, prefix: str, cache_dir: Path, *, int8: bool = False) -> Path:
    """A local folder with the model that lies under `prefix` in the store.

    A file fetched earlier is used again if the store says that its etag is unchanged and its bytes still have the checksum they
    were written with. Files are written beside their place and renamed, so another process sees the whole old or the whole new file.
    Costs one request per file (three), without bytes if nothing changed. A file is held in memory while it is fetched.
    Raises NotFound if a file is absent, Unavailable as the store does.
    """
    prefix = prefix.rstrip("/")
    folder = cache_dir / f"model-{xxhash.xxh3_64_hexdigest(prefix.encode())}"
    folder.mkdir(parents=True, exist_ok=True)
    known = _read_record(folder)
    for name in model_files(int8):
        key = f"{prefix}/{name}" if prefix else name
        before = known.get(name)
        if before is not None and _is_intact(folder / name, before):
            found = await store.get_if_changed(key, before.etag)
            if found is None:
                continue
        else:
            found = await store.get(key)
        _write_atomically(folder / name, found.data)
        known[name] = _Fetched(found.etag, len(found.data), xxhash.xxh3_64_intdigest(found.data))
        _write_atomically(folder / _RECORD_FILE, msgspec.json.encode(known))
    return check_folder(folder, int8)


def load_from_hub(name: str, *, int8: bool = False, revision: str | None = None, cache_dir: Path | None = None) -> Path:
    """A local folder with the model `owner/name` of the Hugging Face hub; a path to a directory is returned as it is.

    Only the needed files are downloaded, into huggingface_hub's own cache, which also reads its own environment (HF_HUB_OFFLINE, HF_TOKEN).
    Raises NotFound for an unknown model or revision or a missing file, Unavailable if the hub cannot be reached and nothing is cached,
    InvalidRequest if the package is not installed or the name is none.
    """
    local = Path(name)
    if local.is_dir():
        return check_folder(local, int8)
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
    except ImportError as missing:
        raise InvalidRequest("models by name need the package huggingface_hub: install tartan[encoder]", model=name) from missing
    try:
        found = snapshot_download(name, revision=revision, cache_dir=cache_dir, allow_patterns=list(model_files(int8)))
    except HFValidationError as wrong:
        raise InvalidRequest("a model is a folder that exists or a hub name of the form owner/name", model=name) from wrong
    except (RepositoryNotFoundError, RevisionNotFoundError) as absent:
        raise NotFound("the hub has no such model or revision, or it is private", model=name, revision=revision) from absent
    except LocalEntryNotFoundError as offline:
        raise Unavailable("the hub cannot be reached and the model is not in the local cache", model=name) from offline
    except OSError as failed:  # the hub's HTTP errors and a full disk alike
        raise Unavailable("the model could not be downloaded from the hub", model=name, cause=type(failed).__name__) from failed
    return check_folder(Path(found), int8)


def _read_record(folder: Path) -> dict[str, _Fetched]:
    """What was fetched before; an absent or unreadable record means nothing was."""
    try:
        return msgspec.json.decode((folder / _RECORD_FILE).read_bytes(), type=dict[str, _Fetched])
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return {}


def _is_intact(path: Path, known: _Fetched) -> bool:
    try:
        data = path.read_bytes()
    except OSError:
        return False
    return len(data) == known.size_bytes and xxhash.xxh3_64_intdigest(data) == known.checksum


def _write_atomically(path: Path, data: bytes | memoryview) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
