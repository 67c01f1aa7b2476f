"""The filter language: text and parameters to a checked tree, and the tree to SQL that holds nothing a user wrote.

    condition := INT "=" INT                      (whole condition only, e.g. 1=1)
               | or_expr
    or_expr   := and_expr { OR and_expr }
    and_expr  := unary { AND unary }
    unary     := [NOT] primary
    primary   := "(" or_expr ")"
               | column IS [NOT] NULL
               | column [NOT] BETWEEN ? AND ?
               | column [NOT] IN ( ? {, ?} )
               | column [NOT] LIKE ?
               | column [NOT] REGEXP ?
               | column ( = | != | <> | < | <= | > | >= ) ?
    column    := identifier | "identifier"

The SQL is made from the tree: operators and column names come from our own tables, values are bound. There is no way for text of the
user into SQL. While parsing, NOT is pushed down to the comparisons (De Morgan's laws hold in three-valued logic) and chains of one
operator are made flat; then each level costs SQLite's parser one stack entry, of which it has 100.

Called by database.py, connection.py and the routes; imports no sqlite3 and evaluates nothing, but tests and keeps the patterns of REGEXP.
"""

from __future__ import annotations

import re
from collections.abc import Sequence, Set
from typing import NamedTuple, NoReturn

import msgspec
import regex

from engine.errors import InvalidRequest
from engine.metadata.schema import SUBSET, Columns, Value, plain_value

MAX_CONDITION_CHARS = 500_000
MAX_PARAMETERS = 100_000
"""Long IN lists go to a temporary table, so this is a bound on time, not SQLite's limit on variables (32,766 in its default build)."""
MAX_TERMS = 2000
"""Comparisons in one condition. SQLite prepares n of them in n² steps and cannot be interrupted: 2000 take 0.1 s, 10,000 take 2.7 s."""
MAX_PARENTHESES = 64
MAX_DEPTH = 48
"""Levels of AND under OR under AND once it is flat; test_condition.py tries the worst trees against SQLite's parser stack."""
MAX_PATTERN_CHARS = 1000
"""Of LIKE and REGEXP. LIKE cannot be interrupted and costs pattern x text; nor can the compiling of a regular expression."""
MAX_PATTERN_REPEATS = 100_000
INLINE_ELEMENTS = 100
"""An IN list longer than this is put into a temporary table."""
MAX_INLINE_PARAMETERS = 3000
"""With more parameters than this, for the reason of MAX_TERMS, every IN list is."""
_CHAIN = 16
"""Longer chains of one operator are cut into groups: SQLite's expressions are at most 1000 deep, and a chain is as deep as it is long."""

_FORBIDDEN = re.compile(
    r"(?<![A-Za-z0-9_])(?:SELECT|UNION|INSERT|UPDATE|DELETE|DROP|CREATE|ALTER|TRUNCATE|EXEC|EXECUTE|GRANT|REVOKE)(?![A-Za-z0-9_])",
    re.IGNORECASE,
)
_SQL_WORDS = frozenset(
    (
        *(
            "ADD",
            "ALL",
            "ALTER",
            "AND",
            "AS",
            "AUTOINCREMENT",
            "BETWEEN",
            "CASE",
            "CAST",
            "CHECK",
            "COLLATE",
            "COMMIT",
            "CONSTRAINT",
            "CREATE",
        ),
        *("CURRENT_DATE", "CURRENT_TIME", "CURRENT_TIMESTAMP", "DEFAULT", "DEFERRABLE", "DELETE", "DISTINCT", "DROP", "ELSE", "ESCAPE"),
        *("EXCEPT", "EXISTS", "FOREIGN", "FROM", "GROUP", "HAVING", "IN", "INDEX", "INSERT", "INTERSECT", "INTO", "IS", "ISNULL", "JOIN"),
        *(
            "LIKE",
            "LIMIT",
            "NOT",
            "NOTHING",
            "NOTNULL",
            "NULL",
            "ON",
            "OR",
            "ORDER",
            "PRIMARY",
            "RAISE",
            "REFERENCES",
            "REGEXP",
            "RETURNING",
        ),
        *("SELECT", "SET", "TABLE", "THEN", "TO", "TRANSACTION", "UNION", "UNIQUE", "UPDATE", "USING", "VALUES", "WHEN", "WHERE"),
    )
)
"""Words that cannot stand for a column unless quoted: the words of our grammar and SQLite's reserved words, found by trying each keyword
of sqlite.org/lang_keywords.html as a column."""
_TOKEN = re.compile(
    r"[ \t\n\v\f\r]*(?:(?P<word>[A-Za-z_][A-Za-z0-9_]*)|(?P<int>[0-9]+)|"
    r'"(?P<quoted>[^"]*)"|(?P<sign><=|>=|!=|<>|[=<>(),?])|(?P<end>\Z)|(?P<other>.))',
    re.DOTALL,
)
_COMPARISONS = frozenset(("=", "!=", "<>", "<", "<=", ">", ">="))
_REPEAT = re.compile(r"\{([0-9]+)")


class Always(msgspec.Struct, frozen=True):
    value: bool


class IsNull(msgspec.Struct, frozen=True):
    column: str
    negated: bool


class Compare(msgspec.Struct, frozen=True):
    """column operator ?, where a parameter is known by its number."""

    column: str
    operator: str
    negated: bool
    parameter: int


class Between(msgspec.Struct, frozen=True):
    """column BETWEEN parameter AND the one after it."""

    column: str
    negated: bool
    parameter: int


class In(msgspec.Struct, frozen=True):
    """column IN the `count` parameters from `parameter` on."""

    column: str
    negated: bool
    parameter: int
    count: int


class Junction(msgspec.Struct, frozen=True):
    """AND or OR of at least two parts, none of them a junction of the same operator."""

    operator: str
    parts: tuple[Node, ...]
    depth: int


Leaf = Always | IsNull | Compare | Between | In
Node = Leaf | Junction


class Condition(NamedTuple):
    """A condition that parsed and names only columns that exist, with its parameters as SQLite takes them."""

    tree: Node
    parameters: tuple[Value, ...]


class Fragment(NamedTuple):
    """A WHERE expression, its bound values, and lists of values that must stand in temp.lists(list, value) under their numbers."""

    sql: str
    parameters: list[Value]
    lists: list[tuple[Value, ...]]


def parse(text: str, parameters: Sequence[object], columns: Columns) -> Condition:
    """Check a condition against the columns of the index and take in its parameters.

    text        grammar above; keywords and columns are case-insensitive
    parameters  one for each `?`, in order; JSON values (bool -> 1/0, list or object -> JSON text)
    columns     of the whole index, so that an unknown column is an error whatever segments are searched; `_subset_` is always known

    Raises InvalidRequest, code invalid-condition. Cost: linear in the text.
    """
    _check_text(text)
    if len(parameters) > MAX_PARAMETERS:
        _refuse("too many parameters", limit=MAX_PARAMETERS, found=len(parameters))
    parser = _Parser(text, columns)
    tree = parser.condition()
    if parser.n_parameters != len(parameters):
        _refuse("the number of parameters differs from the number of ?", expected=parser.n_parameters, found=len(parameters))
    values = tuple(_parameter(value, number) for number, value in enumerate(parameters))
    for leaf in parser.patterns:
        _check_pattern(leaf.operator, values[leaf.parameter])
    return Condition(tree, values)


def render(condition: Condition, present: Set[str], subset_sql: str) -> Fragment:
    """The condition as SQL over a table that has the columns `present` (canonical names); other columns are null there.

    A column that a segment lacks needs no declared type: every comparison with null is null, whatever the affinity.
    """
    fragment = _Renderer(condition.parameters, present, subset_sql)
    return Fragment(fragment.node(condition.tree), fragment.bound, fragment.lists)


def compile_pattern(pattern: str) -> regex.Pattern[str]:
    """A REGEXP pattern, compiled. Raises InvalidRequest if it does not compile or would be too costly to.

    The package `regex` (not `re`) because its matching takes a timeout. Its compiler unrolls counted repeats, so the product of all counts
    is limited: crude, but (a{1000}){1000} alone takes most of a second, and each further level a thousand times that.
    """
    if len(pattern) > MAX_PATTERN_CHARS:
        _refuse("the pattern is too long", limit=MAX_PATTERN_CHARS, found=len(pattern))
    repeats = 1
    for count in _REPEAT.findall(pattern):
        repeats *= max(1, int(count))
    if repeats > MAX_PATTERN_REPEATS:
        _refuse("the pattern repeats too often", limit=MAX_PATTERN_REPEATS)
    try:
        return regex.compile(pattern, flags=regex.VERSION0)
    except (regex.error, RecursionError, OverflowError, ValueError, KeyError, IndexError) as error:
        raise InvalidRequest("the pattern is no regular expression", code="invalid-condition", reason=str(error)[:140]) from error


def pattern_text(value: Value) -> str:
    """A REGEXP pattern that was given as a number is its decimal text."""
    return value if isinstance(value, str) else str(value)


class _Tokens:
    """The words and signs of a condition, one ahead. A word is (kind, text); the end is ("end", "")."""

    def __init__(self, text: str) -> None:
        self._matches = _TOKEN.finditer(text)  # every position matches something, so the matches lie end to end
        self.kind, self.text, self.position = "", "", 0
        self.advance()

    def advance(self) -> None:
        match = next(self._matches)
        assert match.lastgroup is not None
        self.kind, self.text, self.position = match.lastgroup, match[match.lastgroup], match.start(match.lastgroup)
        if self.kind == "other":
            if self.text == '"':
                _refuse("unterminated quote", position=self.position)
            _refuse("unexpected character", character=repr(self.text), position=self.position)

    def keyword(self) -> str:
        """The word ahead in capitals; "" unless it is an unquoted word."""
        return self.text.upper() if self.kind == "word" else ""

    def expect(self, text: str) -> None:
        """Take this keyword or sign, or raise."""
        found = self.keyword() or (self.text if self.kind == "sign" else "")
        if found != text:
            self.refuse(text)
        self.advance()

    def refuse(self, expected: str) -> NoReturn:
        found = "end of condition" if self.kind == "end" else self.text[:60]
        _refuse(f"expected {expected}, found {found}", position=self.position)


class _Parser:
    """Recursive descent; one method for each rule of the grammar. NOT is pushed down on the way: `negated` is true below an odd number."""

    def __init__(self, text: str, columns: Columns) -> None:
        self.tokens = _Tokens(text)
        self.columns = {name.lower(): name for name, _ in columns} | {SUBSET: SUBSET}
        self.n_parameters = 0
        self.n_terms = 0
        self.n_open = 0
        self.patterns: list[Compare] = []

    def condition(self) -> Node:
        if self.tokens.kind == "int":
            return self.constant()
        tree = self.junction("OR", False)
        if self.tokens.kind != "end":
            self.tokens.refuse("end of condition")
        return tree

    def constant(self) -> Node:
        left = self.tokens.text
        self.tokens.advance()
        self.tokens.expect("=")
        if self.tokens.kind != "int":
            self.tokens.refuse("a number")
        right = self.tokens.text
        self.tokens.advance()
        if self.tokens.kind != "end":
            self.tokens.refuse("end of condition")
        return Always(left.lstrip("0") == right.lstrip("0"))

    def junction(self, operator: str, negated: bool) -> Node:
        parts = [self.junction("AND", negated) if operator == "OR" else self.unary(negated)]
        while self.tokens.keyword() == operator:
            self.tokens.advance()
            parts.append(self.junction("AND", negated) if operator == "OR" else self.unary(negated))
        return _joined({"OR": "AND", "AND": "OR"}[operator] if negated else operator, parts)

    def unary(self, negated: bool) -> Node:
        if self.tokens.keyword() == "NOT":
            self.tokens.advance()
            return self.primary(not negated)
        return self.primary(negated)

    def primary(self, negated: bool) -> Node:
        if self.tokens.kind == "sign" and self.tokens.text == "(":
            self.n_open += 1
            if self.n_open > MAX_PARENTHESES:
                _refuse("parentheses are nested too deeply", limit=MAX_PARENTHESES)
            self.tokens.advance()
            inner = self.junction("OR", negated)
            self.tokens.expect(")")
            self.n_open -= 1
            return inner
        self.n_terms += 1
        if self.n_terms > MAX_TERMS:
            _refuse("too many comparisons", limit=MAX_TERMS)
        return self.comparison(self.column(), negated)

    def column(self) -> str:
        tokens = self.tokens
        if tokens.kind not in ("word", "quoted") or tokens.keyword() in _SQL_WORDS:
            tokens.refuse("a column")
        name = self.columns.get(tokens.text.lower()) if tokens.text.isascii() else None
        if name is None:
            _refuse("unknown column", column=repr(tokens.text)[:140])
        tokens.advance()
        return name

    def comparison(self, column: str, negated: bool) -> Leaf:
        tokens = self.tokens
        if tokens.kind == "sign" and tokens.text in _COMPARISONS:
            operator = "!=" if tokens.text == "<>" else tokens.text
            tokens.advance()
            return Compare(column, operator, negated, self.parameter())
        if tokens.keyword() == "IS":
            tokens.advance()
            if tokens.keyword() == "NOT":
                tokens.advance()
                negated = not negated
            tokens.expect("NULL")
            return IsNull(column, negated)
        if tokens.keyword() == "NOT":
            tokens.advance()
            negated = not negated
            expected = "BETWEEN, IN, LIKE or REGEXP"
        else:
            expected = "an operator"
        operator = tokens.keyword()
        if operator not in ("BETWEEN", "IN", "LIKE", "REGEXP"):
            tokens.refuse(expected)
        tokens.advance()
        return self.worded(column, operator, negated)

    def worded(self, column: str, operator: str, negated: bool) -> Leaf:
        if operator == "BETWEEN":
            first = self.parameter()
            self.tokens.expect("AND")
            self.parameter()
            return Between(column, negated, first)
        if operator == "IN":
            self.tokens.expect("(")
            first = self.parameter()
            while self.tokens.kind == "sign" and self.tokens.text == ",":
                self.tokens.advance()
                self.parameter()
            self.tokens.expect(")")
            return In(column, negated, first, self.n_parameters - first)
        leaf = Compare(column, operator, negated, self.parameter())
        self.patterns.append(leaf)
        return leaf

    def parameter(self) -> int:
        self.tokens.expect("?")
        self.n_parameters += 1
        return self.n_parameters - 1


class _Renderer:
    """Writes a tree as SQL, collecting what must be bound in the order in which it is written."""

    def __init__(self, parameters: tuple[Value, ...], present: Set[str], subset_sql: str) -> None:
        self.parameters = parameters
        self.present = present
        self.subset_sql = subset_sql
        self.inline_elements = INLINE_ELEMENTS if len(parameters) <= MAX_INLINE_PARAMETERS else 0
        self.bound: list[Value] = []
        self.lists: list[tuple[Value, ...]] = []

    def node(self, node: Node) -> str:
        if isinstance(node, Junction):
            # Deepest part first: the parser's stack then grows by one for each level and not by three.
            return self.chain(node.operator, sorted(node.parts, key=_depth, reverse=True))
        return self.leaf(node)

    def chain(self, operator: str, parts: list[Node]) -> str:
        if len(parts) <= _CHAIN:
            return "(" + f" {operator} ".join([self.node(part) for part in parts]) + ")"
        size = -(-len(parts) // _CHAIN)
        groups = [parts[start : start + size] for start in range(0, len(parts), size)]
        return "(" + f" {operator} ".join([self.chain(operator, group) for group in groups]) + ")"

    def leaf(self, leaf: Leaf) -> str:
        if isinstance(leaf, Always):
            return "1" if leaf.value else "0"
        if leaf.column == SUBSET:
            column = self.subset_sql
        elif leaf.column in self.present:
            column = f'"{leaf.column}"'
        elif isinstance(leaf, IsNull):
            return "0" if leaf.negated else "1"
        else:
            return "NULL"
        sql = self.test(leaf, column)
        return f"NOT ({sql})" if leaf.negated else sql

    def test(self, leaf: IsNull | Compare | Between | In, column: str) -> str:
        if isinstance(leaf, IsNull):
            return f"{column} IS NULL"
        first = leaf.parameter
        if isinstance(leaf, Between):
            self.bound += self.parameters[first : first + 2]
            return f"{column} BETWEEN ? AND ?"
        if isinstance(leaf, In):
            return f"{column} IN ({self.elements(self.parameters[first : first + leaf.count])})"
        self.bound.append(self.parameters[first])
        if leaf.operator == "REGEXP":
            return f"regexp(?, CAST({column} AS TEXT))"
        return f"{column} {leaf.operator} ?"

    def elements(self, values: tuple[Value, ...]) -> str:
        """The right side of IN. The unary plus takes the affinity away that a column of a table would have and a bound value has not."""
        if len(values) <= self.inline_elements:
            self.bound += values
            return ",".join("?" * len(values))
        self.lists.append(values)
        self.bound.append(len(self.lists) - 1)
        return "SELECT +value FROM temp.lists WHERE list = ?"


def _joined(operator: str, parts: list[Node]) -> Node:
    """One junction of the parts, flat: parts that are junctions of the same operator give their own parts."""
    if len(parts) == 1:
        return parts[0]
    flat: list[Node] = []
    for part in parts:
        if isinstance(part, Junction) and part.operator == operator:
            flat += part.parts
        else:
            flat.append(part)
    depth = 1 + max(_depth(part) for part in flat)
    if depth > MAX_DEPTH:
        _refuse("the condition is nested too deeply", limit=MAX_DEPTH)
    return Junction(operator, tuple(flat), depth)


def _depth(node: Node) -> int:
    return node.depth if isinstance(node, Junction) else 0


def _check_text(text: object) -> None:
    """What is refused before any grammar, each with its own message, even inside a quoted column."""
    if not isinstance(text, str):
        _refuse("a condition is a string", found=type(text).__name__)
    if len(text) > MAX_CONDITION_CHARS:
        _refuse("the condition is too long", limit=MAX_CONDITION_CHARS, found=len(text))
    if not text.strip():
        _refuse("the condition is empty")
    if "--" in text or "/*" in text or "*/" in text:
        _refuse("comments are not allowed in a condition")
    if ";" in text:
        _refuse("semicolons are not allowed in a condition")
    word = _FORBIDDEN.search(text)
    if word is not None:
        _refuse("this keyword is not allowed in a condition", keyword=word[0].upper())


def _parameter(value: object, number: int) -> Value:
    try:
        return plain_value(value)
    except InvalidRequest as error:
        raise InvalidRequest(f"parameter {number}: {error.message}", code="invalid-condition") from error


def _check_pattern(operator: str, value: Value) -> None:
    if value is None:
        return
    text = pattern_text(value)
    if operator == "REGEXP":
        compile_pattern(text)
    elif len(text.encode()) > MAX_PATTERN_CHARS:
        _refuse("the LIKE pattern is too long", limit_bytes=MAX_PATTERN_CHARS)


def _refuse(message: str, **details: object) -> NoReturn:
    raise InvalidRequest(message, code="invalid-condition", **details)
