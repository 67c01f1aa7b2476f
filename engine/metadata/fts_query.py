"""The query language of SQLite's FTS5, as a tree (sqlite.org/fts5.html, 3). SQLite stays the judge of what is a query and where a phrase
occurs; keyword_query.py needs the tree to know which phrases a query has, which rows match and which phrases count in which row.

    expr     := and_expr { OR and_expr }          and_expr := not_expr { AND not_expr }          not_expr := primary { NOT primary }
    primary  := [colset :] "(" expr ")" | nearset { nearset }                   nearsets side by side: implicit AND
    nearset  := [colset :] ( [^] phrase | NEAR "(" phrase { phrase } [, number] ")" )
    phrase   := string [*] { + string [*] }
    colset   := [-] ( string | "{" string { string } "}" )

Accepts everything that FTS5 accepts, and a little more. Knows no tokenizer and no database: a phrase may turn out to have no tokens.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import msgspec

MAX_NESTING = 64
"""Parentheses. FTS5's own parser gives up at about 30."""
DEFAULT_DISTANCE = 10

# Whitespace and bare words as fts5ExprGetToken and sqlite3Fts5IsBareword have them; every character beyond ASCII is part of a word.
_TOKEN = re.compile(
    r'[ \t\n\r]*(?:"(?P<quoted>(?:[^"]|"")*)"|(?P<word>[A-Za-z0-9_\x1a\x80-\U0010ffff]+)|(?P<sign>[(){}:,+*^-])|(?P<end>\Z))'
)
_OPERATORS = frozenset(("AND", "OR", "NOT"))


class Refused(ValueError):
    """This is no FTS5 query."""


class Phrase(msgspec.Struct, frozen=True):
    """Strings in a row, each to be tokenised.

    parts    (string, is a prefix)
    initial  must stand at the beginning of the text
    scopes   column filters around it, outermost first
    """

    parts: tuple[tuple[str, bool], ...]
    initial: bool
    scopes: tuple[str, ...]

    def text(self) -> str:
        """This phrase alone as an FTS5 query."""
        return _scoped(("^ " if self.initial else "") + self.strings(), self.scopes)

    def strings(self) -> str:
        return " + ".join(quoted(string) + (" *" if prefix else "") for string, prefix in self.parts)


class Near(msgspec.Struct, frozen=True):
    """Two or more phrases with at most `distance` tokens between the first and the last of them."""

    phrases: tuple[Phrase, ...]
    distance: int
    scopes: tuple[str, ...]

    def text(self) -> str:
        inside = " ".join(phrase.strings() for phrase in self.phrases)
        return _scoped(f"NEAR({inside}, {self.distance})", self.scopes)


class Both(msgspec.Struct, frozen=True):
    """AND; if implicit, parts that have no tokens are as if they were not there."""

    parts: tuple[Node, ...]
    implicit: bool


class Either(msgspec.Struct, frozen=True):
    parts: tuple[Node, ...]


class Without(msgspec.Struct, frozen=True):
    wanted: Node
    unwanted: Node


Node = Phrase | Near | Both | Either | Without


class _Token(NamedTuple):
    kind: str  # string, operator, sign, end
    text: str
    quoted: bool = False


def parse(text: str) -> Node:
    """The tree of a query that is not empty. Raises Refused."""
    parser = _Parser(_tokens(text))
    tree = parser.either(())
    if parser.ahead().kind != "end":
        raise Refused("unexpected end of the query")
    return tree


def quoted(text: str) -> str:
    """A string of FTS5 that stands for this text, whatever it holds."""
    return '"' + text.replace('"', '""') + '"'


def _scoped(text: str, scopes: tuple[str, ...]) -> str:
    for scope in reversed(scopes):
        text = f"{scope} : ({text})"
    return text


def _tokens(text: str) -> list[_Token]:
    tokens: list[_Token] = []
    position = 0
    while not tokens or tokens[-1].kind != "end":
        match = _TOKEN.match(text, position)
        if match is None or match.lastgroup is None:
            raise Refused("not a word, a quoted string or an operator")
        found = match[match.lastgroup]
        if match.lastgroup == "quoted":
            tokens.append(_Token("string", found.replace('""', '"'), True))
        elif match.lastgroup == "word":
            tokens.append(_Token("operator" if found in _OPERATORS else "string", found))
        else:
            tokens.append(_Token(match.lastgroup, found))
        position = match.end()
    return tokens


class _Parser:
    """One method for each rule; `scopes` are the column filters that stand around what is parsed."""

    def __init__(self, tokens: list[_Token]) -> None:
        self.tokens = tokens
        self.position = 0
        self.nesting = 0

    def ahead(self, distance: int = 0) -> _Token:
        return self.tokens[min(self.position + distance, len(self.tokens) - 1)]

    def is_sign(self, signs: str, distance: int = 0) -> bool:
        token = self.ahead(distance)
        return token.kind == "sign" and token.text in signs

    def take(self, kind: str, text: str | None = None) -> _Token:
        token = self.ahead()
        if token.kind != kind or (text is not None and token.text != text):
            raise Refused(f"expected {text or kind}")
        self.position += 1
        return token

    def operator(self, name: str) -> bool:
        """Take the operator if it is next."""
        found = self.ahead().kind == "operator" and self.ahead().text == name
        self.position += found
        return found

    def either(self, scopes: tuple[str, ...]) -> Node:
        parts = [self.both(scopes)]
        while self.operator("OR"):
            parts.append(self.both(scopes))
        return parts[0] if len(parts) == 1 else Either(tuple(parts))

    def both(self, scopes: tuple[str, ...]) -> Node:
        parts = [self.without(scopes)]
        while self.operator("AND"):
            parts.append(self.without(scopes))
        return parts[0] if len(parts) == 1 else Both(tuple(parts), implicit=False)

    def without(self, scopes: tuple[str, ...]) -> Node:
        node = self.primary(scopes)
        while self.operator("NOT"):
            node = Without(node, self.primary(scopes))
        return node

    def primary(self, scopes: tuple[str, ...]) -> Node:
        start = self.position
        scope = self.column_set()
        if self.is_sign("("):
            self.nesting += 1
            if self.nesting > MAX_NESTING:
                raise Refused("nested too deeply")
            self.take("sign", "(")
            inner = self.either((*scopes, scope) if scope else scopes)
            self.take("sign", ")")
            self.nesting -= 1
            return inner
        self.position = start
        parts = [self.nearset(scopes)]
        while self.ahead().kind == "string" or self.is_sign("^{-"):
            parts.append(self.nearset(scopes))
        return parts[0] if len(parts) == 1 else Both(tuple(parts), implicit=True)

    def column_set(self) -> str:
        """A column filter as text, or "" if there is none ahead."""
        minus = "- " if self.is_sign("-") else ""
        if minus:
            self.position += 1
        if self.is_sign("{"):
            self.position += 1
            names = [self.take("string").text]
            while self.ahead().kind == "string":
                names.append(self.take("string").text)
            self.take("sign", "}")
        elif self.ahead().kind == "string" and self.is_sign(":", 1):
            names = [self.take("string").text]
        elif minus:
            raise Refused("expected a column after -")
        else:
            return ""
        self.take("sign", ":")
        return minus + "{" + " ".join(quoted(name) for name in names) + "}"

    def nearset(self, scopes: tuple[str, ...]) -> Node:
        scope = self.column_set()
        if scope:
            scopes = (*scopes, scope)
        initial = self.is_sign("^")
        if initial:
            self.position += 1
        elif self.ahead().kind == "string" and self.is_sign("(", 1):
            return self.near(scopes)
        return self.phrase(initial, scopes)

    def near(self, scopes: tuple[str, ...]) -> Node:
        if self.take("string") != _Token("string", "NEAR"):
            raise Refused("expected NEAR before (")
        self.take("sign", "(")
        phrases = [self.phrase(False, scopes)]
        while self.ahead().kind == "string":
            phrases.append(self.phrase(False, scopes))
        distance = DEFAULT_DISTANCE
        if self.is_sign(","):
            self.position += 1
            number = self.take("string")
            if number.quoted or not re.fullmatch("[0-9]{1,9}", number.text):
                raise Refused("expected a number of tokens")
            distance = int(number.text)
        self.take("sign", ")")
        return Near(tuple(phrases), distance, scopes)

    def phrase(self, initial: bool, scopes: tuple[str, ...]) -> Phrase:
        parts = [self.part()]
        while self.is_sign("+"):
            self.position += 1
            parts.append(self.part())
        return Phrase(tuple(parts), initial, scopes)

    def part(self) -> tuple[str, bool]:
        text = self.take("string").text
        prefix = self.is_sign("*")
        self.position += prefix
        return text, prefix
