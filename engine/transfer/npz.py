"""An .npz archive as a source of documents: its two arrays, found in place or unpacked into a temporary file.

An archive comes from anybody, so nothing that it says of itself is believed: members have a limit of size, stored ones lie where their
own header says, checksums are compared.
"""

from __future__ import annotations

import io
import shutil
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Collection, Sequence

from engine.errors import InvalidRequest, LimitExceeded
from engine.transfer.arrays import ArraySource, source_of
from engine.transfer.content import WHOLE_FINGERPRINT_BYTES, AsFile, Content, FileContent, PartContent, chunks
from engine.transfer.npy import NpyArray


def open_npz(
    content: Content,
    *,
    fields: Content | None = None,
    keys: Content | None = None,
    without: Collection[str] = (),
    max_member_bytes: int | None = None,
) -> ArraySource:
    """As open_npy, both arrays in one archive. A compressed member is unpacked into a temporary file first; checksums are compared.

    max_member_bytes  of a member once unpacked: an archive of a kilobyte can stand for gigabytes. LimitExceeded beyond it
    """
    try:
        archive = zipfile.ZipFile(io.BufferedReader(AsFile(content)))
    except _ZIP_ERRORS as error:
        raise InvalidRequest("the .npz archive is damaged or cut short", file=content.label, found=str(error)[:140]) from error
    with archive:
        tokens, lengths = (_member(content, archive, names, max_member_bytes) for names in (_TOKEN_MEMBERS, _LENGTH_MEMBERS))
        return source_of(NpyArray.open(tokens), NpyArray.open(lengths), fields, keys, without)


def _lzma_errors() -> tuple[type[Exception], ...]:
    """None where Python was built without lzma: then zipfile refuses such members."""
    try:
        from lzma import LZMAError
    except ImportError:
        return ()
    return (LZMAError,)


_ZIP_ERRORS: tuple[type[Exception], ...] = (
    zipfile.BadZipFile,
    EOFError,
    RuntimeError,
    ValueError,
    OverflowError,
    struct.error,
    zlib.error,
    *_lzma_errors(),
)
"""What zipfile raises over a damaged archive; NotImplementedError, for an unknown method or version, is a RuntimeError."""
_TOKEN_MEMBERS = ("tokens", "embeddings")
_LENGTH_MEMBERS = ("doclens", "lengths")


def _member(content: Content, archive: zipfile.ZipFile, names: Sequence[str], max_bytes: int | None) -> Content:
    """The bytes of the first member of one of these names: in place if it is stored, from a temporary file if it is compressed."""
    found = next((info for name in names for info in archive.infolist() if info.filename == f"{name}.npy"), None)
    if found is None:
        there = [info.filename.removesuffix(".npy") for info in archive.infolist()][:8]
        raise InvalidRequest("the .npz archive lacks an array", file=content.label, expected=" or ".join(names), found=there)
    label = f"{content.label}:{found.filename}"
    if max_bytes is not None and found.file_size > max_bytes:
        raise LimitExceeded("a member of the .npz archive is too large", file=label, limit_bytes=max_bytes, size_bytes=found.file_size)
    if found.compress_type == zipfile.ZIP_STORED:
        return _stored_member(content, archive, found, label)
    with tempfile.NamedTemporaryFile(prefix="tartan-") as unpacked:
        try:
            with archive.open(found) as member:
                shutil.copyfileobj(member, unpacked, 1 << 20)
            unpacked.flush()
        except _ZIP_ERRORS as error:
            raise InvalidRequest("a member of the .npz archive cannot be unpacked", file=label, found=str(error)[:140]) from error
        except OSError as error:  # bzip2's complaint has no number, the file system's has
            if error.errno is None:
                raise InvalidRequest("a member of the .npz archive cannot be unpacked", file=label, found=str(error)[:140]) from error
            raise LimitExceeded(
                "a member of the .npz archive does not fit into the temporary folder", file=label, found=error.strerror
            ) from error
        return FileContent(unpacked.name, label=label)  # keeps it open; its name goes now, its bytes with the source


def _stored_member(content: Content, archive: zipfile.ZipFile, found: zipfile.ZipInfo, label: str) -> Content:
    """A member in its place, after its checksum was compared (one more pass, unless it is too large to be read whole)."""
    try:
        archive.open(found).close()  # its own header must be there and name the same member
    except _ZIP_ERRORS as error:
        raise InvalidRequest("the .npz archive is damaged or cut short", file=label, found=str(error)[:140]) from error
    header = bytes(content.read([(found.header_offset, found.header_offset + 30)])[0])
    name_bytes, extra_bytes = struct.unpack("<HH", header[26:30])
    start = found.header_offset + 30 + name_bytes + extra_bytes
    if start + found.file_size > content.size_bytes or found.compress_size != found.file_size:
        raise InvalidRequest(
            "the .npz archive is damaged or cut short", file=label, expected=start + found.file_size, found=content.size_bytes
        )
    part = PartContent(content, start, found.file_size, label)
    if part.size_bytes <= WHOLE_FINGERPRINT_BYTES:
        checksum = 0
        for chunk in chunks(part):
            checksum = zlib.crc32(chunk, checksum)
        if checksum != found.CRC:
            raise InvalidRequest("a member of the .npz archive is damaged", file=label, expected=found.CRC, found=checksum)
    return part
