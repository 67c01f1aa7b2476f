"""What the index must hold: every document, what was done to it and when, and what a read may therefore show.

All times are of one monotonic clock, that of the process which sends everything. A write takes effect somewhere between `began_s` and
`ended_s`; a read that began at t and allows an age of a sees one moment between t - a and its end. So a document must be seen if it was
acknowledged before that span and no delete began before its end; it must not be seen if a delete was acknowledged before the span.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

DIM = 64
N_TOPICS = 128
NEVER = float("inf")
_TOPICS = np.random.default_rng(0).standard_normal((N_TOPICS, DIM)).astype(np.float32)
_TOPICS /= np.linalg.norm(_TOPICS, axis=1, keepdims=True)


def vectors_of(number: int) -> np.ndarray:
    """float32 (12 to 28, DIM): the tokens of document `number`, unit rows about six of the topics."""
    rng = np.random.default_rng(number)
    topics = rng.choice(N_TOPICS, 6, replace=False)
    n_tokens = int(rng.integers(12, 29))
    rows = _TOPICS[rng.choice(topics, n_tokens)] + 0.06 * rng.standard_normal((n_tokens, DIM)).astype(np.float32)
    unit: np.ndarray = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit


@dataclass
class Document:
    """revisions: (value, began_s, ended_s) of each write of the field `revision`, in order. is_known is False after a write of unknown outcome."""

    number: int
    batch: int
    id: int = -1
    added_s: float = NEVER
    delete_began_s: float = NEVER
    deleted_s: float = NEVER
    revisions: list[tuple[int, float, float]] = field(default_factory=list)
    is_known: bool = True
    is_busy: bool = False

    @property
    def label(self) -> str:
        return f"d{self.number}"

    @property
    def fields(self) -> dict[str, object]:
        return {"label": self.label, "batch": self.batch, "revision": 0}

    def must_be_seen(self, oldest_s: float, ended_s: float) -> bool:
        return self.is_known and self.added_s < oldest_s and self.delete_began_s > ended_s

    def must_not_be_seen(self, oldest_s: float) -> bool:
        return self.is_known and self.deleted_s < oldest_s

    def may_show(self, revision: object, oldest_s: float, ended_s: float) -> bool:
        if not self.is_known:
            return True
        for n, (value, began_s, _) in enumerate(self.revisions):
            replaced_s = self.revisions[n + 1][2] if n + 1 < len(self.revisions) else NEVER
            if value == revision and began_s < ended_s and replaced_s > oldest_s:
                return True
        return False


class Model:
    """Documents by label, by batch and by id."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.alive: dict[int, list[Document]] = {}
        """Batches of which something may be left."""
        self.by_label: dict[str, Document] = {}
        self.n_made = self.n_batches = 0
        self.wrong: list[str] = []

    @property
    def n_alive(self) -> int:
        return sum(map(len, self.alive.values()))

    def complain(self, text: str) -> None:
        if text not in self.wrong:
            self.wrong.append(text)

    # Writing

    def make(self, n_documents: int) -> list[Document]:
        """New documents, one batch."""
        batch = self.n_batches
        self.n_batches += 1
        began_s = time.monotonic()
        made = [Document(self.n_made + n, batch, is_busy=True, revisions=[(0, began_s, NEVER)]) for n in range(n_documents)]
        self.n_made += n_documents
        self.by_label.update((document.label, document) for document in made)
        return made

    def added(self, documents: list[Document], ids: list[int]) -> None:
        if len(ids) != len(documents):
            self.complain(f"{len(documents)} documents were added and got {len(ids)} ids")
            self.lost(documents)
            return
        for document, number in zip(documents, ids, strict=True):
            document.id, document.added_s, document.is_busy = number, time.monotonic(), False
            document.revisions = [(0, document.revisions[0][1], document.added_s)]
        self.alive[documents[0].batch] = documents

    def deleting(self, documents: list[Document]) -> None:
        """Before the delete is sent: a read may already miss them."""
        for document in documents:
            document.delete_began_s, document.is_busy = time.monotonic(), True

    def deleted(self, documents: list[Document]) -> None:
        for document in documents:
            document.deleted_s, document.is_busy = time.monotonic(), False
        batch = documents[0].batch
        left = [document for document in self.alive[batch] if document.deleted_s == NEVER]
        if left:
            self.alive[batch] = left
        else:
            del self.alive[batch]

    def updating(self, documents: list[Document], revision: int) -> None:
        """Before the update is sent: a read may already show it."""
        for document in documents:
            document.revisions.append((revision, time.monotonic(), NEVER))
            document.is_busy = True

    def updated(self, documents: list[Document]) -> None:
        for document in documents:
            revision, began_s, _ = document.revisions[-1]
            document.revisions = [*document.revisions[-4:-1], (revision, began_s, time.monotonic())]
            document.is_busy = False

    def lost(self, documents: list[Document]) -> None:
        """The outcome of a write is unknown: nothing is claimed of these documents any more."""
        for document in documents:
            document.is_known = False

    def idle_batch(self) -> list[Document] | None:
        """A batch of which nothing is being changed."""
        for _ in range(20):
            documents = self.alive[self.rng.choice(list(self.alive))] if self.alive else []
            if documents and not any(document.is_busy for document in documents) and all(document.is_known for document in documents):
                return documents
        return None

    # Reading

    def check_hits(self, what: str, labels: Iterable[str], oldest_s: float) -> None:
        """Nothing that is deleted or was never there."""
        for label in labels:
            document = self.by_label.get(label)
            if document is None:
                self.complain(f"{what} showed {label}, which nobody added")
            elif document.must_not_be_seen(oldest_s):
                self.complain(f"{what} showed {label}, which was deleted before")

    def check_all(self, what: str, documents: list[Document], labels: set[str], oldest_s: float, ended_s: float) -> None:
        """Of these documents, exactly those that are there."""
        for document in documents:
            if document.must_be_seen(oldest_s, ended_s) and document.label not in labels:
                self.complain(
                    f"{what} did not show {document.label} (id {document.id}), which was acknowledged {ended_s - document.added_s:.1f} s before"
                )
        self.check_hits(what, labels, oldest_s)

    def check_rows(self, what: str, rows: Iterable[dict[str, object]], oldest_s: float, ended_s: float) -> None:
        """Fields and ids of the documents that a read brought."""
        for row in rows:
            document = self.by_label.get(str(row["label"]))
            if document is None or not document.is_known:
                continue
            if document.id >= 0 and row.get("_subset_", document.id) != document.id:
                self.complain(f"{what} showed {document.label} as {row['_subset_']}, added as {document.id}")
            if row["batch"] != document.batch or not document.may_show(row["revision"], oldest_s, ended_s):
                self.complain(f"{what} showed {row}; written: batch {document.batch}, revisions {document.revisions}")
