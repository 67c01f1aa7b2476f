"""A recovery drill: is the backup of an index one that can be restored, how much would be lost, how long would it take?

    look      how old is the oldest change that no backup holds                     -> RPO
    back up   what the copy lacks (unless the backup is to be tried as it is)
    restore   beside the backups, under a name of its own; open it; first answer    -> RTO
    verify    every checksum and every reference of what was restored
    compare   the same queries to the index and to what was restored: the same ids, the same scores
    roll back a change in what was restored, and compare again
    clean up  what was restored is deleted; a record stays for doctor

Nothing but temporary pins is written to the index itself.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import msgspec
import numpy as np

from engine.config import SearchParams
from engine.errors import InvalidRequest, NotFound
from engine.format import names
from engine.index.clock import Clock, SystemClock
from engine.index.commit import load_head
from engine.index.indices import erase
from engine.index.reader import Reader, Snapshot
from engine.index.snapshots import held, manifest_at, rollback
from engine.index.verify import verify
from engine.searcher import Answer, Searcher
from engine.store.base import ObjectStore
from engine.transfer.backup import backup, restore, write_record
from engine.transfer.copying import Progress
from engine.transfer.sampling import sampled_queries

QUERY_TOKENS = 16
SCRATCH = "drill-"
"""Names of restored copies begin so; one that a killed drill left behind is deleted by the next drill after a day."""
SCRATCH_LIFE_S = 86_400.0


class DrillRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What a drill found. Times are unix seconds, durations seconds.

    rpo_s             age of the oldest change that the backup did not hold when the drill began; 0 if it held all, None if there was no backup.
                      At most this much would have been lost.
    rto_s             restoring, opening, first answer
    n_problems        of verification
    n_queries, n_different   compared, and answered otherwise by what was restored
    rolled_back       a change in what was restored could be undone
    """

    index: str
    generation: int
    started_s: float
    rpo_s: float | None
    backup_s: float | None
    restore_s: float
    first_answer_s: float
    rto_s: float
    verify_s: float
    n_documents: int
    n_bytes: int
    n_problems: int
    n_queries: int
    n_different: int
    rolled_back: bool

    @property
    def is_good(self) -> bool:
        return not self.n_problems and not self.n_different and self.rolled_back


async def drill(
    reader: Reader,
    index: str,
    backups: Reader,
    *,
    n_queries: int = 20,
    k: int = 10,
    as_is: bool = False,
    progress: Progress | None = None,
    clock: Clock | None = None,
) -> DrillRecord:
    """Try the recovery of an index from `backups`, where a backup is brought up to date first unless `as_is`.

    Raises NotFound if `as_is` and there is no backup, InvalidRequest for an index without documents, and what backup and restore raise.
    """
    clock = clock or SystemClock()
    started_s = clock.now_s()
    if not (await reader.snapshot(index)).n_documents:
        raise InvalidRequest("a drill needs documents to search", index=index, found=0)
    await _drop_leftovers(backups.store, clock)
    rpo_s = await _rpo_s(reader.store, index, backups.store, clock)
    backup_s = None
    if not as_is:
        began = time.monotonic()
        await backup(reader.store, index, backups.store, progress=progress, clock=clock)
        backup_s = time.monotonic() - began
    generation = (await load_head(backups.store, index)).manifest.generation
    scratch = SCRATCH + names.fresh_id()
    try:
        async with held(backups.store, index, generation, "drill") as copy:
            original = await _original(reader, index, backups, generation)
            queries = await sampled_queries(original, await original.live_ids(), n_queries, QUERY_TOKENS, seed=copy.generation)
            expected = await _answers(original, queries, k)
            began = time.monotonic()
            restored = await restore(backups.store, index, backups.store, scratch, generation=generation, progress=progress, clock=clock)
            restore_s = time.monotonic() - began
            fresh = Reader(backups.store, executor=backups.parts.executor)
            await _answers(await fresh.snapshot(scratch), queries[:1], k)
            rto_s = time.monotonic() - began
        began = time.monotonic()
        report = await verify(fresh, scratch, progress=progress)
        verify_s = time.monotonic() - began
        n_different = _n_different(expected, await _answers(await fresh.snapshot(scratch), queries, k))
        rolled_back = await _can_roll_back(fresh, scratch, queries, expected, k)
    finally:
        await erase(backups.store, scratch)
    record = DrillRecord(
        index=index,
        generation=generation,
        started_s=started_s,
        rpo_s=rpo_s,
        backup_s=backup_s,
        restore_s=restore_s,
        first_answer_s=rto_s - restore_s,
        rto_s=rto_s,
        verify_s=verify_s,
        n_documents=restored.n_documents,
        n_bytes=report.n_bytes,
        n_problems=len(report.problems),
        n_queries=len(queries),
        n_different=n_different,
        rolled_back=rolled_back,
    )
    await write_record(backups.store, "drills", index, record)
    return record


async def _rpo_s(store: ObjectStore, index: str, backups: ObjectStore, clock: Clock) -> float | None:
    """Age of the oldest change after the newest backup. If the generation that followed it is no longer kept, its age is not known, and
    the backup's own is returned: an upper bound."""
    head = await load_head(store, index)
    try:
        copy = (await load_head(backups, index)).manifest
    except NotFound:
        return None
    if copy.index_id != head.manifest.index_id:
        return None
    if copy.generation >= head.manifest.generation:
        return 0.0
    try:
        changed_s = (await manifest_at(store, index, copy.generation + 1, head=head)).created_s
    except NotFound:
        changed_s = copy.created_s
    return max(0.0, clock.now_s() - changed_s)


async def _original(reader: Reader, index: str, backups: Reader, generation: int) -> Snapshot:
    """What the restored copy is compared with: the index itself, or, where that keeps the generation no longer, the backup."""
    try:
        return await reader.snapshot(index, generation=generation)
    except NotFound:
        return await backups.snapshot(index, generation=generation)


async def _answers(snapshot: Snapshot, queries: Sequence[np.ndarray], k: int) -> list[Answer]:
    searcher = Searcher(snapshot.reader)
    found = []
    for query in queries:
        found += await searcher.search(snapshot, [query], SearchParams(k=k), mode="warm")
    return found


def _n_different(expected: Sequence[Answer], found: Sequence[Answer]) -> int:
    """Answers that are not the same to the last bit: the same bytes on the same machine give the same sums."""
    pairs = zip(expected, found, strict=True)
    return sum(
        not (np.array_equal(one.ids, other.ids) and np.array_equal(one.scores, other.scores) and one.rows == other.rows)
        for one, other in pairs
    )


async def _can_roll_back(reader: Reader, scratch: str, queries: Sequence[np.ndarray], expected: Sequence[Answer], k: int) -> bool:
    """Delete the best hit of every query, roll back, ask again."""
    before = (await reader.snapshot(scratch)).manifest
    await reader.writer(scratch).delete(np.unique([answer.ids[0] for answer in expected if len(answer.ids)]))
    after = (await rollback(reader.store, scratch, before.generation)).manifest
    again = await _answers(await reader.snapshot(scratch), queries, k)
    return after.generation > before.generation and not _n_different(expected, again)


async def _drop_leftovers(store: ObjectStore, clock: Clock) -> None:
    """Copies that killed drills have left."""
    leftovers = [
        folder async for folder in store.list_folders("") if folder.startswith(SCRATCH) and names.is_id(folder.removeprefix(SCRATCH))
    ]
    for folder in leftovers:
        modified = [listed.modified_s async for listed in store.list(names.of_index(folder))]
        if clock.now_s() - max(modified, default=0.0) > SCRATCH_LIFE_S:
            await erase(store, folder)
