"""Documents that a client put into the store itself, by a presigned address, and commits by reference: exactly once, however often it asks.

    uploads/{id}/data      written by the client, as often as it likes before the commit
    uploads/{id}/claim     written before the first attempt to commit: the generation in force then
    uploads/{id}/receipt   written after the commit: which documents it made; then data is deleted

The generation that a commit makes says in its cause which upload it added. So an attempt that finds a claim of an earlier one looks through
the generations since the claim, and so does every attempt that meets another commit on its way: whoever moves CURRENT has seen that no
generation before it holds the upload. If some of those generations have been collected meanwhile nobody can know, and it is refused.
All three objects are forgotten a day after they were written (sweep.py). What data means is the caller's business.
"""

from __future__ import annotations

import asyncio
import re

import msgspec

from engine.errors import Conflict, NotFound
from engine.format import names
from engine.format.manifest import Manifest, decode_manifest
from engine.format.markers import Upload, read_marker, write_marker
from engine.index.commit import Draft, commit
from engine.index.operations import Add
from engine.index.reader import Reader
from engine.index.turns import in_turns
from engine.store.base import ObjectStore

_MANIFESTS_AT_ONCE = 32


class Found(msgspec.Struct, frozen=True):
    """What there is of an upload: the size of its data (None: not there, or deleted after the commit), and its receipt."""

    size_bytes: int | None
    receipt: Upload | None


async def find(store: ObjectStore, index: str, upload_id: str) -> Found:
    """One listing, and one GET if it was committed. Nothing of the data is read."""
    prefix = names.upload(index, upload_id, "data").removesuffix("data")
    sizes = {listed.name: listed.size_bytes async for listed in store.list(prefix)}
    receipt_name = names.upload(index, upload_id, "receipt")
    receipt = None
    if receipt_name in sizes:
        receipt = read_marker((await store.get(receipt_name)).data, Upload, name=receipt_name)
    return Found(sizes.get(names.upload(index, upload_id, "data")), receipt)


async def commit_upload(reader: Reader, index: str, upload_id: str, add: Add) -> Upload:
    """Add the documents of an upload in one generation, unless one has them already; returns the receipt, which is then in the store.

    Raises NotFound (`object-not-found`) if the upload belongs to an index of this name that was deleted, Conflict if an earlier attempt's
    fate cannot be found out any more, and what commits raise. Cost: that of an add, and three requests.
    """
    store, clock = reader.store, reader.clock
    claim = await _claim(reader, index, upload_id)
    made: Upload | None = None
    searched = claim.generation

    async def apply(manifest: Manifest) -> Draft | None:
        nonlocal made, searched
        if manifest.index_id != claim.index_id:
            raise NotFound("the upload belongs to an index that was deleted", index=index, upload=upload_id)
        made = made or await _made_since(store, index, upload_id, searched, manifest)
        if made is not None:
            return None
        searched = max(searched, manifest.generation)
        draft = Draft(manifest)
        await add.apply(draft, index, reader.parts)
        return draft

    began_s = clock.monotonic_s()
    head = await commit(store, index, apply, cause=_cause(len(add), upload_id), head=reader.known_head(index), clock=clock)
    reader.remember_head(index, head, asked_s=began_s)
    if made is None:
        ids = add.added.ids
        made = _receipt(head.manifest, int(ids[0]), int(ids[-1]))
    await _settle(store, index, upload_id, made)
    return made


async def _claim(reader: Reader, index: str, upload_id: str) -> Upload:
    """The claim of the first attempt, which may be this one."""
    name = names.upload(index, upload_id, "claim")
    manifest = (await reader.head(index)).manifest
    claim = Upload(created_s=reader.clock.now_s(), index_id=manifest.index_id, generation=manifest.generation)
    try:
        await reader.store.put_if_absent(name, write_marker(claim))
    except Conflict:
        claim = read_marker((await reader.store.get(name)).data, Upload, name=name)
    return claim


async def _settle(store: ObjectStore, index: str, upload_id: str, receipt: Upload) -> None:
    try:
        await store.put_if_absent(names.upload(index, upload_id, "receipt"), write_marker(receipt))
    except Conflict:
        pass  # another attempt said the same
    await store.delete([names.upload(index, upload_id, "data")])


async def _made_since(store: ObjectStore, index: str, upload_id: str, generation: int, manifest: Manifest) -> Upload | None:
    """The receipt of this upload if a generation after `generation`, up to that of `manifest`, made it."""
    between = range(generation + 1, manifest.generation)
    for asked in in_turns(between, _MANIFESTS_AT_ONCE):
        for found in await asyncio.gather(*(_archived(store, index, manifest.index_id, number, upload_id) for number in asked)):
            if (receipt := _receipt_in(found, upload_id)) is not None:
                return receipt
    return _receipt_in(manifest, upload_id) if manifest.generation > generation else None


async def _archived(store: ObjectStore, index: str, index_id: str, generation: int, upload_id: str) -> Manifest:
    name = names.manifest(index, index_id, generation)
    try:
        return decode_manifest((await store.get(name)).data, name=name)
    except NotFound as error:
        message = "an earlier attempt to commit this upload may have succeeded, and the history that would tell has been collected: look for its documents"
        raise Conflict(message, index=index, upload=upload_id, generation=generation) from error


def _cause(n_documents: int, upload_id: str) -> str:
    return f"add {n_documents} documents (upload {upload_id})"


def _receipt_in(manifest: Manifest, upload_id: str) -> Upload | None:
    matched = re.fullmatch(rf"add (\d+) documents \(upload {upload_id}\)", manifest.cause)
    return _receipt(manifest, manifest.next_id - int(matched[1]), manifest.next_id - 1) if matched else None


def _receipt(manifest: Manifest, first_id: int, last_id: int) -> Upload:
    """The same bytes whoever writes it: both attempts may."""
    return Upload(
        created_s=manifest.created_s, index_id=manifest.index_id, generation=manifest.generation, first_id=first_id, last_id=last_id
    )
