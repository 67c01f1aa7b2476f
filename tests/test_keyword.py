"""Keyword search: the rows and scores of one FTS5 table, however the documents are cut into segments."""

from __future__ import annotations

import random
import sqlite3
import threading
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import InvalidRequest, Unavailable
from engine.metadata import bm25, fts_query, keyword_query, matching, schema
from engine.metadata.database import Database
from engine.metadata.database_file import build

WORDS = {"unicode61": ["aa", "bb", "cc", "dd", "ab", "abc", "ca", "é", "x1"], "trigram": ["aab", "abc", "bca", "abcab", "ca", "b"]}
RELATIVE = 2e-6  # scores are float32


def random_texts(rng: random.Random, tokenizer: str, n: int) -> list[str]:
    return [" ".join(rng.choices(WORDS[tokenizer], k=rng.choice([0, 1, 3, 6, 12, 20]))) for _ in range(n)]


def segments(texts: Sequence[str], cuts: Sequence[int], tokenizer: str = "unicode61") -> list[Database]:
    edges = [0, *cuts, len(texts)]
    return [
        Database(build([{}] * (stop - start), (), np.arange(stop - start), tokenizer, texts[start:stop]), (), base=start)
        for start, stop in pairwise(edges)
    ]


def search(
    databases: Sequence[Database], text: str, live: np.ndarray | None = None, subset: np.ndarray | None = None, k: int | None = None
) -> dict[int, float]:
    """Ids and scores, best first; the masks are over ids."""
    query = keyword_query.compile_query(text, databases[0].tokenizer)
    parts = []
    for database in databases:
        mine = slice(database.base, database.base + database.n_documents)
        parts.append(matching.match(query, database, None if live is None else live[mine], None if subset is None else subset[mine]))
    ranking = bm25.combine(query, parts, k)
    assert ranking.scores.dtype == np.float32
    assert np.all(np.diff(ranking.scores) <= 0)
    for part, ordinal, found in zip(ranking.parts.tolist(), ranking.ordinals.tolist(), ranking.ids.tolist(), strict=True):
        assert databases[part].base + ordinal == found
    return dict(zip(ranking.ids.tolist(), ranking.scores.tolist(), strict=True))


class OneTable:
    """All documents in one FTS5 table: what NextPlaid asks."""

    def __init__(self, texts: Sequence[str], tokenizer: str, live: np.ndarray | None = None) -> None:
        self.sqlite = sqlite3.connect(":memory:")
        self.sqlite.execute(f"CREATE VIRTUAL TABLE f USING fts5(_fts_content_, tokenize='{tokenizer}')")
        rows = [(number, text) for number, text in enumerate(texts) if live is None or live[number]]
        self.sqlite.executemany("INSERT INTO f(rowid, _fts_content_) VALUES(?, ?)", rows)

    def search(self, text: str) -> dict[int, float] | None:
        try:
            return {number: -score for number, score in self.sqlite.execute("SELECT rowid, bm25(f) FROM f WHERE f MATCH ?", (text,))}
        except sqlite3.OperationalError:
            return None


class Queries:
    """Random queries. `odd` ones may hit the oddities of FTS5's score (README): there only the rows are compared."""

    def __init__(self, rng: random.Random, tokenizer: str) -> None:
        self.rng = rng
        self.words = WORDS[tokenizer]

    def phrase(self) -> str:
        rng, words = self.rng, self.words
        kind = rng.random()
        if kind < 0.5:
            return rng.choice(words) + rng.choice(["", "", "", "*"])
        if kind < 0.6:
            return rng.choice(["a*", '"a"*', "ab *", '"aa b" *', "abc + a*", '""', '"?"', '"ab"'])
        if kind < 0.8:
            return '"' + " ".join(rng.choices(words, k=rng.choice([1, 2, 2, 3]))) + '"'
        return rng.choice(words) + " + " + rng.choice(words)

    def near(self, words_only: bool) -> str:
        phrases = [self.rng.choice(self.words) if words_only else self.phrase() for _ in range(self.rng.choice([1, 2, 2, 3]))]
        distance = f", {self.rng.choice([0, 1, 2, 5])}" if self.rng.random() < 0.7 else ""
        return f"NEAR({' '.join(phrases)}{distance})"

    def leaf(self, words_only: bool) -> str:
        kind = self.rng.random()
        if kind < 0.7:
            return self.phrase()
        if kind < 0.85:
            return self.near(words_only)
        return self.rng.choice(["^ ", "_fts_content_ : ", "{_fts_content_} : "]) + self.phrase()

    def query(self, odd: bool, depth: int = 0) -> str:
        kind = self.rng.random()
        if depth > 3 or kind < 0.3:
            return " ".join(self.leaf(False) for _ in range(self.rng.choice([1, 1, 2, 3])))
        if kind < 0.5:
            parts = [self.query(odd, depth + 1) if odd else self.simple() for _ in range(self.rng.choice([2, 2, 3]))]
            return f"({' OR '.join(parts)})"
        if kind < 0.65:
            return f"{self.query(odd, depth + 1)} AND {self.query(odd, depth + 1)}"
        if kind < 0.8:
            sides = [self.query(odd, depth + 1) if odd else self.simple() for _ in range(2)]
            return f"({sides[0]}) NOT ({sides[1]})"
        return self.rng.choice(["", "_fts_content_ : "]) + f"({self.query(odd, depth + 1)})"

    def simple(self) -> str:
        """What may stand below OR and NOT and still be scored as one would think."""
        words_only = self.words is WORDS["unicode61"]  # a word has several tokens in trigrams
        leaves = [self.leaf(True) if words_only else self.phrase() for _ in range(self.rng.choice([1, 1, 2, 3]))]
        return " ".join(leaves)


@pytest.mark.parametrize("tokenizer", ["unicode61", "trigram"])
@pytest.mark.parametrize("odd", [False, True])
def test_rows_and_scores_are_those_of_one_fts5_table(tokenizer: str, odd: bool) -> None:
    rng = random.Random(7)
    queries = Queries(rng, tokenizer)
    n_hits = 0
    for _ in range(6):
        texts = random_texts(rng, tokenizer, 60)
        table = OneTable(texts, tokenizer)
        databases = segments(texts, sorted(rng.sample(range(1, 60), 2)), tokenizer)
        for _ in range(40):
            text = queries.query(odd)
            expected = table.search(text)
            compiled = keyword_query.compile_query(text, tokenizer)
            assert compiled.rewritten == (expected is None), text
            if expected is None:
                continue
            found = search(databases, text)
            n_hits += len(found)
            assert found.keys() == expected.keys(), text
            assert odd or found == pytest.approx(expected, rel=RELATIVE), text
        for database in databases:
            database.close()
        table.sqlite.close()
    assert n_hits > 1500


def test_a_filter_that_excludes_the_one_column_matches_nothing() -> None:
    """FTS5 itself errs here below NOT, depending on which rows stand before."""
    databases = segments(["red", "blue", "red blue", "green red"], [2])
    assert search(databases, "- _fts_content_ : red") == {}
    assert set(search(databases, "red NOT (- _fts_content_ : red OR blue)")) == {0, 3}
    assert set(search(databases, "blue OR - _fts_content_ : red")) == {1, 2}
    for database in databases:
        database.close()


@settings(max_examples=40, deadline=None)
@given(
    texts=st.lists(st.lists(st.sampled_from(["red", "blue", "green", "Été", "x-y"]), max_size=8).map(" ".join), min_size=2, max_size=14),
    text=st.sampled_from(
        [
            "red",
            "red blue",
            "red OR gre*",
            '"red blue" OR green',
            "NEAR(red blue, 2)",
            "red NOT blue",
            "x-y?",
            "ete",
            "^red",
            "zzz",
            "red red",
        ]
    ),
    data=st.data(),
)
def test_a_keyword_query_scores_the_same_however_documents_are_cut_and_with_deleted_ones(
    texts: list[str], text: str, data: st.DataObject
) -> None:
    live = np.array(data.draw(st.lists(st.booleans(), min_size=len(texts), max_size=len(texts))))
    cuts = sorted(data.draw(st.sets(st.integers(1, len(texts) - 1), max_size=4)))
    whole, pieces = segments(texts, []), segments(texts, cuts)
    assert search(pieces, text, live) == pytest.approx(search(whole, text, live), rel=1e-6)
    expected = OneTable(texts, "unicode61", live)
    compiled = keyword_query.compile_query(text)
    assert search(pieces, text, live) == pytest.approx(expected.search(compiled.text), rel=RELATIVE)
    expected.sqlite.close()
    for database in (*whole, *pieces):
        database.close()


def test_a_subset_restricts_hits_and_changes_no_score() -> None:
    texts = ["red fish", "blue fish", "red red", "green", "red blue fish"]
    databases = segments(texts, [2])
    everything = search(databases, "red OR fish")
    subset = np.array([True, False, False, True, True])
    assert search(databases, "red OR fish", subset=subset) == {number: score for number, score in everything.items() if subset[number]}
    assert search(databases, "red OR fish", subset=np.zeros(5, bool)) == {}
    assert search(databases, "red OR fish", k=2) == dict(list(everything.items())[:2])
    for database in databases:
        database.close()


def test_equal_scores_are_ordered_by_document_id() -> None:
    databases = segments(["same words"] * 6, [1, 4])
    assert list(search(databases, "same")) == list(range(6))
    for database in databases:
        database.close()


def test_changed_metadata_are_found_by_their_new_text_only_and_count_once() -> None:
    rows: list[dict[str, Any]] = [{"word": word, "flag": True} for word in ("red", "blue", "red", "green")]
    columns, stored, texts = schema.extend((), rows)
    data = build(stored, columns, np.arange(4), texts=texts)
    patched = [Database(data, columns, patches={0: {"word": "blue blue"}, 3: {}})]
    table = OneTable(["blue blue 1", "blue true", "red true", "green 1"], "unicode61")
    for text in ("red", "blue", "true", "1", "green OR blue", "NEAR(blue blue)", '"blue blue" 1', "blue NOT true"):
        assert search(patched, text) == pytest.approx(table.search(text), rel=RELATIVE), text
    live = np.array([False, True, True, True])
    table.sqlite.close()
    table = OneTable(["", "blue true", "red true", "green 1"], "unicode61", live)
    assert search(patched, "blue OR 1", live) == pytest.approx(table.search("blue OR 1"), rel=RELATIVE)
    table.sqlite.close()
    patched[0].close()


def test_segments_without_metadata_count_as_documents_without_words() -> None:
    texts = ["red", "red blue", "", "", ""]
    table = OneTable(texts, "unicode61")
    databases = segments(texts[:2], [])
    query = keyword_query.compile_query("red OR blue")
    ranking = bm25.combine(query, [matching.match(query, databases[0]), matching.match_nothing(query, 3)])
    expected = table.search("red OR blue")
    assert dict(zip(ranking.ids.tolist(), ranking.scores.tolist(), strict=True)) == pytest.approx(expected, rel=RELATIVE)
    assert bm25.combine(query, []).ids.size == 0
    assert bm25.combine(query, [matching.match_nothing(query, 3)]).ids.size == 0
    table.sqlite.close()
    databases[0].close()


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("what is a multi-vector?", '"what" "is" "a" "multi-vector"'),
        ("don't panic", '"don\'t" "panic"'),
        ("C++ (and) v1.5.", '"C" "and" "v1.5"'),
        ("foo:bar", '"foo:bar"'),
        ("AND OR NOT NEAR", ""),
        ("red AND AND blue", '"red" "blue"'),
        ('un"balanced', '"un""balanced"'),
        ("*reads", '"reads"'),
        ("*id", '"id"'),
        ("???", ""),
        ("(red", '"red"'),
        ("red; DROP TABLE fts", '"red" "DROP" "TABLE" "fts"'),
    ],
)
def test_what_fts5_refuses_is_tried_as_quoted_words(text: str, match: str) -> None:
    query = keyword_query.compile_query(text)
    assert query.rewritten
    assert query.text == match


@pytest.mark.parametrize(
    "text", ["red", "red blue", "red OR blue", 'NEAR("red" blue, 3)', "re*", "^red", "_fts_content_ : red", "(a AND b) NOT c", "été"]
)
def test_what_fts5_takes_is_left_as_it_is(text: str) -> None:
    query = keyword_query.compile_query(text)
    assert not query.rewritten
    assert query.text == text


@pytest.mark.parametrize("text", ["", "   ", "\n", "\0", "\ud800", '""', '"?"', "?"])
def test_a_query_without_words_matches_nothing(text: str) -> None:
    databases = segments(["red", ""], [])
    assert search(databases, text) == {}
    databases[0].close()


@settings(max_examples=80, deadline=None)
@given(text=st.text(st.sampled_from('ab AND OR NOT NEAR(),"*+^:{}-?\0\ud800é_fts_content_ 5'), max_size=30) | st.text(max_size=20))
def test_any_text_is_a_query(text: str) -> None:
    databases = segments(["a b ab", "b"], [1])
    for database in databases:
        matching.match(keyword_query.compile_query(text), database)
        database.close()


def test_queries_beyond_the_limits_are_refused() -> None:
    for text in ("x" * (keyword_query.MAX_QUERY_CHARS + 1), "a " * (keyword_query.MAX_PHRASES + 1)):
        with pytest.raises(InvalidRequest):
            keyword_query.compile_query(text)
    for text in ("(" * 4000 + "a" + ")" * 4000, " OR ".join(["a"] * 256), " NOT ".join(["a"] * 256)):
        assert keyword_query.compile_query(text).phrases
    with pytest.raises(InvalidRequest):
        keyword_query.compile_query("a", "porter")
    with pytest.raises(InvalidRequest):
        keyword_query.compile_query(5)  # type: ignore[arg-type]


def test_a_query_for_another_tokenizer_is_refused() -> None:
    databases = segments(["red"], [])
    with pytest.raises(InvalidRequest):
        matching.match(keyword_query.compile_query("red", "trigram"), databases[0])
    databases[0].close()


def test_trigram_queries_of_two_characters_match_nothing() -> None:
    databases = segments(["abcdef", "xabcx"], [], "trigram")
    assert search(databases, "ab") == {}
    assert set(search(databases, "ABC")) == {0, 1}
    assert set(search(databases, "bcde")) == {0}
    databases[0].close()


def test_unicode61_folds_case_and_diacritics() -> None:
    databases = segments(["Crème BRÛLÉE", "creme"], [])
    assert set(search(databases, "crème")) == {0, 1}
    assert set(search(databases, "brulee")) == {0}
    databases[0].close()


def test_huge_and_odd_texts_are_indexed() -> None:
    texts = ["word " * 200_000 + "end", "nul\0inside word", "\U0001f600 word", "x" * 1_000_000]
    databases = segments(texts, [2])
    expected = OneTable([text.replace("\0", " ") for text in texts], "unicode61")
    for text in ("word", "end OR word", "inside", "nul inside", "NEAR(word end)"):
        assert search(databases, text) == pytest.approx(expected.search(text), rel=RELATIVE), text
    expected.sqlite.close()
    for database in databases:
        database.close()


def test_frequencies_that_cannot_be_inverted_are_counted_from_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = random_texts(random.Random(3), "unicode61", 40)
    databases = segments(texts, [10])
    queries = ["aa", "aa OR bb", '"aa bb" OR ab*', "^aa", "aa + b*"]
    inverted = [search(databases, text) for text in queries]
    monkeypatch.setattr(matching, "_ROUNDING", -1.0)
    assert [search(databases, text) for text in queries] == inverted
    for database in databases:
        database.close()


def test_a_keyword_query_has_a_deadline() -> None:
    databases = segments(["red"], [])
    with databases[0].asking(5), pytest.raises(Unavailable) as caught:
        matching.match(keyword_query.compile_query("red"), databases[0], timeout_s=0.01)
    assert caught.value.code == "timeout"
    databases[0].close()


def test_threads_can_compile_and_match_at_the_same_time() -> None:
    databases = segments(random_texts(random.Random(5), "unicode61", 200), [90])
    expected = search(databases, "aa OR bb")
    wrong = []

    def ask() -> None:
        for _ in range(10):
            if search(databases, "aa OR bb") != expected:
                wrong.append(1)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    for database in databases:
        database.close()


@pytest.mark.parametrize(
    "text", ["", ")", "a b)", "- a", "a :", "{a", "NEAR(a, b)", "NEAR(a", "a OR", "near(a b)", "(" * 100, '"a', "a + ", 'NEAR(a, "5")']
)
def test_the_tree_of_what_is_no_query_is_refused(text: str) -> None:
    with pytest.raises(fts_query.Refused):
        fts_query.parse(text)
