"""Bucket, model and processes together, and every check.

The history of an index is what its CURRENT held, one after the other. Each move of CURRENT is explained by the operations that asked for
it: the model applies them to the generation before, the auditor decodes the bytes of the generation after, and both must be equal. What
clients were told is compared with that history when their calls return.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np

import engine.index.commit
import engine.index.writer
import engine.store.objects
from engine.config import MaintenanceParams
from engine.errors import Conflict, CorruptData, EngineError, InvalidRequest, NotFound, Unavailable
from engine.format import names
from engine.format.envelope import Kind, parse_header
from engine.format.manifest import Manifest, decode_manifest
from engine.format.markers import Alias, BuildProgress, Deletion, read_marker
from engine.index import clock as clock_module
from engine.index.reader import MAX_HEAD_AGE_S, Reader
from engine.index.references import objects_of
from engine.store.objects import StoreOptions, _RemoteStore

from .audit import Auditor
from .model import REFUSED, Doc, Op, State, apply, fold
from .scheduler import PROCESS, Loop, Process, SimulatedClock
from .store import CALM, OPERATIONS, Bucket, Stored, Weather, Wire, asked_for

DIM = 8
SLACK_S = 3.0
"""Timestamps of listings are whole seconds, so an age may be wrong by one each way."""
OPTIONS = StoreOptions(attempts=3, retry_budget_s=12.0, first_backoff_s=0.05, max_backoff_s=1.0, timeout_s=4.0)
_DIGITS = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"


class Violation(Exception):
    """A promise is broken. `kind` is short and stable, so that shrinking knows the same failure again."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind, self.message = kind, message


@dataclass(eq=False)
class Life:
    """An index from its creation to its deletion. A branch is confirmed when its maker was told so."""

    index: str
    id: str
    alive: bool = True
    confirmed: bool = True
    damage: str = ""


@dataclass(eq=False)
class Record:
    """One generation, as it was committed."""

    life: Life
    manifest: Manifest
    data: bytes
    state: State
    objects: frozenset[str]
    began_tick: int
    began_s: float
    ended_tick: int | None = None
    ended_s: float | None = None

    @property
    def generation(self) -> int:
        return self.manifest.generation

    @property
    def archive(self) -> str:
        return names.manifest(self.life.index, self.life.id, self.generation)


@dataclass
class Entry:
    """What CURRENT of an index held from one tick to another; None: there was none."""

    record: Record | None
    from_tick: int
    from_s: float
    to_tick: int | None = None
    to_s: float | None = None


@dataclass
class Settings:
    """One episode's circumstances; shrinking takes things away from it."""

    seed: str
    steps: int
    weather: Weather = CALM
    n_processes: int = 3
    n_clients: int = 3
    weights: dict[str, float] = field(default_factory=dict)
    kills: float = 0.0
    freezes: float = 0.0
    skew_s: float = 0.0
    lulls: float = 0.05
    think_s: float = 0.4
    hot: float = 0.0
    lag_s: float = 0.0
    scenes: tuple[str, ...] = ()
    """Not empty: a directed episode of these scenes (scenes.py) instead of one in which everybody does as he likes."""
    keep_trace: bool = False


class World:
    """Everything of one episode."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.loop = Loop(f"loop {settings.seed}")
        self.bucket = Bucket(self.loop, random.Random(f"lag {settings.seed}"), settings.lag_s)
        self.bucket.witness = self
        self.rng = random.Random(f"world {settings.seed}")
        self.params = MaintenanceParams(
            min_quantise_documents=8, max_flat_tokens=40, max_flat_segments=4, merge_factor=2, retrain_growth=1.3, max_segment_documents=24
        )
        self.weather = settings.weather
        self.auditor = Auditor(self.bucket.objects)
        self.timeline: dict[str, list[Entry]] = {}
        self.lives: dict[str, Life] = {}
        self.records: dict[tuple[str, int], Record] = {}
        self.named_by: dict[str, list[Record]] = {}
        self.pinned: dict[tuple[str, int], dict[str, None]] = {}
        self.aliases: dict[str, list[tuple[int, str | None]]] = {}
        self.unfinished: list[tuple[str, Any, list[Doc]]] = []
        self.built: dict[tuple[str, str], int] = {}
        self.tidied: set[tuple[str, str]] = set()
        self.ops: list[Op] = []
        self.vectors: dict[str, np.ndarray] = {}
        self.steps = 0
        self.tick = 0
        self.stopping = False
        self.lull_until = 0.0
        self.last_sweep_tick = -1
        self.violation: Violation | None = None
        self.counts: Counter[str] = Counter()
        self.leftovers: list[str] = []
        self.trace: deque[str] = deque(maxlen=None if settings.keep_trace else 300)
        self._hash = hashlib.blake2b(digest_size=16)
        self._seen_segments: set[str] = set()
        self._ids_rng = random.Random(f"ids {settings.seed}")

    # Trace

    def note(self, line: str) -> None:
        text = f"{self.loop.now:12.4f} {line}"
        self._hash.update(text.encode())
        self.trace.append(text)

    @property
    def trace_hash(self) -> str:
        return self._hash.hexdigest()

    def fail(self, kind: str, message: str) -> None:
        """Remember the first broken promise and stop everything."""
        if self.violation is None:
            self.violation = Violation(kind, message)
            self.note(f"VIOLATION {kind}: {message}")
            self.loop.stop()

    # Processes

    def fresh_id(self) -> str:
        """A ULID of virtual time, by the clock of the process that asks."""
        process = PROCESS.get()
        millis = int((1_800_000_000 + self.loop.now + (process.skew_s if process else 0)) * 1000)
        number = (millis << 80) | self._ids_rng.getrandbits(80)
        return "".join(_DIGITS[(number >> shift) & 31] for shift in range(125, -1, -5))

    def reader_of(self, process: Process, memory_bytes: int) -> Reader:
        rng = random.Random(f"wire {process.name} {self.settings.seed}")
        store = _RemoteStore(Wire(self.bucket, process, rng, lambda: self.weather), OPTIONS)  # type: ignore[arg-type]
        return Reader(store, memory_bytes=memory_bytes, clock=SimulatedClock(process))  # type: ignore[arg-type]

    # Witness of the bucket

    def step(self, process: Process, kind: str, name: str, outcome: str) -> None:
        self.steps += 1
        self.counts[f"fault {outcome}" if outcome != "ok" else f"request {kind}"] += 1
        self.note(f"{process.name} {kind} {name} {outcome}")
        if self.steps >= self.settings.steps:
            self.stopping = True
        if process.on_served is not None:
            process.on_served(kind, name)

    def put(self, name: str, before: Stored | None, after: Stored, operations: tuple[Any, ...]) -> None:
        self.tick += 1
        index, _, rest = name.partition("/")
        try:
            if rest == names.CURRENT:
                self._current_moves(index, after, operations)
            elif index + "/" == names.aliases():
                self._alias_moves(rest, before is None, read_marker(after.data, Alias, name=name).index, operations)
            elif before is not None and before.data != after.data:
                raise Violation("rewritten", f"{name} was written twice with different bytes")
        except Violation as violation:
            self.fail(violation.kind, violation.message)

    def delete(self, name: str, before: Stored, operations: tuple[Any, ...]) -> None:
        self.tick += 1
        index, _, rest = name.partition("/")
        try:
            if rest == names.CURRENT:
                raise Violation("removed", f"CURRENT of {index} was deleted by {[str(op) for op in operations]}")
            if index + "/" == names.aliases():
                self._alias_moves(rest, False, None, operations)
            elif name.startswith(names.builds(index)):
                self._note_tidied(index, name, before)
            else:
                self._check_deletion(name)
        except Violation as violation:
            self.fail(violation.kind, violation.message)

    # History

    def now_entry(self, index: str) -> Entry:
        entries = self.timeline.setdefault(index, [Entry(None, 0, 0.0)])
        return entries[-1]

    def current(self, index: str) -> Record | None:
        return self.now_entry(index).record

    def in_force(self, index: str, since_tick: int = 0, since_s: float | None = None) -> list[Record | None]:
        """What CURRENT held at any moment since, now included."""
        self.now_entry(index)
        entries = self.timeline[index]
        if since_s is not None:
            return [entry.record for entry in entries if entry.to_s is None or entry.to_s >= since_s]
        return [entry.record for entry in entries if entry.to_tick is None or entry.to_tick > since_tick]

    def _turn(self, index: str, record: Record | None) -> None:
        last = self.now_entry(index)
        last.to_tick, last.to_s = self.tick, self.loop.now
        if last.record is not None:
            last.record.ended_tick, last.record.ended_s = self.tick, self.loop.now
        self.timeline[index].append(Entry(record, self.tick, self.loop.now))

    def _current_moves(self, index: str, after: Stored, operations: tuple[Op, ...]) -> None:
        if parse_header(after.data, name=names.current(index)).kind is Kind.DELETION:
            self._index_ends(index, read_marker(after.data, Deletion, name=names.current(index)), operations)
            return
        manifest = decode_manifest(after.data, name=names.current(index))
        asked = ", ".join(map(str, operations)) or "nobody"
        old = self.current(index)
        if old is None:
            state, life = self._created(index, manifest, operations)
        else:
            life = old.life
            self._check_succession(old, manifest)
            state = self._followed(old, manifest, operations)
            if any(op.kind == "compact" for op in operations):
                self._check_training(old.manifest, manifest)
            if any(op.kind == "build" for op in operations):  # it brings the columns that were there when it began
                state = replace(state, columns=state.columns | {column.name for column in manifest.columns} & {"n", "t"})
        objects = frozenset(objects_of(manifest, index))
        missing = sorted(name for name in objects if name not in self.bucket.objects)
        if missing and not life.confirmed:
            life.damage = life.damage or f"{missing[0]} is not there when the branch is made"
        elif missing and not life.damage:
            raise Violation(
                "dangling", f"{index} generation {manifest.generation} names {missing[0]}, which is not there; asked for by {asked}"
            )
        if not missing:
            self._compare(index, manifest, state, asked)
        record = Record(life, manifest, after.data, state, objects, self.tick, self.loop.now)
        self.records[life.id, manifest.generation] = record
        for name in sorted(objects):
            self.named_by.setdefault(name, []).append(record)
        self._turn(index, record)
        self.counts["generations"] += 1
        for segment in manifest.segments:
            self.counts[f"generations with {segment.kind} segments"] += segment is manifest.segments[0]
        self.note(f"  {index} is generation {manifest.generation} of {life.id[-4:]}: {sorted(state.docs)} next {state.next_id}, by {asked}")

    def _check_succession(self, old: Record, manifest: Manifest) -> None:
        index = old.life.index
        if manifest.index_id != old.life.id:
            raise Violation("succession", f"CURRENT of {index} turned into another index")
        if manifest.generation != old.generation + 1:
            raise Violation("succession", f"{index}: generation {old.generation} was followed by {manifest.generation}")
        if manifest.created_s < old.manifest.created_s:
            raise Violation("succession", f"{index}: time ran backwards at generation {manifest.generation}")
        kept = self.bucket.objects.get(old.archive)
        if kept is None or kept.data != old.data:
            raise Violation("archive", f"{index} generation {old.generation} was replaced and not kept")

    def _created(self, index: str, manifest: Manifest, operations: tuple[Op, ...]) -> tuple[State, Life]:
        if len(operations) != 1 or operations[0].kind not in ("create", "branch"):
            raise Violation("phantom", f"{index} came into being for {[str(op) for op in operations]}")
        op = operations[0]
        if manifest.index_id in self.lives:
            raise Violation("twice", f"{index} came back after it was deleted, by {op}")
        self._note_applied(op, manifest.index_id, manifest.generation, None)
        life = self.lives[manifest.index_id] = Life(index, manifest.index_id, confirmed=op.kind == "create")
        if op.kind == "create":
            return State(max_documents=op.args["max_documents"]), life
        source = op.args["source"]
        objects = frozenset(objects_of(manifest, index))
        lives = {record.life.id for record in self.in_force(source, op.invoked_tick) if record is not None}
        matching = [
            record
            for record in self.records.values()
            if record.life.id in lives
            and manifest.cause == f"branch of {source} generation {record.generation}"
            and (record.life.index, record.objects, record.manifest.next_id) == (source, objects, manifest.next_id)
        ]
        if not matching:
            raise Violation("branch", f"{index} is a branch of nothing that {source} ever was")
        alike = [record for record in matching if record.manifest.config == manifest.config]  # of several lives that are empty
        return (alike or matching)[-1].state, life

    def _followed(self, old: Record, manifest: Manifest, operations: tuple[Op, ...]) -> State:
        """The model's word on what comes after `old`."""
        if not operations:
            raise Violation("phantom", f"{old.life.index} was changed by nobody")
        if operations[0].kind == "rollback":
            op = operations[0]
            target = self.records.get((old.life.id, op.args["generation"]))
            if target is None:
                raise Violation("rollback", f"{op} to a generation that never was")
            self._note_applied(op, old.life.id, manifest.generation, None)
            return replace(target.state, next_id=max(target.state.next_id, old.state.next_id))
        for op in operations:
            if op.index != old.life.index or op.kind not in ("add", "build", "delete", "update", "configure", "compact"):
                raise Violation("phantom", f"{old.life.index} was changed by {op}")
        state, results = fold(old.state, operations)
        for op, result in zip(operations, results, strict=True):
            if op.kind != "compact" and result is not REFUSED:
                self._note_applied(op, old.life.id, manifest.generation, result)
        return state

    def _check_training(self, old: Manifest, new: Manifest) -> None:
        """A codec is trained only when the index has outgrown all that it has. Else compaction would train for ever."""
        known = {codec.id for codec in old.codecs}
        trained_on = max((codec.n_tokens_trained for codec in old.codecs), default=0)
        for codec in new.codecs:
            if codec.id not in known and codec.n_tokens_trained <= self.params.retrain_growth * trained_on:
                raise Violation("loop", f"a codec was trained on {codec.n_tokens_trained} tokens although there is one of {trained_on}")

    def _note_applied(self, op: Op, life: str, generation: int, result: Any) -> None:
        has_effect = op.kind in ("add", "build", "create", "branch", "rollback") or bool(result)
        if op.kind == "build":
            what = (life, op.args["source_of"])
            given_again = what in self.tidied and op.args["began_at"]() >= self.built[what]  # a run begins when it first reads the index
            if what in self.built and not given_again:
                raise Violation("twice", f"{op} brought documents that an earlier run had brought already")
            self.built[what] = generation
            self.tidied.discard(what)
        if op.applied and has_effect:
            raise Violation("twice", f"{op} took effect at {op.applied} and again at generation {generation}")
        if op.outcome.startswith("refused") and has_effect:
            raise Violation("refused", f"{op} was answered with '{op.outcome}' and took effect at generation {generation}")
        op.applied.append((life, generation))
        op.results.append(result)

    def _compare(self, index: str, manifest: Manifest, state: State, asked: str) -> None:
        """What the bytes say against what the model says."""
        where = f"{index} generation {manifest.generation}, asked for by {asked}"
        try:
            found = self.auditor.documents(manifest, index)
        except (AssertionError, EngineError, KeyError, ValueError, StopIteration) as error:
            raise Violation("unreadable", f"{where}: {error!r}") from error
        if manifest.next_id != state.next_id:
            raise Violation("ids", f"{where}: next_id is {manifest.next_id}, should be {state.next_id}")
        if found.keys() != state.docs.keys():
            lost, extra = sorted(state.docs.keys() - found.keys()), sorted(found.keys() - state.docs.keys())
            raise Violation("documents", f"{where}: documents {lost} are lost and {extra} should not be there")
        if manifest.n_documents != len(found):
            raise Violation("documents", f"{where}: counts {manifest.n_documents} documents and has {len(found)}")
        if manifest.config.max_documents != state.max_documents:
            raise Violation("config", f"{where}: max_documents is {manifest.config.max_documents}, should be {state.max_documents}")
        if {column.name for column in manifest.columns} != state.columns:
            raise Violation("columns", f"{where}: columns are {[c.name for c in manifest.columns]}, should be {sorted(state.columns)}")
        new = [segment for segment in manifest.segments if segment.id not in self._seen_segments]
        for number, doc in sorted(state.docs.items()):
            if found[number].key != doc.key or found[number].fields != doc.fields:
                raise Violation("fields", f"{where}: document {number} holds {found[number].fields}, should hold {doc.fields}")
            if any(segment.first_id <= number <= segment.last_id for segment in new):
                _compare_vectors(found[number].tokens, self.vectors[doc.label], f"{where}: document {number}")
        self._seen_segments.update(segment.id for segment in new)

    def _index_ends(self, index: str, deletion: Deletion, operations: tuple[Op, ...]) -> None:
        record = self.current(index)
        if record is None or (deletion.index_id, deletion.generation) != (record.life.id, record.generation):
            raise Violation(
                "succession", f"{index} was deleted as generation {deletion.generation} of {deletion.index_id}, which was not in force"
            )
        if len(operations) != 1 or operations[0].kind not in ("drop", "branch") or operations[0].index != index:
            raise Violation("phantom", f"{index} was deleted by {[str(op) for op in operations]}")
        if operations[0].kind == "branch" and record.life.confirmed:
            raise Violation("phantom", f"{index} was withdrawn after it had been acknowledged, by {operations[0]}")
        if any(generation < 0 for _, generation in operations[0].applied):
            raise Violation("twice", f"{operations[0]} deleted {operations[0].applied} and now {record.life.id}")
        record.life.alive = False
        operations[0].applied.append((record.life.id, -1))
        self._turn(index, None)
        self.note(f"  {index} of {record.life.id[-4:]} is gone, by {operations[0]}")

    # Aliases

    def _alias_moves(self, alias: str, is_new: bool, index: str | None, operations: tuple[Op, ...]) -> None:
        """A move whose answer was lost, and which somebody replaced before its maker looked, may be made again: no history tells."""
        kind = "unpoint" if index is None else "point"
        [op] = operations or [None]
        if op is None or op.kind != kind or op.args["alias"] != alias or (index is not None and op.index != index):
            raise Violation("phantom", f"alias {alias} was set to {index} by {op}")
        if op.outcome.startswith("refused"):
            raise Violation("refused", f"{op} was answered with '{op.outcome}' and took effect")
        op.applied.append((f"alias {alias}", self.tick))
        op.results.append(is_new)
        self.aliases.setdefault(alias, [(0, None)]).append((self.tick, index))
        self.note(f"  alias {alias} stands for {index}, by {op}")

    def alias_stood_for(self, alias: str, since_tick: int) -> list[str | None]:
        """What an alias stood for at any moment since."""
        moves = self.aliases.get(alias, [(0, None)])
        return [index for at, (_, index) in enumerate(moves) if at + 1 == len(moves) or moves[at + 1][0] > since_tick]

    # Garbage

    def pinned_names(self, index: str) -> dict[str, tuple[str, int]]:
        """Acknowledged pins of the living index, and what they keep."""
        record = self.current(index)
        return {name: key for key, pins in self.pinned.items() for name in pins if record and key[0] == record.life.id}

    def is_protected(self, record: Record) -> str:
        """Why a generation must be readable now; empty if it need not."""
        if not record.life.alive:
            return ""
        if record.ended_s is None:
            return "is in force"
        if self.loop.now - record.ended_s < self.params.grace_s - SLACK_S:
            return f"was in force {self.loop.now - record.ended_s:.0f} s ago"
        if self.pinned.get((record.life.id, record.generation)):
            return f"is pinned as {next(iter(self.pinned[record.life.id, record.generation]))}"
        return ""

    def _check_deletion(self, name: str) -> None:
        for record in self.named_by.get(name, ()):
            why = self.is_protected(record)
            if not why and record.life.alive and record.archive in self.bucket.objects:
                why = "is listed as kept"
            if not why:
                continue
            message = f"{name} was deleted, but {record.life.index} generation {record.generation} names it, and that {why}"
            if record.life.confirmed:
                raise Violation("deleted", message)
            record.life.damage = record.life.damage or message
        if "/manifests/" in name:
            life, generation = names.generation_of(name)
            record_of = self.records.get((life, generation))
            if record_of is not None and record_of.ended_s is not None and (why := self.is_protected(record_of)):
                raise Violation("deleted", f"{name} was deleted, but that generation {why}")

    def _note_tidied(self, index: str, name: str, before: Stored) -> None:
        """After the last record of a committed build is gone, giving the same source again adds it again."""
        folder, record = name.rpartition("/")[0] + "/", self.current(index)
        if record is not None and not any(other.startswith(folder) for other in self.bucket.objects if other != name):
            what = (record.life.id, read_marker(before.data, BuildProgress, name=name).source)
            if what in self.built:
                self.tidied.add(what)

    # Operations

    def begin(self, kind: str, index: str, process: Process, **args: Any) -> Op:
        op = Op(len(self.ops), kind, index, process.name, args, self.tick, self.loop.now)
        self.ops.append(op)
        self.counts[f"op {kind}"] += 1
        self.note(f"{op} begins")
        OPERATIONS.set((op,))
        return op

    def end(self, op: Op, value: Any = None, error: BaseException | None = None) -> None:
        """Judge what a client was told."""
        if op.outcome != "running":
            return
        try:
            self._judge(op, value, error)
        except Violation as violation:
            self.fail(violation.kind, violation.message)
        self.note(f"{op} ends: {op.outcome}")

    def _judge(self, op: Op, value: Any, error: BaseException | None) -> None:
        if error is None:
            op.outcome = "done"
            self._judge_success(op, value)
        elif isinstance(error, Unavailable) or not isinstance(error, Exception):
            op.outcome = f"unknown {type(error).__name__}"
        elif isinstance(error, EngineError):
            op.outcome = f"refused {error.code}"
            self._judge_refusal(op, error)
        else:
            op.outcome = f"crashed {error!r}"
            raise Violation("crash", f"{op}: {error!r}")
        if op.kind == "sweep":
            self.last_sweep_tick = self.tick
        self.counts[f"outcome {op.outcome}"] += 1

    def _judge_success(self, op: Op, value: Any) -> None:
        was_built = op.kind == "build" and any(
            record is not None and (record.life.id, op.args["source_of"]) in self.built
            for record in self.in_force(op.index, op.invoked_tick)
        )
        if op.kind in ("create", "branch", "rollback", "add", "build", "point") and not op.applied and not was_built:
            raise Violation("lost", f"{op} was acknowledged and is nowhere in the history")
        if op.kind == "branch":
            life = self.lives[op.applied[0][0]]
            if life.damage and life.alive:
                raise Violation("deleted", f"{op} was acknowledged: {life.damage}")
            life.confirmed = True
        if op.kind == "drop":
            self._check_dropped(op, value)
        if op.kind == "point" and op.results[-1] != value:
            raise Violation("answer", f"{op} was told {value}, but did {op.results[-1]}")
        if op.kind in ("add", "delete", "update", "configure"):
            if op.applied:
                if op.results[-1] != value:
                    raise Violation("answer", f"{op} was told {value}, but did {op.results[-1]}")
            elif not any(
                record is not None and _does_nothing(record.state, op, value) for record in self.in_force(op.index, op.invoked_tick)
            ):
                raise Violation("lost", f"{op} was acknowledged with {value}, but is nowhere in the history and was never without effect")

    def _check_dropped(self, op: Op, existed: bool) -> None:
        """What was there when the call began is gone, and the answer was true at a moment of the call."""
        was = self.in_force(op.index, op.invoked_tick)
        if was[0] is not None and was[0].life.alive:
            raise Violation("lost", f"{op} was acknowledged, and {op.index} of {was[0].life.id} is still there")
        if not any((record is not None) == existed for record in was):
            raise Violation("answer", f"{op} was told that there was {'an' if existed else 'no'} index")

    def _judge_refusal(self, op: Op, error: EngineError) -> None:
        was = self.in_force(op.index, op.invoked_tick)
        ended = len({record and record.life.id for record in was}) > 1 or was[-1] is None
        effects = [(life, generation) for life, generation in op.applied if generation < 0 or self.lives[life].alive]
        if op.kind in ("add", "build", "create", "rollback", "drop") and effects:
            raise Violation("refused", f"{op} was answered with '{error}', but took effect at {effects}")
        if isinstance(error, CorruptData) and not ended and not self._source_ended(op):
            raise Violation("corrupt", f"{op}: {error}")
        if isinstance(error, NotFound) and error.code == "index-not-found" and not ended and not self._source_ended(op):
            raise Violation("refused", f"{op} found no index, but there was one all the time")
        if isinstance(error, NotFound) and error.code == "object-not-found" and not ended:
            raise Violation("refused", f"{op}: {error}")
        if (
            isinstance(error, Conflict)
            and error.code == "commit-conflict"
            and op.kind not in ("build", "point")
            and len(was) < 20
            and not (self._changed_lately(op) or self._source_ended(op))
        ):
            raise Violation("conflict", f"{op} met a conflict with nobody: {error}; only {len(was) - 1} others committed")
        if isinstance(error, NotFound) and error.code == "generation-not-found" and op.kind in ("pin", "rollback", "branch"):
            self._check_kept(op, error)
        if isinstance(error, Conflict) and error.code == "index-exists":
            own = {life for life, _ in op.applied}
            is_there = all(self.lives[life].alive for life in own)  # else nobody can tell any more whose it was
            if is_there and all(record is None or record.life.id in own for record in was):
                raise Violation("conflict", f"{op} was told that the index exists, but only its own does")
        if isinstance(error, Conflict) and error.code not in ("commit-conflict", "index-exists"):
            raise Violation("conflict", f"{op}: {error}")
        if isinstance(error, InvalidRequest) and not any(record is not None and apply(record.state, op)[1] is REFUSED for record in was):
            raise Violation("refused", f"{op} was never invalid: {error}")

    def _check_kept(self, op: Op, error: EngineError) -> None:
        """Nobody is told that a generation is gone while it must be there, unless a sweep is or was about."""
        index = op.args.get("source", op.index)
        was = self.in_force(index, op.invoked_tick)
        if len({record and record.life.id for record in was}) > 1 or was[-1] is None:
            return
        generation = op.args["generation"]
        targets = was if generation is None else [self.records.get((was[-1].life.id, generation))]
        if any("/sweeps/" in name for name in self.bucket.objects) or self.last_sweep_tick >= op.invoked_tick:
            return
        if all(record is not None and self.is_protected(record) for record in targets):
            raise Violation("refused", f"{op}: {error}; but it must be there, and nobody sweeps")

    def _changed_lately(self, op: Op) -> bool:
        """Whether the index was another one as long ago as a writer may believe what it knew."""
        lately = self.in_force(op.index, since_s=op.invoked_s - MAX_HEAD_AGE_S)
        return len({record and record.life.id for record in lately}) > 1

    def _source_ended(self, op: Op) -> bool:
        source = op.args.get("source")
        if source is None:
            return False
        was = self.in_force(source, op.invoked_tick)
        return len({record and record.life.id for record in was}) > 1 or was[-1] is None

    # Reads

    def record_of(self, manifest: Manifest) -> Record | None:
        return self.records.get((manifest.index_id, manifest.generation))

    def check_snapshot(self, op: Op, manifest: Manifest, max_age_s: float) -> Record:
        """A strong read is of a generation that was in force during the call; an older one of one that was in force lately."""
        record = self.record_of(manifest)
        if record is None:
            raise Violation("phantom", f"{op} read generation {manifest.generation}, which never was in force")
        if max_age_s:
            allowed = self.in_force(op.index, since_s=op.invoked_s - max_age_s - 1e-6)
        else:
            allowed = self.in_force(op.index, op.invoked_tick)
        if record not in allowed:
            raise Violation(
                "stale", f"{op} read generation {record.generation}, which was replaced {self.loop.now - (record.ended_s or 0):.1f} s ago"
            )
        return record

    def brute_force(self, state: State, query: np.ndarray) -> dict[int, float]:
        return {number: float((self.vectors[doc.label] @ query.T).max(axis=0).sum()) for number, doc in state.docs.items()}

    # Running inside the engine

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Put time, chance and names of the engine into the simulation's hands, and let the writer say for whom it commits."""
        writer = engine.index.writer.Writer
        submit, commit_group = writer._submit, writer._commit_group

        waiting: dict[
            int, tuple[Any, tuple[Op, ...]]
        ] = {}  # an operation has no place for it and no hash; kept alive, so that its id is its own

        async def submit_for(self: Any, operation: Any) -> Any:
            waiting[id(operation)] = operation, asked_for()
            return await submit(self, operation)

        async def commit_for(self: Any, group: Any) -> None:
            OPERATIONS.set(lambda: _served(group, waiting))
            await commit_group(self, group)

        shims = [
            (names, "fresh_id", self.fresh_id),
            (clock_module.SystemClock, "now_s", lambda _: SimulatedClock().now_s()),
            (clock_module.SystemClock, "monotonic_s", lambda _: SimulatedClock().monotonic_s()),
            (engine.store.objects, "time", SimpleNamespace(monotonic=self.loop.time)),
            (engine.store.objects, "random", SimpleNamespace(uniform=self.rng.uniform, getrandbits=self.rng.getrandbits)),
            (engine.index.commit, "random", SimpleNamespace(Random=lambda: self.rng)),
            (engine.index.writer, "random", SimpleNamespace(Random=lambda: self.rng)),
            (writer, "_submit", submit_for),
            (writer, "_commit_group", commit_for),
        ]
        before = [(owner, name, getattr(owner, name)) for owner, name, _ in shims]
        for owner, name, value in shims:
            setattr(owner, name, value)
        try:
            yield
        finally:
            for owner, name, value in before:
                setattr(owner, name, value)


def _served(group: Any, waiting: dict[int, tuple[Any, tuple[Op, ...]]]) -> tuple[Op, ...]:
    """The calls of a group that the commit under way is to carry out: not those that could not be applied for want of the store."""
    served = (ticket for ticket in group if not isinstance(ticket.error, Unavailable | CorruptData))
    return tuple(op for ticket in served for op in waiting[id(ticket.operation)][1])


def _does_nothing(state: State, op: Op, value: Any) -> bool:
    after, result = apply(state, op)
    return after == state and result == value


def _compare_vectors(found: np.ndarray, wanted: np.ndarray, where: str) -> None:
    if found.shape != wanted.shape:
        raise Violation("vectors", f"{where} has vectors of shape {found.shape}, should have {wanted.shape}")
    cosines = (found * wanted).sum(axis=1) / np.maximum(np.linalg.norm(found, axis=1), 1e-9)
    if cosines.min() < 0.8:
        raise Violation("vectors", f"{where} has other vectors: cosine {cosines.min():.2f}")
