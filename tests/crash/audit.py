"""Everything read back and held against the journals.

A call is *certain* if it was acknowledged before the snapshot was opened, *possible* if it had begun before the snapshot was there and
was not refused. What is certain must show, whole; what shows must be possible; and a call shows whole or not at all.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from crash.actors import BUILT, vectors_of
from crash.journal import REFUSED, Call, Told, read_all
from engine.index.reader import Reader, Snapshot
from engine.index.verify import verify


@dataclass(frozen=True)
class Row:
    """A document as it was found."""

    id: int
    revision: int


async def audit(reader: Reader, journals: Path, *, final: bool = False) -> list[str]:
    """What is wrong with the indices, one line each. final: read vectors and every kept generation, too."""
    wrong: list[str] = []
    for index in ("a", BUILT):
        opened_s = time.monotonic()
        snapshot = await reader.snapshot(index)
        rows, twice = await _rows(snapshot)
        told = read_all(journals)
        wrong += twice + told.wrong + compare(index, rows, told, opened_s)
        if final:
            wrong += _ids_are_unique(index, told) + await _vectors_are_right(snapshot)
            wrong += (await verify(reader, index, all_generations=True)).problems
    return wrong


async def _rows(snapshot: Snapshot) -> tuple[dict[str, Row], list[str]]:
    found = [row for row in await snapshot.rows(await snapshot.live_ids()) if row is not None]
    labels = Counter(str(row["label"]) for row in found)
    twice = [f"document {label} is there {n} times" for label, n in labels.items() if n > 1]
    return {str(row["label"]): Row(int(str(row["_subset_"])), int(str(row["revision"]))) for row in found}, twice


def compare(index: str, rows: dict[str, Row], told: Told, opened_s: float) -> list[str]:
    calls = [call for call in told.calls if call.index == index]
    adds = [call for call in calls if call.kind in ("add", "build")]
    deletes = {call.args["labels"][0]: call for call in calls if call.kind == "delete" and call.outcome != REFUSED}
    updates: dict[str, list[Call]] = {}
    for call in calls:
        if call.kind == "update":
            updates.setdefault(call.args["labels"][0], []).append(call)
    wrong = [f"{label} is there and nobody added it" for label in rows.keys() - {label for add in adds for label in add.args["labels"]}]
    for add in adds:
        labels = add.args["labels"]
        wrong += _fate_of(add, deletes.get(labels[0]), [label in rows for label in labels], opened_s)
        if labels[0] in rows:
            wrong += _state_of(add, updates.get(labels[0], []), [rows[label] for label in labels if label in rows], opened_s)
    return wrong


def _fate_of(add: Call, delete: Call | None, there: list[bool], opened_s: float) -> list[str]:
    """An add and its delete are each whole or nothing, and what was acknowledged shows."""
    what = f"{add.kind} of {add.args['labels'][0]} and {len(there) - 1} more ({add.outcome} {add.error})"
    if any(there) and not all(there):
        return [f"{what} is half there: {there}, delete {delete.outcome if delete else 'not asked for'}"]
    if not there[0] and add.outcome == "done" and add.ended_s < opened_s and delete is None:
        return [f"{what} was acknowledged {opened_s - add.ended_s:.2f} s before and is not there"]
    if there[0] and add.outcome == REFUSED:
        return [f"{what} was refused and is there"]
    if there[0] and delete is not None and delete.outcome == "done" and delete.ended_s < opened_s:
        return [f"{what} was deleted {opened_s - delete.ended_s:.2f} s before and is there"]
    return []


def _state_of(add: Call, updates: list[Call], rows: list[Row], opened_s: float) -> list[str]:
    """Ids are those that were told; the revision is that of the last certain update, or of one that may have come after it."""
    wrong = []
    first = add.args["labels"][0]
    if add.outcome == "done" and add.result is not None and [row.id for row in rows] != add.result:
        wrong.append(f"{first} has ids {[row.id for row in rows]}, was told {add.result}")
    certain = [call for call in updates if call.outcome == "done" and call.ended_s < opened_s]
    last_s = max((call.began_s for call in certain), default=0.0)
    allowed = {call.args["revision"] for call in updates if call.outcome != REFUSED and call.began_s >= last_s} | (
        {0} if not certain else set()
    )
    if len({row.revision for row in rows}) > 1 or rows[0].revision not in allowed:
        wrong.append(f"{first} has revisions {[row.revision for row in rows]}, expected one of {sorted(allowed)}")
    return wrong


def _ids_are_unique(index: str, told: Told) -> list[str]:
    given = Counter(n for call in told.calls if call.index == index and call.kind == "add" and call.result for n in call.result)
    return [f"document id {number} was given {times} times" for number, times in given.items() if times > 1]


async def _vectors_are_right(snapshot: Snapshot) -> list[str]:
    """Each document holds the vectors of its label, as near as a codec that was trained on a handful allows."""
    wrong = []
    for segment in snapshot.segments:
        codec = snapshot.manifest.codec_of(segment) if segment.codec else None
        ids = await snapshot.parts.ids(snapshot.index, segment)
        ordinals = await snapshot.parts.live_ordinals_of(snapshot.index, segment, np.sort(ids))
        tokens, offsets = await snapshot.parts.tokens(snapshot.index, segment, ordinals, codec)
        rows = await snapshot.rows(ids[ordinals])
        for n, row in enumerate(rows):
            assert row is not None
            found, wanted = tokens[offsets[n] : offsets[n + 1]].astype(np.float32), vectors_of(str(row["label"]))
            cosines = (found * wanted).sum(axis=1) / np.linalg.norm(found, axis=1) if found.shape == wanted.shape else np.zeros(1)
            if cosines.min() < 0.9:
                wrong.append(f"{row['label']} has other vectors: {cosines}")
    return wrong
