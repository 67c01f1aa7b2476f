"""Keyword search: BM25 over the whole index, from one FTS5 table per segment. Scores do not depend on how documents are cut into segments.

SQLite's bm25() uses the statistics of its own table. So it is used for what it alone knows, and the sum is done here:

1. `compile_query`  once: SQLite judges whether the text is a query (if not, it is rewritten, API.md 3), and it is taken apart into phrases.
2. `match`          for each segment: which rows match (SQLite says it for each phrase and NEAR, AND, OR and NOT are set algebra on its
                    answers), in how many live rows each phrase occurs, and how often it occurs in each matching row.
3. `combine`        once: statistics are added up, and every match gets the score that one FTS5 table with all live documents would give it.

How often a phrase occurs in a row is read off bm25() of that phrase alone: with the segment's own N, n, average length and the row's length
known, one score has one unknown, f. The result must be an integer, so the inversion checks itself; if it fails (f in the millions), and for
NEAR, whose rules thin out occurrences, token positions are read instead.

    score = Σ over phrases of idf · f·(k1 + 1) / (f + k1·(1 - b + b·length/average))        idf = ln((N - n + 0.5)/(n + 0.5)), at least 1e-6

A phrase counts in a row where its branch of the query matches: in `a OR (b AND c)` a row with a and b alone gets nothing for b, as in FTS5.

Called by the searcher. Deleted documents are neither counted nor found; rows with changed metadata are found by their new text only.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import numpy as np

from engine.errors import CorruptData, InvalidRequest
from engine.metadata import fts_query
from engine.metadata.database import FTS_COLUMN, TIMEOUT_S, TOKENIZERS, Database

if TYPE_CHECKING:
    from engine.metadata.database import _Connection

K1 = 1.2
B = 0.75
MIN_IDF = 1e-6
"""These three are FTS5's (fts5_aux.c). A term in more than half of the rows would have a negative idf without the floor."""

MAX_QUERY_CHARS = 10_000
MAX_PHRASES = 256
"""Each phrase costs a question or two to every segment. Chosen; longer queries are sentences by mistake."""
_ROUNDING = 1e-3
"""How far from an integer an inverted frequency may lie. bm25() comes as text of 15 digits: the error is smaller up to f of about 10^5."""
_OFFSET_BITS = 32


class Phrase(msgspec.Struct, frozen=True):
    """A phrase after tokenising. `text` is its query; the last term is a prefix if `prefix`; no terms: it occurs nowhere."""

    text: str
    terms: tuple[str, ...]
    prefix: bool
    initial: bool


class Leaf(msgspec.Struct, frozen=True):
    phrase: int


class Near(msgspec.Struct, frozen=True):
    """Phrases by number, in the order of the query; `text` is the whole NEAR as a query."""

    phrases: tuple[int, ...]
    distance: int
    text: str


class Both(msgspec.Struct, frozen=True):
    parts: tuple[Node, ...]


class Either(msgspec.Struct, frozen=True):
    parts: tuple[Node, ...]


class Without(msgspec.Struct, frozen=True):
    wanted: Node
    unwanted: Node


Node = Leaf | Near | Both | Either | Without


class KeywordQuery(msgspec.Struct, frozen=True):
    """A query ready for any segment.

    text       the query that SQLite accepted
    tree       None: matches nothing (an empty query)
    phrases    in the order of the query, repeats included: each occurrence of a phrase counts
    rewritten  the text as given was no FTS5 query
    """

    text: str
    tokenizer: str
    tree: Node | None
    phrases: tuple[Phrase, ...]
    rewritten: bool


class Matches(NamedTuple):
    """What one segment contributes to one query, M matches and P phrases.

    n_documents, n_tokens   live documents of the segment and their tokens
    document_frequencies    int64 (P,), live documents with the phrase, whether they match the query or not
    ordinals, ids           int64 (M,), matching documents that are live and in the subset, by ordinal
    lengths                 int32 (M,), their tokens
    frequencies             int64 (P, M), counted occurrences of each phrase
    """

    n_documents: int
    n_tokens: int
    document_frequencies: np.ndarray
    ordinals: np.ndarray
    ids: np.ndarray
    lengths: np.ndarray
    frequencies: np.ndarray


class Ranking(NamedTuple):
    """Hits, best first, equal scores by document id: which of the parts (int64), ordinal there (int64), id (int64), score (float32)."""

    parts: np.ndarray
    ordinals: np.ndarray
    ids: np.ndarray
    scores: np.ndarray


def compile_query(text: str, tokenizer: str = "unicode61") -> KeywordQuery:
    """Make a keyword query of what a user typed.

    FTS5's syntax is tried as it stands. If FTS5 refuses it, each word is stripped of punctuation at its edges, operators are dropped, and
    the words are put in quotes: all of them must occur. NUL and unpaired surrogates are read as blanks.

    Raises InvalidRequest for an unknown tokenizer, too long a text and too many phrases.
    Cost: a few hundred microseconds.
    """
    if tokenizer not in TOKENIZERS:
        raise InvalidRequest("fts_tokenizer is unicode61 or trigram", fts_tokenizer=repr(tokenizer)[:140])
    if not isinstance(text, str):
        raise InvalidRequest("a keyword query is a string", found=type(text).__name__)
    if len(text) > MAX_QUERY_CHARS:
        raise InvalidRequest("the keyword query is too long", limit=MAX_QUERY_CHARS, found=len(text))
    text = text.replace("\0", " ").encode("utf-16", "surrogatepass").decode("utf-16", "replace").replace("\ufffd", " ")
    with _tokenizing(tokenizer) as scratch:
        tree = _accepted(scratch, text)
        rewritten = tree is None and bool(text.strip(" \t\n\r"))
        if rewritten:
            text = _rewritten(text)
            tree = _accepted(scratch, text)
        if tree is None:
            return KeywordQuery("", tokenizer, None, (), rewritten)
        compiler = _Compiler(scratch)
        return KeywordQuery(text, tokenizer, compiler.node(tree), tuple(compiler.phrases), rewritten)


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
        document_frequencies=_summed([document_frequencies for _, document_frequencies, _ in found], len(query.phrases)),
        ordinals=ordinals,
        ids=database.stored_ids[ordinals] + database.base,
        lengths=lengths[ordinals],
        frequencies=np.concatenate([frequencies for _, _, frequencies in found], axis=1)[:, order],
    )


def match_nothing(query: KeywordQuery, n_documents: int) -> Matches:
    """What a segment without a metadata database contributes: its live documents, which have no words."""
    return _no_matches(query, n_documents, 0)


def combine(query: KeywordQuery, parts: Sequence[Matches], k: int | None = None) -> Ranking:
    """Score all matches with the statistics of the whole index, best first, at most k of them.

    parts  one for each segment of the index (all of them, or the statistics are not the index's), matched with this query
    """
    n_documents = sum(part.n_documents for part in parts)
    n_tokens = sum(part.n_tokens for part in parts)
    document_frequencies = _summed([part.document_frequencies for part in parts], len(query.phrases))
    ordinals = _joined([part.ordinals for part in parts], np.int64)
    ids = _joined([part.ids for part in parts], np.int64)
    numbers = np.repeat(np.arange(len(parts)), [len(part.ordinals) for part in parts])
    lengths = _joined([part.lengths for part in parts], np.int64)
    sums = np.zeros(len(ordinals))
    if len(ordinals):
        damping = _damping(lengths, n_documents, n_tokens)
        frequencies = np.concatenate([part.frequencies for part in parts], axis=1)
        for phrase_frequencies, n_with_phrase in zip(frequencies, document_frequencies.tolist(), strict=True):
            sums += _idf(n_documents, n_with_phrase) * (phrase_frequencies * (K1 + 1)) / (phrase_frequencies + damping)
    scores = sums.astype(np.float32)
    order = np.lexsort((ids, -scores))[:k]
    return Ranking(numbers[order], ordinals[order], ids[order], scores[order])


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

    def __init__(self, query: KeywordQuery, connection: _Connection, table: _Table) -> None:
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
        idf = _idf(table.n_rows, len(all_rows))
        damping = _damping(table.lengths[rows], table.n_rows, table.n_tokens)
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


class _Compiler:
    """Numbers the phrases of a tree in the order of the query and finds out their terms."""

    def __init__(self, scratch: _Scratch) -> None:
        self.scratch = scratch
        self.phrases: list[Phrase] = []

    def node(self, node: fts_query.Node) -> Node:
        if isinstance(node, fts_query.Phrase):
            return Leaf(self.phrase(node))
        if isinstance(node, fts_query.Near):
            return self.near(node)
        if isinstance(node, fts_query.Without):
            return self.without(node)
        parts = tuple(self.node(part) for part in node.parts)
        if isinstance(node, fts_query.Either):
            return Either(parts)
        if node.implicit:
            parts = tuple(part for part in parts if not self.is_empty(part)) or parts[-1:]
        return parts[0] if len(parts) == 1 else Both(parts)

    def without(self, node: fts_query.Without) -> Node:
        """A chain of NOT is as deep as it is long, so it is gone through in a loop: too many phrases are found before the stack ends."""
        wanted: fts_query.Node = node
        unwanted: list[fts_query.Node] = []
        while isinstance(wanted, fts_query.Without):
            unwanted.append(wanted.unwanted)
            wanted = wanted.wanted
        found = self.node(wanted)
        for part in reversed(unwanted):
            found = Without(found, self.node(part))
        return found

    def phrase(self, phrase: fts_query.Phrase) -> int:
        if len(self.phrases) == MAX_PHRASES:
            raise InvalidRequest("the keyword query has too many phrases", limit=MAX_PHRASES)
        terms = [term for string, _ in phrase.parts for term in self.scratch.terms(string)]
        self.phrases.append(Phrase(phrase.text(), tuple(terms), phrase.parts[-1][1], phrase.initial))
        return len(self.phrases) - 1

    def near(self, node: fts_query.Near) -> Node:
        """Phrases without tokens are as if they were not there; one that is left is a phrase like any other."""
        numbers = [self.phrase(phrase) for phrase in node.phrases]
        kept = [number for number in numbers if self.phrases[number].terms] or numbers[-1:]
        if len(kept) == 1:
            return Leaf(kept[0])
        return Near(tuple(kept), node.distance, node.text())

    def is_empty(self, node: Node) -> bool:
        return isinstance(node, Leaf) and not self.phrases[node.phrase].terms


class _Scratch:
    """An empty FTS5 table: SQLite's parser and tokenizer without any documents."""

    def __init__(self, tokenizer: str) -> None:
        self.lock = threading.Lock()
        self.sqlite = sqlite3.connect(":memory:", check_same_thread=False, isolation_level=None)
        self.sqlite.execute(f"CREATE VIRTUAL TABLE fts USING fts5({FTS_COLUMN}, content='', tokenize='{tokenizer}')")
        self.sqlite.execute("CREATE VIRTUAL TABLE temp.instances USING fts5vocab(main, fts, instance)")
        self.sqlite.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)  # text of users is only ever bound; if it were not, no file would be in reach

    def accepts(self, text: str) -> bool:
        """Whether FTS5 takes this for a query. A leading * would be a debugging command of FTS5, not a query."""
        if text.startswith("*"):
            return False
        try:
            self.sqlite.execute("SELECT 1 FROM fts WHERE fts MATCH ?", (text,)).fetchall()
        except sqlite3.OperationalError:
            return False
        return True

    def terms(self, text: str) -> list[str]:
        """The tokens of a text, in order."""
        self.sqlite.execute("BEGIN")
        try:
            self.sqlite.execute(f"INSERT INTO fts(rowid, {FTS_COLUMN}) VALUES(1, ?)", (text,))
            return [term for (term,) in self.sqlite.execute('SELECT term FROM instances ORDER BY "offset"')]
        finally:
            self.sqlite.execute("ROLLBACK")


_scratches: dict[str, _Scratch] = {}
_scratches_lock = threading.Lock()


@contextmanager
def _tokenizing(tokenizer: str) -> Iterator[_Scratch]:
    """The process's scratch table for a tokenizer, for one thread at a time; making one costs a millisecond."""
    with _scratches_lock:
        scratch = _scratches.get(tokenizer)
        if scratch is None:
            scratch = _scratches[tokenizer] = _Scratch(tokenizer)
    with scratch.lock:
        yield scratch


def _accepted(scratch: _Scratch, text: str) -> fts_query.Node | None:
    """The tree of a text that FTS5 takes for a query; None if it does not, or if it is empty."""
    if not text.strip(" \t\n\r") or not scratch.accepts(text):
        return None
    try:
        return fts_query.parse(text)
    except fts_query.Refused:
        return None


def _rewritten(text: str) -> str:
    """Words in quotes, without punctuation at their edges and without operators."""
    words = []
    for word in text.split():
        inside = [place for place, character in enumerate(word) if character.isalnum()]
        bare = word[inside[0] : inside[-1] + 1] if inside else ""
        if bare and bare not in ("AND", "OR", "NOT", "NEAR"):
            words.append(fts_query.quoted(bare))
    return " ".join(words)


def _idf(n_rows: int, n_with_phrase: int) -> float:
    idf = float(np.log((n_rows - n_with_phrase + 0.5) / (n_with_phrase + 0.5)))
    return idf if idf > 0.0 else MIN_IDF


def _damping(lengths: np.ndarray, n_rows: int, n_tokens: int) -> np.ndarray:
    """k1·(1 - b + b·length/average) of each row: float64."""
    return K1 * (1 - B + B * lengths / (n_tokens / n_rows))


def _no_matches(query: KeywordQuery, n_documents: int, n_tokens: int) -> Matches:
    none = np.zeros(0, np.int64)
    n_phrases = len(query.phrases)
    frequencies = np.zeros((n_phrases, 0), np.int64)
    return Matches(n_documents, n_tokens, np.zeros(n_phrases, np.int64), none, none, np.zeros(0, np.int32), frequencies)


def _summed(counts: Sequence[np.ndarray], n_phrases: int) -> np.ndarray:
    total = np.zeros(n_phrases, np.int64)
    for of_part in counts:
        total += of_part
    return total


def _joined(arrays: Sequence[np.ndarray], dtype: type[np.generic]) -> np.ndarray:
    return np.concatenate([*arrays, np.zeros(0, dtype)]).astype(dtype)
