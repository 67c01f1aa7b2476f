"""A keyword query of what a user typed, ready for any segment: the first of three steps.

1. `compile_query`  (here) once: SQLite judges whether the text is a query (if not, it is rewritten, API.md 3), and it is taken apart into phrases.
2. `match`          (matching.py) for each segment: which rows match (SQLite says it for each phrase and NEAR, AND, OR and NOT are set algebra on its
                    answers), in how many live rows each phrase occurs, and how often it occurs in each matching row.
3. `combine`        (bm25.py) once: statistics are added up, and every match gets the score that one FTS5 table with all live documents would give it.

SQLite's bm25() uses the statistics of its own table. So it is used for what it alone knows, and the sum is done here: scores do not depend
on how documents are cut into segments.
"""

from __future__ import annotations

import msgspec

from engine.errors import InvalidRequest
from engine.metadata import fts_query
from engine.metadata.database_file import TOKENIZERS
from engine.metadata.tokenizer import Scratch, tokenizing

MAX_QUERY_CHARS = 10_000
MAX_PHRASES = 256
"""Each phrase costs a question or two to every segment. Chosen; longer queries are sentences by mistake."""


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
    with tokenizing(tokenizer) as scratch:
        tree = _accepted(scratch, text)
        rewritten = tree is None and bool(text.strip(" \t\n\r"))
        if rewritten:
            text = _rewritten(text)
            tree = _accepted(scratch, text)
        if tree is None:
            return KeywordQuery("", tokenizer, None, (), rewritten)
        compiler = _Compiler(scratch)
        return KeywordQuery(text, tokenizer, compiler.node(tree), tuple(compiler.phrases), rewritten)


def _accepted(scratch: Scratch, text: str) -> fts_query.Node | None:
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


class _Compiler:
    """Numbers the phrases of a tree in the order of the query and finds out their terms."""

    def __init__(self, scratch: Scratch) -> None:
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
