"""Real stores: `s3://`, `memory://` through obstore, `file://` and plain paths through directory.py. The only file that names obstore.

Opening makes no request. Errors of obstore become ours here, once. Retrying lives here too: obstore's own retries are
switched off, because it repeats a write whose answer was lost and then reports a conflict with ourselves, and because one
loop with one budget is easier to bound. What a failed write really did is established by reading back.

Two facts about obstore 0.12 that shape the code: its get_ranges keeps only 10 requests in flight, so every range is its own
get_range_async; and a 409 (somebody is writing at this moment, try again) on a conditional write arrives as AlreadyExistsError
although nothing was written (apache/arrow-rs-object-store pull request 852).
"""

from __future__ import annotations

import asyncio
import random
import re
import time
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal, TypeVar
from urllib.parse import unquote, urlsplit

import msgspec
import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    NotModifiedError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)
from obstore.store import MemoryStore, S3Store

from engine.errors import Conflict, CorruptData, EngineError, InvalidRequest, LimitExceeded, NotFound, Unavailable
from engine.store.base import Buffer, Listed, Object, ObjectStore, Range, check_folder, check_name, same_bytes
from engine.store.directory import DirectoryStore

T = TypeVar("T")
MAX_PUT_BYTES = 5 * 1024**3
"""S3's limit for one PUT. Conditional writes are single PUTs."""
_PAGE = 1000
_TRANSIENT_STATUSES = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
_TRANSIENT_CODES = ("RequestTimeout", "SlowDown")
_DENIED = ("AccessDenied", "ExpiredToken", "InvalidToken", "InvalidAccessKeyId", "AuthorizationHeaderMalformed", "NoSuchBucket", "169.254.")
"""S3 error codes that no retry cures; 169.254: no credentials were found, so the instance's metadata service was asked, in vain."""
_STATUS = re.compile(r"status code: (\d{3})")


@dataclass(frozen=True, slots=True)
class StoreOptions:
    """How to reach a store and how long to try. Secrets are not shown by repr.

    What is None is left to obstore, which reads the usual AWS_* variables and asks the container's or instance's role.

    endpoint             URL of an S3-compatible server; http:// is allowed only if it is written here
    profile              AWS profile; needs the extra `aws` (boto3 finds and renews the credentials)
    credential_provider  called by obstore for credentials when they expire (see obstore.auth)
    max_in_flight        requests in flight at once per event loop
    attempts             tries of one request, the first included
    retry_budget_s       no further try begins after this long
    timeout_s            of one try, plus its bytes at min_bytes_per_s
    fsync                directories: survive a power failure, not only the death of the process
    """

    endpoint: str | None = None
    region: str | None = None
    access_key_id: str | None = field(default=None, repr=False)
    secret_access_key: str | None = field(default=None, repr=False)
    session_token: str | None = field(default=None, repr=False)
    profile: str | None = None
    credential_provider: Callable[[], Any] | None = field(default=None, repr=False)
    max_in_flight: int = 256
    attempts: int = 6
    retry_budget_s: float = 20.0
    first_backoff_s: float = 0.05
    max_backoff_s: float = 2.0
    timeout_s: float = 10.0
    min_bytes_per_s: float = 1e6
    fsync: bool = True


DEFAULT_OPTIONS = StoreOptions()


def open_store(url: str, options: StoreOptions = DEFAULT_OPTIONS) -> ObjectStore:
    """The store behind `url`: s3://bucket/prefix, file:///folder or a plain path, memory:// (a new, empty one).

    Makes no request and creates nothing. Raises InvalidRequest for an unknown URL, Unavailable (`store-denied`) for an AWS
    profile without credentials.
    """
    parts = urlsplit(url)
    if parts.scheme == "s3" and parts.netloc:
        return _RemoteStore(_s3(parts.netloc, parts.path.strip("/"), options), options)
    if parts.scheme == "memory" and not parts.path.strip("/"):
        return _RemoteStore(MemoryStore(), options)
    if parts.scheme == "file" and parts.netloc in ("", "localhost") and parts.path:
        return DirectoryStore(unquote(parts.path), fsync=options.fsync)
    if url and "://" not in url:
        return DirectoryStore(url, fsync=options.fsync)
    raise InvalidRequest("a store is s3://bucket/prefix, file:///folder, a path, or memory://", url=url)


async def signed_address(store: ObjectStore, method: Literal["GET", "PUT"], name: str, life_s: float) -> str:
    """A URL by which anyone who has it may do one thing to one object for a while, without credentials of their own. No request.

    Raises InvalidRequest for a store that is not S3: only S3 can be spoken to by strangers.
    """
    while (inner := getattr(store, "inner", None)) is not None:
        store = inner
    remote = getattr(store, "_store", None)
    if not isinstance(remote, S3Store):
        raise InvalidRequest("this store has no addresses that can be given away; only s3:// has", method=method)
    try:
        return await obstore.sign_async(remote, method, check_name(name), timedelta(seconds=life_s))
    except (BaseError, FileNotFoundError) as error:
        raise _translated(error, name) from error


async def probe_conditional_writes(store: ObjectStore, prefix: str) -> None:
    """Refuse a store that ignores or misunderstands conditional writes: Unavailable with code `store-unsuitable`.

    `prefix` is a folder of its own ('' or ending in a slash). Costs seven requests and leaves nothing behind.
    It proves that conditions are looked at, not that two racing writers are told apart.
    """
    name = f"{check_folder(prefix)}probe-{random.getrandbits(64):016x}"
    try:
        first = await store.put_if_absent(name, b"first")
        await _must_conflict(store.put_if_absent(name, b"other"), "creates an object that exists already", name)
        try:
            await store.replace_if_unchanged(name, b"second", first)
        except (Conflict, NotFound, Unavailable) as error:
            if error.code == "store-denied":
                raise
            raise _unsuitable("does not replace an unchanged object", name) from error
        await _must_conflict(store.replace_if_unchanged(name, b"third", first), "replaces an object that has changed", name)
        if not same_bytes((await store.get(name)).data, b"second"):
            raise _unsuitable("lost a conditional write", name)
    finally:
        await store.delete([name])


async def _must_conflict(attempt: Awaitable[object], fault: str, name: str) -> None:
    try:
        await attempt
    except Conflict:
        return
    raise _unsuitable(fault, name)


def _unsuitable(fault: str, name: str) -> Unavailable:
    return Unavailable(f"the store {fault}; tartan needs If-None-Match and If-Match on PUT", code="store-unsuitable", name=name)


def _s3(bucket: str, prefix: str, options: StoreOptions) -> S3Store:
    given = {
        "endpoint": options.endpoint,
        "region": options.region,
        "access_key_id": options.access_key_id,
        "secret_access_key": options.secret_access_key,
        "session_token": options.session_token,
    }
    config: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    client: dict[str, Any] = {"connect_timeout": "3s", "timeout": "1h"}  # _try limits each request by its size instead
    if options.endpoint is not None:
        config["virtual_hosted_style_request"] = False
        client["allow_http"] = options.endpoint.startswith("http://")
    if options.credential_provider is not None or options.profile is not None:
        config["credential_provider"] = options.credential_provider or _profile_credentials(options.profile)
    never: Any = {"max_retries": 0, "retry_timeout": timedelta(seconds=60)}
    return S3Store(bucket, prefix=prefix or None, client_options=client, retry_config=never, **config)  # type: ignore[arg-type]


def _profile_credentials(profile: str | None) -> Callable[[], Any]:
    """boto3 takes a quarter of a second to import, so only who names a profile pays for it."""
    try:
        import boto3
        from botocore.exceptions import BotoCoreError
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError as error:
        raise InvalidRequest("an AWS profile needs the extra: pip install tartan[aws]", profile=profile) from error
    try:
        return Boto3CredentialProvider(boto3.Session(profile_name=profile))
    except (BotoCoreError, ValueError) as error:
        raise Unavailable("the AWS profile gives no credentials", code="store-denied", profile=profile) from error


class _Passing(Unavailable):
    """A failure that may pass: throttling, 5xx, a connection that broke, no answer in time."""


class _Patience:
    """The retry budget of one operation: bounded tries, bounded time, full jitter (so that a crowd does not return as one)."""

    def __init__(self, options: StoreOptions) -> None:
        self._options = options
        self._n_failed = 0
        self._deadline = time.monotonic() + options.retry_budget_s

    async def after(self, failure: EngineError) -> None:
        """Wait before the next try, or raise `failure` if it is final or the budget is spent."""
        self._n_failed += 1
        final = self._n_failed >= self._options.attempts or time.monotonic() >= self._deadline
        if final or not isinstance(failure, _Passing):
            raise failure
        ceiling = min(self._options.max_backoff_s, self._options.first_backoff_s * 2 ** (self._n_failed - 1))
        await asyncio.sleep(random.uniform(0, ceiling))


class _RemoteStore:
    """An obstore store with our promises, errors, retries and bound on requests in flight."""

    def __init__(self, store: S3Store | MemoryStore, options: StoreOptions) -> None:
        self._store = store
        self._options = options
        self._gates: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = weakref.WeakKeyDictionary()

    async def get(self, name: str) -> Object:
        found = await self._read(check_name(name), {})
        assert found is not None
        return found

    async def get_if_changed(self, name: str, etag: str) -> Object | None:
        return await self._read(check_name(name), {"if_none_match": etag})

    async def _read(self, name: str, conditions: obstore.GetOptions) -> Object | None:
        patience = _Patience(self._options)
        while True:
            try:
                return await self._read_once(name, conditions)
            except NotModifiedError:
                return None
            except Unavailable as failure:
                await patience.after(failure)

    async def _read_once(self, name: str, conditions: obstore.GetOptions) -> Object:
        async with self._gate():
            answer = await self._try(self._store.get_async(name, options=conditions), name)
            meta = answer.meta
            data = memoryview(await self._try(answer.bytes_async(), name, meta["size"]))
        if len(data) != meta["size"]:
            raise _Passing("the store cut its answer short", name=name, expected=meta["size"], found=len(data))
        return Object(data, meta["e_tag"] or "")

    async def get_ranges(self, name: str, ranges: Sequence[Range]) -> list[Buffer]:
        check_name(name)
        wanted = [at for at in range(len(ranges)) if ranges[at][0] != ranges[at][1]]
        answers: list[Buffer] = [b""] * len(ranges)
        if len(wanted) == 1:
            answers[wanted[0]] = await self._get_range(name, *ranges[wanted[0]])
            return answers
        parts = [asyncio.ensure_future(self._get_range(name, *ranges[at])) for at in wanted]
        try:
            for at, data in zip(wanted, await asyncio.gather(*parts), strict=True):
                answers[at] = data
        finally:
            for part in parts:  # one failure fails all: do not let the others go on alone
                part.cancel()
        return answers

    async def _get_range(self, name: str, start: int, end: int) -> Buffer:
        patience = _Patience(self._options)
        while True:
            try:
                async with self._gate():
                    data = memoryview(await self._try(self._store.get_range_async(name, start=start, end=end), name, end - start))
                break
            except Unavailable as failure:
                await patience.after(failure)
        if len(data) != end - start:
            facts = {"object": name, "range": (start, end), "found": start + len(data)}
            raise CorruptData("the object is shorter than promised", code="malformed", **facts)
        return data

    async def put_if_absent(self, name: str, data: Buffer) -> str:
        check_name(name)
        patience = _Patience(self._options)
        while True:
            try:
                return await self._put(name, data, "create")
            except (AlreadyExistsError, Unavailable) as error:
                failure = _write_failure(error, name)
            held = await self._read_back(name, data)
            if held is None:
                await patience.after(failure)
            elif held.is_ours:
                return held.etag
            else:
                raise Conflict("an object of this name holds other bytes", code="already-exists", name=name) from failure

    async def replace_if_unchanged(self, name: str, data: Buffer, etag: str) -> str:
        check_name(name)
        patience = _Patience(self._options)
        while True:
            try:
                return await self._put(name, data, {"e_tag": etag})
            except (AlreadyExistsError, PreconditionError, Unavailable) as error:
                failure = _write_failure(error, name)
            held = await self._read_back(name, data)
            if held is None:
                raise NotFound("no object to replace", name=name) from failure
            if held.is_ours:
                return held.etag
            if held.etag != etag:
                raise Conflict("the object has changed", name=name, expected=etag, found=held.etag) from failure
            await patience.after(failure)

    async def _put(self, name: str, data: Buffer, mode: Literal["create"] | obstore.UpdateVersion) -> str:
        """One try. AlreadyExistsError and PreconditionError pass through: what they mean is known only after reading back."""
        if len(data) > MAX_PUT_BYTES:
            raise LimitExceeded("an object is at most 5 GiB", name=name, size_bytes=len(data), limit_bytes=MAX_PUT_BYTES)
        flat = memoryview(data).cast("B")
        async with self._gate():
            answer = await self._try(self._store.put_async(name, flat, mode=mode, use_multipart=False), name, len(flat))
        return answer["e_tag"] or ""

    async def _read_back(self, name: str, data: Buffer) -> _Held | None:
        """What the object holds after a write that was refused or went unanswered; no body travels if the size differs."""
        patience = _Patience(self._options)
        while True:
            try:
                async with self._gate():
                    answer = await self._try(self._store.get_async(name), name)
                    meta = answer.meta
                    if meta["size"] != len(data):
                        return _Held(meta["e_tag"] or "", is_ours=False)
                    found = await self._try(answer.bytes_async(), name, meta["size"])
                if len(found) != meta["size"]:
                    raise _Passing("the store cut its answer short", name=name, expected=meta["size"], found=len(found))
                return _Held(meta["e_tag"] or "", is_ours=same_bytes(memoryview(found), data))
            except NotFound:
                return None
            except Unavailable as failure:
                failure.details["outcome"] = "unknown"
                await patience.after(failure)

    async def list(self, prefix: str, *, after: str | None = None) -> AsyncIterator[Listed]:
        folder = prefix[: prefix.rfind("/") + 1]
        check_folder(folder)
        patience = _Patience(self._options)
        while True:
            try:
                async for page in self._pages(folder, after):
                    for meta in page:
                        after = meta["path"]
                        if after.startswith(prefix):
                            yield Listed(after, meta["size"], meta["last_modified"].timestamp())
                return
            except Unavailable as failure:  # goes on after the last name that arrived
                await patience.after(failure)

    async def _pages(self, folder: str, after: str | None) -> AsyncIterator[Sequence[obstore.ObjectMeta]]:
        stream = self._store.list(folder or None, offset=after, chunk_size=_PAGE)
        while True:
            try:
                yield await self._try(stream.__anext__(), folder)
            except StopAsyncIteration:
                return

    async def list_folders(self, prefix: str) -> AsyncIterator[str]:
        check_folder(prefix)
        patience = _Patience(self._options)
        while True:
            try:
                listing = await self._try(self._store.list_with_delimiter_async(prefix or None), prefix)
                break
            except Unavailable as failure:
                await patience.after(failure)
        for folder in sorted(listing["common_prefixes"]):
            yield folder.rstrip("/").rpartition("/")[2]

    async def delete(self, names: Sequence[str]) -> None:
        for at in range(0, len(names), _PAGE):
            await self._delete_page([check_name(name) for name in names[at : at + _PAGE]])

    async def _delete_page(self, names: Sequence[str]) -> None:
        patience = _Patience(self._options)
        while True:
            try:
                return await self._try(self._store.delete_async(names), names[0])
            except NotFound:  # memory:// only: it stops at the first absent name
                if len(names) == 1:
                    return None
                for name in names:
                    await self._delete_page([name])
                return None
            except Unavailable as failure:
                await patience.after(_noting_refusal(failure))

    async def local_path(self, name: str) -> str | None:
        return None

    def _gate(self) -> asyncio.Semaphore:
        """A semaphore belongs to one event loop; a store may serve several (a CLI, threads, tests)."""
        loop = asyncio.get_running_loop()
        gate = self._gates.get(loop)
        if gate is None:
            gate = self._gates[loop] = asyncio.Semaphore(self._options.max_in_flight)
        return gate

    async def _try(self, request: Awaitable[T], name: str, n_bytes: int = 0) -> T:
        """Await one request within its time; what obstore raises becomes ours, except the three that callers decide about."""
        try:
            async with asyncio.timeout(self._options.timeout_s + n_bytes / self._options.min_bytes_per_s):
                return await request
        except (NotModifiedError, AlreadyExistsError, PreconditionError):
            raise
        except (BaseError, FileNotFoundError, TimeoutError) as error:
            raise _translated(error, name) from error


class _Held(msgspec.Struct, frozen=True):
    """What an object was found to hold after a write of ours that failed."""

    etag: str
    is_ours: bool


def _write_failure(error: Exception, name: str) -> Unavailable:
    """A conditional write that was refused although nothing stands in its way (S3's 409), or that went unanswered."""
    if isinstance(error, Unavailable):
        if not isinstance(error, _Passing):
            raise _noting_refusal(error)
        error.details["outcome"] = "not written"
        return error
    failure = _Passing("the store keeps refusing a conditional write that should succeed", name=name)
    failure.__cause__ = error
    return failure


def _noting_refusal(failure: EngineError) -> EngineError:
    """Say in the details if it was the right to write that was lacking, and not, for all we know, the right to read as well."""
    if failure.code == "store-denied" and "AccessDenied" in str(failure.__cause__):
        failure.details["refused"] = "write"
    return failure


def _translated(error: Exception, name: str) -> EngineError:
    """The engine's error for obstore's. obstore gives the HTTP status of most failures only as text."""
    text = str(error)
    first_line = text.partition("\n")[0]
    match = _STATUS.search(text)
    status = int(match[1]) if match else None
    if isinstance(error, TimeoutError):
        return _Passing("the store did not answer in time", name=name)
    if isinstance(error, PermissionDeniedError | UnauthenticatedError) or any(code in text for code in _DENIED):
        message = "the store refused our credentials or does not know the bucket"
        return Unavailable(message, code="store-denied", name=name, cause=first_line)
    if isinstance(error, FileNotFoundError):
        return NotFound("no such object", name=name)
    if status == 416 or "Invalid range" in text:
        return CorruptData("the object is shorter than promised", code="malformed", object=name, cause=first_line)
    transient = status is None or status in _TRANSIENT_STATUSES or any(code in text for code in _TRANSIENT_CODES)
    if "redirect without LOCATION" in text:  # S3 in another region than the one we sign for
        transient = False
    kind = _Passing if transient else Unavailable
    return kind("the store failed", name=name, status=status, cause=first_line)
