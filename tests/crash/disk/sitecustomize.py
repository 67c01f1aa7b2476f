"""A file system in a mood, for any Python process that has this folder on its path: Python imports `sitecustomize` when it starts.

CRASH_DISK_ROOT   what lies below it is concerned, nothing else
CRASH_DISK_MOOD   a file that says "well", "full", "read-only" or "forbidden"; it may change at any time

The calls fail as the kernel lets them fail (ENOSPC, EROFS, EACCES). A real full or read-only file system needs mount, which tests may not do.
"""

import errno
import os
from pathlib import Path

_ROOT, _MOOD = os.environ.get("CRASH_DISK_ROOT", ""), os.environ.get("CRASH_DISK_MOOD", "")
_CHANGING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def _mood() -> str:
    return Path(_MOOD).read_text().strip()


def _is_below(path: object) -> bool:
    return str(path).startswith(_ROOT)


def _fail(number: int, path: object) -> None:
    raise OSError(number, os.strerror(number), str(path))


def _install() -> None:
    write, open_file = os.write, os.open

    def moody_write(file: int, data: bytes) -> int:
        if _mood() == "full" and _is_below(os.readlink(f"/proc/self/fd/{file}")):
            _fail(errno.ENOSPC, "")
        return write(file, data)

    def moody_open(path: str, flags: int, mode: int = 0o777, **more: int) -> int:
        if _is_below(path):
            mood = _mood()
            if mood == "forbidden":
                _fail(errno.EACCES, path)
            if mood == "read-only" and flags & _CHANGING:
                _fail(errno.EROFS, path)
        return open_file(path, flags, mode, **more)

    def guarded(call):  # type: ignore[no-untyped-def]
        def moody(path, *arguments, **more):  # type: ignore[no-untyped-def]
            if _is_below(path) and (mood := _mood()) in ("read-only", "forbidden"):
                _fail(errno.EROFS if mood == "read-only" else errno.EACCES, path)
            return call(path, *arguments, **more)

        return moody

    os.write, os.open = moody_write, moody_open
    for name in ("rename", "unlink", "mkdir", "rmdir"):
        setattr(os, name, guarded(getattr(os, name)))


if _ROOT:
    _install()
