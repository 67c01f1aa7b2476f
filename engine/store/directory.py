"""A directory as an object store: the embedded default, and what `file://` means.

An object is a file of the same name. It appears whole, by rename, from a staging folder; so readers see nothing or
everything, and what was acknowledged survives the death of the process and, with `fsync`, of the machine's power.
obstore's LocalStore is not used: it has no compare-and-swap and does not flush to the disk.

Writers exclude one another by flock on one of 64 files, chosen by the object's name, so neither locks nor dead owners pile
up: the kernel drops a lock with its process. Works for processes of one machine; over NFS only where flock does.

    {root}/{name}             the objects
    {root}/.tartan/stage/     files being written; what a killed writer left is removed after a day
    {root}/.tartan/locks/     00 to 3f

The etag is a hash of the content (xxh3, 128 bits), not times and inodes: two commits within one tick of the clock can
reuse an inode and leave an object of the same size.

Symbolic links below the root are neither objects nor folders: listings leave them out, and a name that leads through one is refused
(`store-denied`), so that nothing outside the root is read, written or deleted. The root may be one. Whoever can swap folders for links
while a call is under way has the rights of the process already.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeAlias, TypeVar

import xxhash

from engine.errors import Conflict, CorruptData, EngineError, InvalidRequest, NotFound, Unavailable
from engine.store.base import Buffer, Listed, Object, Range, check_folder, check_name, same_bytes

T = TypeVar("T")
_Lines: TypeAlias = list[tuple[str, os.stat_result | None]]
"""(name, status) of objects, (name + '/', None) of folders, in order."""
_OWN = ".tartan"
_N_LOCKS = 64
_N_THREADS = 16
_RANGES_PER_THREAD = 64
_STALE_S = 24 * 3600
_WRITE_BYTES = 1 << 30
"""Linux writes at most 2 GiB per call."""


class DirectoryStore:
    """The files below `root` as an ObjectStore. Creates nothing before the first write."""

    def __init__(self, root: str, *, fsync: bool = True) -> None:
        self._root = os.path.abspath(os.path.expanduser(root))
        self._fsync = fsync
        self._swept = False
        self._threads = ThreadPoolExecutor(_N_THREADS, thread_name_prefix="tartan-directory")

    async def get(self, name: str) -> Object:
        data = await self._run(name, partial(_read_file, self._path(name)))
        return Object(data, _etag(data))

    async def get_if_changed(self, name: str, etag: str) -> Object | None:
        """Reads the file each time: a hash of a manifest costs less than the call into a thread."""
        found = await self.get(name)
        return None if found.etag == etag else found

    async def get_ranges(self, name: str, ranges: Sequence[Range]) -> list[Buffer]:
        path = self._path(name)
        batches = [ranges[at : at + _RANGES_PER_THREAD] for at in range(0, len(ranges), _RANGES_PER_THREAD)]
        answers = await asyncio.gather(*(self._run(name, partial(_read_ranges, path, name, batch)) for batch in batches))
        return [data for batch in answers for data in batch]

    async def put_if_absent(self, name: str, data: Buffer) -> str:
        return await self._run(name, partial(self._create, name, data))

    async def replace_if_unchanged(self, name: str, data: Buffer, etag: str) -> str:
        return await self._run(name, partial(self._replace, name, data, etag))

    async def list(self, prefix: str, *, after: str | None = None) -> AsyncIterator[Listed]:
        """Folder by folder, in the order of whole names: 'a-b' comes before 'a/b', as in S3."""
        folder = check_folder(prefix[: prefix.rfind("/") + 1])
        waiting: _Lines = [(folder, None)]
        while waiting:
            name, status = waiting.pop()
            if status is None:
                lines = await self._run(name, partial(self._scan, name))
                waiting += [line for line in reversed(lines) if _may_hold(line[0], prefix, after)]
            else:
                yield Listed(name, status.st_size, status.st_mtime)

    async def list_folders(self, prefix: str) -> AsyncIterator[str]:
        """A folder counts only if an object lies in it: an interrupted write or delete may leave empty ones."""
        lines = await self._run(prefix, partial(self._scan, check_folder(prefix)))
        for folder, status in lines:
            if status is None and await self._run(folder, partial(self._holds_an_object, folder)):
                yield folder[len(prefix) : -1]

    async def delete(self, names: Sequence[str]) -> None:
        for name in names:
            await self._run(name, partial(self._remove, self._path(name)))

    async def local_path(self, name: str) -> str | None:
        path = self._path(name)
        return path if await self._run(name, partial(os.path.isfile, path)) else None

    async def _run(self, name: str, work: Callable[[], T]) -> T:
        def checked() -> T:
            self._refuse_links(name)
            return work()

        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, checked)
        except OSError as error:
            if isinstance(error, FileNotFoundError | NotADirectoryError) and self._is_root_a_file():
                raise Unavailable("the root of the store is not a folder", root=self._root) from error
            raise _translated(error, name) from error

    def _is_root_a_file(self) -> bool:
        """A root that is not there yet is an empty store; one that is something else is none."""
        return os.path.exists(self._root) and not os.path.isdir(self._root)

    def _refuse_links(self, name: str) -> None:
        """One lstat for each part of the name: about a microsecond."""
        path = self._root
        for part in name.rstrip("/").split("/") if name else ():
            path = os.path.join(path, part)
            if os.path.islink(path):
                raise PermissionError(errno.EPERM, "a symbolic link in the store is not followed")

    def _path(self, name: str) -> str:
        return os.path.join(self._root, check_name(name))

    def _create(self, name: str, data: Buffer) -> str:
        path = self._path(name)
        with self._staged(data) as staged, self._lock(name):
            try:
                held = _read_file(path)
            except FileNotFoundError:
                self._publish(staged, path)
            else:
                if not same_bytes(held, data):
                    raise Conflict("an object of this name holds other bytes", code="already-exists", name=name)
        return _etag(data)

    def _replace(self, name: str, data: Buffer, etag: str) -> str:
        path = self._path(name)
        with self._staged(data) as staged, self._lock(name):
            held = _etag(_read_file(path))
            if held != etag and held != _etag(data):
                raise Conflict("the object has changed", name=name, expected=etag, found=held)
            if held == etag:
                self._publish(staged, path)
        return _etag(data)

    @contextlib.contextmanager
    def _staged(self, data: Buffer) -> Iterator[str]:
        """A file with these bytes, safe on the disk, which is renamed away or removed afterwards."""
        folder = self._own_folder("stage")
        if not self._swept:
            self._swept = True
            _remove_stale(folder)
        path = os.path.join(folder, f"{os.getpid()}-{os.urandom(8).hex()}")
        try:
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            try:
                rest = memoryview(data).cast("B")
                while len(rest):
                    rest = rest[os.write(file, rest[:_WRITE_BYTES]) :]
                if self._fsync:
                    os.fsync(file)
            finally:
                os.close(file)
            yield path
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)

    @contextlib.contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        folder = self._own_folder("locks")
        number = xxhash.xxh3_64_intdigest(name.encode()) % _N_LOCKS
        file = os.open(os.path.join(folder, f"{number:02x}"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
        finally:
            os.close(file)

    def _own_folder(self, name: str) -> str:
        folder = os.path.join(self._root, _OWN, name)
        try:
            os.makedirs(folder, exist_ok=True)
        except (FileNotFoundError, NotADirectoryError) as error:
            if self._is_root_a_file():
                raise
            raise Unavailable("the root of the store cannot be created", root=self._root, cause=error.strerror) from error
        return folder

    def _publish(self, staged: str, path: str) -> None:
        """Rename into place. A folder may vanish under us, when somebody deletes its last object: make it again."""
        folder = os.path.dirname(path)
        for attempt in range(10):
            self._make_folder(folder)
            try:
                os.rename(staged, path)
                break
            except FileNotFoundError:
                if attempt == 9:
                    raise
        self._flush(folder)

    def _make_folder(self, folder: str) -> None:
        if os.path.isdir(folder):
            return
        parent = os.path.dirname(folder)
        self._make_folder(parent)
        with contextlib.suppress(FileExistsError, FileNotFoundError):  # not found: deleted again, the caller comes back
            os.mkdir(folder)
        self._flush(parent)

    def _flush(self, folder: str) -> None:
        """Make a rename or a new folder survive a power failure."""
        if not self._fsync:
            return
        try:
            file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            return
        try:
            os.fsync(file)
        finally:
            os.close(file)

    def _remove(self, path: str) -> None:
        try:
            os.unlink(path)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            if self._is_root_a_file():
                raise
        folder = os.path.dirname(path)
        with contextlib.suppress(OSError):
            while folder.startswith(self._root + os.sep):
                os.rmdir(folder)
                folder = os.path.dirname(folder)

    def _scan(self, folder: str) -> _Lines:
        try:
            return sorted(self._entries(folder), key=lambda line: line[0])
        except (FileNotFoundError, NotADirectoryError):
            if self._is_root_a_file():
                raise
            return []

    def _entries(self, folder: str) -> Iterator[tuple[str, os.stat_result | None]]:
        with os.scandir(os.path.join(self._root, folder)) as entries:
            for entry in entries:
                if entry.name.startswith(".") or entry.is_symlink():
                    continue
                if entry.is_dir():
                    yield f"{folder}{entry.name}/", None
                    continue
                with contextlib.suppress(FileNotFoundError):
                    yield folder + entry.name, entry.stat()

    def _holds_an_object(self, folder: str) -> bool:
        return any(status is not None or self._holds_an_object(name) for name, status in self._scan(folder))


def _may_hold(name: str, prefix: str, after: str | None) -> bool:
    """Whether a listing needs this object, or anything in this folder (whose name ends in a slash)."""
    if name.endswith("/"):
        return (name.startswith(prefix) or prefix.startswith(name)) and (after is None or name > after or after.startswith(name))
    return name.startswith(prefix) and (after is None or name > after)


def _read_file(path: str) -> bytes:
    file = _open(path)
    try:
        return _pread(file, os.fstat(file).st_size, 0)
    finally:
        os.close(file)


def _read_ranges(path: str, name: str, ranges: Sequence[Range]) -> list[Buffer]:
    file = _open(path)
    try:
        answers: list[Buffer] = []
        for start, end in ranges:
            data = _pread(file, end - start, start)
            if len(data) != end - start:
                raise CorruptData(
                    "the object is shorter than promised", code="malformed", object=name, range=(start, end), found=start + len(data)
                )
            answers.append(data)
        return answers
    finally:
        os.close(file)


def _open(path: str) -> int:
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except NotADirectoryError as error:
        raise FileNotFoundError(errno.ENOENT, "part of the name is a file", path) from error
    if os.path.isdir(path):
        os.close(file)
        raise FileNotFoundError(errno.ENOENT, "a folder, not an object", path)
    return file


def _pread(file: int, n_bytes: int, offset: int) -> bytes:
    data = os.pread(file, n_bytes, offset)
    if len(data) == n_bytes:
        return data
    parts = [data]  # beyond the end, or more than 2 GiB
    while parts[-1]:
        done = sum(map(len, parts))
        parts.append(os.pread(file, n_bytes - done, offset + done))
    return b"".join(parts)


def _etag(data: Buffer) -> str:
    return f"{xxhash.xxh3_128_hexdigest(data)}-{len(data):x}"


def _remove_stale(folder: str) -> None:
    oldest_s = time.time() - _STALE_S
    with os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):
                if entry.stat().st_mtime < oldest_s:
                    os.unlink(entry.path)


def _translated(error: OSError, name: str) -> EngineError:
    if isinstance(error, FileNotFoundError):
        return NotFound("no such object", name=name)
    if isinstance(error, NotADirectoryError | IsADirectoryError):
        return InvalidRequest("in a directory store a name cannot be both an object and a folder", name=name)
    if error.errno == errno.EROFS:
        return Unavailable("the file system is read-only", code="store-denied", name=name, refused="write")
    if isinstance(error, PermissionError):
        return Unavailable("the file system refused", code="store-denied", name=name, cause=error.strerror)
    return Unavailable("the file system failed", name=name, cause=error.strerror or str(error))
