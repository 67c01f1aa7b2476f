"""The model: what an index holds, as plain dictionaries, and what each operation does to it. Knows nothing of segments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Doc:
    """One document: external id, fields, and the label of its vectors."""

    key: str | None
    fields: dict[str, Any]
    label: str


@dataclass(frozen=True)
class State:
    """What one generation holds."""

    docs: dict[int, Doc] = field(default_factory=dict)
    next_id: int = 0
    dim: int | None = None
    columns: frozenset[str] = frozenset()
    max_documents: int | None = None


@dataclass(eq=False)
class Op:
    """One call of a client, from its invocation to its outcome, and where in the history it took effect."""

    number: int
    kind: str
    index: str
    process: str
    args: dict[str, Any] = field(default_factory=dict)
    invoked_tick: int = 0
    invoked_s: float = 0.0
    outcome: str = "running"
    applied: list[tuple[str, int]] = field(default_factory=list)
    results: list[Any] = field(default_factory=list)

    def __str__(self) -> str:
        shown = {key: value for key, value in self.args.items() if key not in ("docs", "began_at")}
        return f"#{self.number} {self.kind} {self.index} {shown or ''} by {self.process}"


REFUSED = "refused"
"""Result of an operation that the model says must be refused, alone, as an invalid request."""


def apply(state: State, op: Op) -> tuple[State, Any]:
    """The state after an operation, and what it should return: ids of an add, the number of documents of a delete or update."""
    return _RULES[op.kind](state, op.args)


def fold(state: State, ops: Sequence[Op]) -> tuple[State, list[Any]]:
    results = []
    for op in ops:
        state, result = apply(state, op)
        results.append(result)
    return state, results


def _add(state: State, args: dict[str, Any]) -> tuple[State, Any]:
    docs: list[Doc] = args["docs"]
    if state.dim is not None and state.dim != args["dim"]:
        return state, REFUSED
    keys = {doc.key for doc in docs if doc.key is not None}
    kept = {number: doc for number, doc in state.docs.items() if doc.key not in keys or doc.key is None}
    ids = list(range(state.next_id, state.next_id + len(docs)))
    kept.update(zip(ids, docs, strict=True))
    limit = state.max_documents
    if limit is not None and args.get("evicts", True):
        for number in sorted(kept)[: max(len(kept) - limit, 0)]:
            del kept[number]
    columns = state.columns.union(*(doc.fields for doc in docs)) if docs else state.columns
    return replace(state, docs=kept, next_id=state.next_id + len(docs), dim=args["dim"], columns=columns), ids


def _build(state: State, args: dict[str, Any]) -> tuple[State, Any]:
    after, ids = _add(state, {**args, "evicts": False})
    return after, ids


def _delete(state: State, args: dict[str, Any]) -> tuple[State, Any]:
    gone = [number for number in args["ids"] if number in state.docs]
    kept = {number: doc for number, doc in state.docs.items() if number not in gone}
    return replace(state, docs=kept), len(gone)


def _update(state: State, args: dict[str, Any]) -> tuple[State, Any]:
    values: dict[str, Any] = args["values"]
    if not values.keys() <= state.columns:
        return state, REFUSED
    found = [number for number in args["ids"] if number in state.docs]
    docs = dict(state.docs)
    for number in found:
        docs[number] = replace(docs[number], fields={**docs[number].fields, **values})
    return replace(state, docs=docs), len(found)


def _configure(state: State, args: dict[str, Any]) -> tuple[State, Any]:
    return replace(state, max_documents=args["max_documents"]), None


def _nothing(state: State, args: dict[str, Any]) -> tuple[State, Any]:
    return state, None


_RULES = {"add": _add, "build": _build, "delete": _delete, "update": _update, "configure": _configure, "compact": _nothing}
