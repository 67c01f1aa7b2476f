"""One keyword query put to one segment: rows that match, and how often each phrase occurs in them.

How often a phrase occurs in a row is read off bm25() of that phrase alone: with the segment's own N, n, average length and the row's length
known, one score has one unknown, f. The result must be an integer, so the inversion checks itself; if it fails (f in the millions), and for
NEAR, whose rules thin out occurrences, token positions are read instead.

A phrase counts in a row where its branch of the query matches: in `a OR (b AND c)` a row with a and b alone gets nothing for b, as in FTS5.

Called by index/filters.py. Deleted documents are neither counted nor found; rows with changed metadata are found by their new text only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import numpy as np

from engine.errors import CorruptData, InvalidRequest
from engine.metadata.bm25 import K1, Matches, damping_of, idf_of, summed
from engine.metadata.connection import Connection
from engine.metadata.database import TIMEOUT_S, Database
from engine.metadata.keyword_query import Both, Either, KeywordQuery, Leaf, Near, Node, Phrase, Without

_ROUNDING = 1e-3
"""How far from an integer an inverted frequency may lie. bm25() comes as text of 15 digits: the error is smaller up to f of about 10^5."""
_OFFSET_BITS = 32


def match(
    query: KeywordQuery, database: Database, live: np.ndarray | None = None, subset: np.ndarray | None = None, timeout_s: float = TIMEOUT_S
) -> Matches:
    """Ask one segment.

    live    bool (N,), False for deleted documents; None: none is deleted
    subset  bool (N,), documents that may be found; None: all. Does not change any score

    Raises InvalidRequest if the index has another tokenizer than the query; Unavailable (timeout).
    Cost: for each different phrase its posting list, and bm25() for the matching rows that have it: about 1 microsecond a row.
    """
    if query.tokenizer != database.tokenizer:
        raise InvalidRequest("the query was made for another tokenizer", expected=database.tokenizer, found=query.tokenizer)
    changed = database.patched_ordinals
    alive = np.ones(database.n_documents, bool) if live is None else live.astype(bool)
    unchanged = alive.copy()
    unchanged[changed] = False
    wanted = np.ones(database.n_documents, bool) if subset is None else subset.astype(bool)
    lengths = database.lengths
    tables = [_Table("main", "fts", lengths, database.n_indexed, database.n_tokens, unchanged)]
    if len(changed):
        lengths = lengths.copy()
        lengths[changed] = database.patched_lengths
        n_tokens = int(database.patched_lengths.sum())
        tables.append(_Table("temp", "patched_fts", lengths, database.n_patched_indexed, n_tokens, alive & ~unchanged))
    n_documents, n_tokens = int(np.count_nonzero(alive)), int(lengths[alive].sum())
    if query.tree is None:
        return _no_matches(query, n_documents, n_tokens)
    with database.asking(timeout_s) as connection:
        found = [_Question(query, connection, table).answer(wanted) for table in tables]
    ordinals = np.concatenate([rows for rows, _, _ in found])
    order = np.argsort(ordinals, kind="stable")
    ordinals = ordinals[order]
    return Matches(
        n_documents=n_documents,
        n_tokens=n_tokens,
        document_frequencies=summed([document_frequencies for _, document_frequencies, _ in found], len(query.phrases)),
        ordinals=ordinals,
        ids=database.stored_ids[ordinals] + database.base,
        lengths=lengths[ordinals],
        frequencies=np.concatenate([frequencies for _, _, frequencies in found], axis=1)[:, order],
    )


def match_nothing(query: KeywordQuery, n_documents: int) -> Matches:
    """What a segment without a metadata database contributes: its live documents, which have no words."""
    return _no_matches(query, n_documents, 0)


def _no_matches(query: KeywordQuery, n_documents: int, n_tokens: int) -> Matches:
    none = np.zeros(0, np.int64)
    n_phrases = len(query.phrases)
    frequencies = np.zeros((n_phrases, 0), np.int64)
    return Matches(n_documents, n_tokens, np.zeros(n_phrases, np.int64), none, none, np.zeros(0, np.int32), frequencies)


class _Table(NamedTuple):
    """One FTS5 table: where it is, what its own bm25() knows (n_rows, n_tokens, lengths by ordinal), and whose words count (bool (N,))."""

    schema: str
    name: str
    lengths: np.ndarray
    n_rows: int
    n_tokens: int
    counted: np.ndarray


class _Question:
    """One query put to one FTS5 table."""

    def __init__(self, query: KeywordQuery, connection: Connection, table: _Table) -> None:
        self.query = query
        self.connection = connection
        self.table = table
        self._rows: dict[str, np.ndarray] = {}

    def answer(self, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Matching rows that count and are wanted; in how many rows that count each phrase occurs (P,); occurrences (P, M)."""
        assert self.query.tree is not None
        counted = self.table.counted
        phrases = self.query.phrases
        document_frequencies = np.array([np.count_nonzero(counted[self.phrase_rows(phrase)]) for phrase in phrases], np.int64)
        rows = self.matching_node(self.query.tree)
        rows = rows[counted[rows] & wanted[rows]]
        frequencies = np.zeros((len(phrases), len(rows)), np.int64)
        if len(rows):
            self.count(self.query.tree, rows, rows, frequencies)
        return rows, document_frequencies, frequencies

    def matching(self, text: str) -> np.ndarray:
        """Rows that match a phrase or a NEAR, ascending; deleted ones too."""
        rows = self._rows.get(text)
        if rows is None:
            name = self.table.name
            sql = f"SELECT json_group_array(rowid) FROM {self.table.schema}.{name} WHERE {name} MATCH ?"
            rows = self._rows[text] = np.sort(self.connection.array(sql, (text,), np.int64))
            if len(rows) and (rows[0] < 0 or rows[-1] >= len(self.table.counted)):
                raise CorruptData("a keyword index names rows that are not there", code="malformed", found=int(rows[-1]))
        return rows

    def phrase_rows(self, phrase: Phrase) -> np.ndarray:
        return self.matching(phrase.text) if phrase.terms else np.zeros(0, np.int64)

    def matching_node(self, node: Node) -> np.ndarray:
        """Rows that match the query or a part of it, ascending."""
        if isinstance(node, Leaf):
            return self.phrase_rows(self.query.phrases[node.phrase])
        if isinstance(node, Near):
            return self.matching(node.text)
        if isinstance(node, Without):
            return np.setdiff1d(self.matching_node(node.wanted), self.matching_node(node.unwanted), assume_unique=True)
        rows = self.matching_node(node.parts[0])
        join = np.union1d if isinstance(node, Either) else np.intersect1d
        for part in node.parts[1:]:
            rows = join(rows, self.matching_node(part))
        return rows

    def count(self, node: Node, rows: np.ndarray, answer_rows: np.ndarray, frequencies: np.ndarray) -> None:
        """Write into `frequencies` (P, len(answer_rows)) how often the phrases below `node` occur in `rows`, all of which match `node`."""
        if isinstance(node, Leaf):
            frequencies[node.phrase, np.searchsorted(answer_rows, rows)] = self.occurrences(self.query.phrases[node.phrase], rows)
        elif isinstance(node, Near):
            columns = np.searchsorted(answer_rows, rows)
            frequencies[np.array(node.phrases)[:, None], columns] = self.near_occurrences(node, rows)
        elif isinstance(node, Without):
            self.count(node.wanted, rows, answer_rows, frequencies)
        else:
            for part in node.parts:
                matching = rows if isinstance(node, Both) else np.intersect1d(rows, self.matching_node(part), assume_unique=True)
                self.count(part, matching, answer_rows, frequencies)

    def occurrences(self, phrase: Phrase, rows: np.ndarray) -> np.ndarray:
        """How often the phrase occurs in each of these rows, all of which have it: bm25() of the phrase alone, inverted."""
        if not len(rows):
            return np.zeros(0, np.int64)
        all_rows = self.phrase_rows(phrase)
        name = self.table.name
        where, parameters = "", [phrase.text]
        if 2 * len(rows) <= len(all_rows):
            # The + keeps SQLite from running the whole query again for every row of the list.
            where = " AND +rowid IN (SELECT value FROM json_each(?))"
            parameters.append(msgspec.json.encode(rows.tolist()).decode())
        # bm25() cannot stand inside an aggregate function; LIMIT keeps SQLite from moving it there.
        inner = f"SELECT bm25({name}) AS score FROM {self.table.schema}.{name} WHERE {name} MATCH ?{where} LIMIT -1"
        scores = -self.connection.array(f"SELECT json_group_array(score) FROM ({inner})", parameters, np.float64)
        if not where:
            scores = scores[np.searchsorted(all_rows, rows)]
        table = self.table
        idf = idf_of(table.n_rows, len(all_rows))
        damping = damping_of(table.lengths[rows], table.n_rows, table.n_tokens)
        with np.errstate(divide="ignore", invalid="ignore"):
            exact = scores * damping / (idf * (K1 + 1) - scores)
        rounded = np.rint(exact)
        if not np.all(np.abs(exact - rounded) <= _ROUNDING) or not np.all(rounded >= 1):  # also false for nan
            return np.array([len(found) for found in self.positions(phrase, rows)], np.int64)
        counts: np.ndarray = rounded.astype(np.int64)
        return counts

    def near_occurrences(self, node: Near, rows: np.ndarray) -> np.ndarray:
        """Occurrences of each phrase of a NEAR that take part in it: int64 (phrases, rows)."""
        phrases = [self.query.phrases[number] for number in node.phrases]
        n_terms = [len(phrase.terms) for phrase in phrases]
        positions = zip(*[self.positions(phrase, rows) for phrase in phrases], strict=True)
        return np.array([near_counts(of_row, n_terms, node.distance) for of_row in positions], np.int64).reshape(len(rows), len(phrases)).T

    def positions(self, phrase: Phrase, rows: np.ndarray) -> list[list[int]]:
        """For each row, at which tokens the phrase begins, ascending."""
        starts: np.ndarray | None = None
        for place, term in enumerate(phrase.terms):
            at = self.term_places(term, phrase.prefix and place == len(phrase.terms) - 1) - place
            starts = at if starts is None else np.intersect1d(starts, at, assume_unique=True)
        assert starts is not None
        if phrase.initial:
            starts = starts[starts & ((1 << _OFFSET_BITS) - 1) == 0]
        first = np.searchsorted(starts, rows << _OFFSET_BITS)
        last = np.searchsorted(starts, (rows + 1) << _OFFSET_BITS)
        offsets = starts & ((1 << _OFFSET_BITS) - 1)
        return [offsets[low:high].tolist() for low, high in zip(first.tolist(), last.tolist(), strict=True)]

    def term_places(self, term: str, prefix: bool) -> np.ndarray:
        """Where a term stands, as row · 2^32 + token number: int64, ascending, without repeats."""
        vocabulary = "temp.instances" if self.table.name == "fts" else "temp.patched_instances"
        where, parameters = ("term >= ? AND term < ?", [term, term + "\U0010ffff"]) if prefix else ("term = ?", [term])
        sql = f'SELECT json_group_array((doc << {_OFFSET_BITS}) + "offset") FROM {vocabulary} WHERE {where}'
        return np.unique(self.connection.array(sql, parameters, np.int64))


def near_counts(positions: Sequence[Sequence[int]], n_terms: Sequence[int], distance: int) -> list[int]:
    """How many occurrences of each phrase FTS5 keeps for a NEAR in one row.

    A twin of fts5ExprNearIsMatch (fts5_expr.c), which walks all lists at once and keeps fewer than one might think.

    positions  for each phrase where it begins, ascending
    n_terms    of each phrase
    returns    one count for each phrase, all 0 if the row does not match
    """
    counts = [0] * len(positions)
    previous = [-1] * len(positions)
    heads = [0] * len(positions)
    if not all(positions):
        return counts
    while True:
        latest = positions[0][heads[0]]
        settled = False
        while not settled:
            settled = True
            for phrase, places in enumerate(positions):
                earliest = latest - n_terms[phrase] - distance
                if earliest <= places[heads[phrase]] <= latest:
                    continue
                settled = False
                while places[heads[phrase]] < earliest:
                    heads[phrase] += 1
                    if heads[phrase] == len(places):
                        return counts
                latest = max(latest, places[heads[phrase]])
        for phrase, places in enumerate(positions):
            if places[heads[phrase]] != previous[phrase]:
                previous[phrase] = places[heads[phrase]]
                counts[phrase] += 1
        # Move on in the phrase whose next occurrence comes first.
        ahead = [places[head + 1 : head + 2] for places, head in zip(positions, heads, strict=True)]
        following = [(place, phrase) for phrase, places in enumerate(ahead) for place in places]
        if not following:
            return counts
        heads[min(following)[1]] += 1
