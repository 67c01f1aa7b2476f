"""What processes do: clients that add, delete, read, hold, pin, branch, compact and sweep, and a fate that freezes and kills them."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from engine.config import IndexConfig, SearchParams
from engine.errors import CorruptData, EngineError, NotFound, Unavailable
from engine.index import bulk, compact, indices, snapshots, sweep
from engine.index.aliases import Aliases
from engine.index.commit import create
from engine.index.reader import Reader, Snapshot
from engine.searcher import Searcher

from .model import Doc, Op
from .scheduler import PROCESS, Process
from .world import DIM, Record, Violation, World

INDICES = ("a", "b", "c", "d")
WEIGHTS = {
    "add": 30.0,
    "keyed": 8.0,
    "group": 10.0,
    "delete": 12.0,
    "update": 8.0,
    "refilter": 1.5,
    "configure": 2.0,
    "wrong": 1.0,
    "read": 22.0,
    "stale": 5.0,
    "old": 4.0,
    "hold": 6.0,
    "reread": 8.0,
    "search": 5.0,
    "compact": 7.0,
    "churn": 4.0,
    "collect": 4.0,
    "part": 2.0,
    "chain": 1.5,
    "sweep": 8.0,
    "pin": 6.0,
    "unpin": 4.0,
    "pinned": 5.0,
    "rollback": 4.0,
    "branch": 5.0,
    "drop": 2.5,
    "create": 4.0,
    "remake": 1.0,
    "build": 3.5,
    "resume": 6.0,
    "point": 5.0,
    "resolve": 6.0,
    "unpoint": 0.7,
}
ALIASES = ("x", "y", "d")
"""The last is the name of an index too, which wins."""
OF_GARBAGE = (
    "collect",
    "part",
    "chain",
    "sweep",
    "pin",
    "unpin",
    "pinned",
    "rollback",
    "branch",
    "drop",
    "create",
    "remake",
    "hold",
    "reread",
)
NEEDS_NO_INDEX = ("create", "sweep", "collect", "drop", "remake", "part", "chain", "point", "resolve", "unpoint")


AFTER_A_REST = ("collect", "collect", "add", "delete", "stale", "compact", "reread")
"""What is worth doing when much has grown old."""
TOPICS = np.eye(3, DIM + 1)
"""Documents have vectors around two or three directions, so that a codec trained on a handful of documents knows the next one too."""


@dataclass(eq=False)
class Held:
    """A snapshot that somebody keeps open."""

    snapshot: Snapshot
    record: Record


class Client:
    """One task of one process. Its choices depend on its own seed alone, so that taking others away changes them little."""

    def __init__(self, world: World, process: Process, reader: Reader, aliases: Aliases, name: str) -> None:
        self.world, self.process, self.reader, self.aliases, self.name = world, process, reader, aliases, name
        self.rng = random.Random(f"client {name} {world.settings.seed}")
        self.searcher = Searcher(reader)
        self.held: list[Held] = []
        weights = {**WEIGHTS, **world.settings.weights}
        self.kinds = [kind for kind in WEIGHTS if weights[kind] > 0]
        self.weights = [weights[kind] for kind in self.kinds]
        self.n_docs = 0
        self.rested = False

    async def run(self) -> None:
        while not self.world.stopping and not self.process.dead:
            await self._pause()
            if self.world.stopping:
                return
            kind = self.rng.choices(self.kinds, self.weights)[0]
            if self.rested and self.rng.random() < 0.6:
                kind = self.rng.choice([name for name in AFTER_A_REST if name in self.kinds] or [kind])
            index = "a" if self.rng.random() < self.world.settings.hot else self.rng.choice(INDICES)
            await getattr(self, f"_{kind}")(index) if kind in NEEDS_NO_INDEX else await self._do(kind, index)

    async def _do(self, kind: str, index: str) -> None:
        """Where there is no index, make one or go to another, mostly: a call that finds nothing tests little."""
        if self.world.current(index) is None and self.rng.random() < 0.9:
            living = [other for other in INDICES if self.world.current(other) is not None]
            if living and self.rng.random() < 0.6:
                index = self.rng.choice(living)
            elif "create" in self.kinds:
                kind = "create"
        await getattr(self, f"_{kind}")(index)

    async def _pause(self) -> None:
        await asyncio.sleep(self.rng.expovariate(1 / self.world.settings.think_s))
        self.rested = self.world.loop.now < self.world.lull_until
        if self.rested:
            if self.rng.random() < 0.3:
                await self._glance(self.rng.choice(INDICES))
            await asyncio.sleep(self.world.lull_until - self.world.loop.now + self.rng.uniform(0, 2))

    async def _call(self, op: Op, work: Awaitable[Any], answer: Callable[[Any], Any] = lambda value: None) -> Any:
        """Do it and let the world judge what came of it; None if it failed."""
        try:
            value = await work
        except (Exception, asyncio.CancelledError) as error:
            self.world.end(op, error=error)
            return None
        self.world.end(op, answer(value))
        return value

    # Writing

    def _documents(self, n: int, *, keyed: bool = False, dim: int = DIM) -> tuple[list[Doc], np.ndarray, np.ndarray]:
        docs, runs = [], []
        with_fields = self.rng.random() < 0.6
        keys = self.rng.sample(range(8), n) if keyed else [None] * n
        for key in keys:
            label = f"{self.name}-{self.n_docs}"
            self.n_docs += 1
            topics = TOPICS[self.rng.sample(range(len(TOPICS)), self.rng.randint(2, 3)), :dim]
            rows = topics + 0.1 * np.random.default_rng(self.rng.getrandbits(32)).standard_normal(topics.shape)
            tokens = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
            self.world.vectors[label] = tokens
            fields = {"n": self.rng.randrange(100), "t": label} if with_fields else {}
            docs.append(Doc(None if key is None else f"k{key}", fields, label))
            runs.append(tokens)
        return docs, np.concatenate(runs), np.cumsum([0, *map(len, runs)])

    async def _write(self, index: str, docs: list[Doc], tokens: np.ndarray, offsets: np.ndarray) -> None:
        op = self.world.begin("add", index, self.process, docs=docs, n=len(docs), dim=tokens.shape[1])
        fields = [doc.fields for doc in docs] if docs[0].fields else None
        keys = [doc.key for doc in docs] if docs[0].key is not None else None
        work = self.reader.writer(index).add(tokens, offsets, fields=fields, keys=keys)  # type: ignore[arg-type]
        await self._call(op, work, lambda added: added.ids.tolist())

    async def _add(self, index: str) -> None:
        await self._write(index, *self._documents(self.rng.randint(1, 4)))

    async def _keyed(self, index: str) -> None:
        await self._write(index, *self._documents(self.rng.randint(1, 3), keyed=True))

    async def _wrong(self, index: str) -> None:
        await self._write(index, *self._documents(1, dim=DIM + 1))

    def _some_ids(self, index: str) -> list[int]:
        record = self.world.current(index)
        known = sorted(record.state.docs) if record else []
        chosen = self.rng.sample(known, min(len(known), self.rng.choice((1, 1, 2, 3, 8))))
        return sorted({*chosen, self.rng.randrange(100)} if self.rng.random() < 0.2 or not chosen else chosen)

    async def _delete(self, index: str) -> None:
        ids = self._some_ids(index)
        op = self.world.begin("delete", index, self.process, ids=ids)
        await self._call(op, self.reader.writer(index).delete(np.array(ids)), lambda n: n)

    async def _update(self, index: str) -> None:
        ids, values = (
            self._some_ids(index),
            {"n": self.rng.randrange(1000)} if self.rng.random() < 0.7 else {"t": f"u{self.rng.randrange(1000)}"},
        )
        op = self.world.begin("update", index, self.process, ids=ids, values=values)
        await self._call(op, self.reader.writer(index).update(np.array(ids), values), lambda n: n)

    async def _configure(self, index: str) -> None:
        limit = self.rng.choice((None, 5, 20, 40))
        op = self.world.begin("configure", index, self.process, max_documents=limit)
        await self._call(op, self.reader.writer(index).configure(max_documents=limit))

    async def _group(self, index: str) -> None:
        """Several calls of one process at once: they share commits."""
        kinds = self.rng.choices(["add", "keyed", "delete", "update", "wrong"], [6, 3, 3, 2, 0.3], k=self.rng.randint(2, 6))
        await asyncio.gather(*(getattr(self, f"_{kind}")(index) for kind in kinds))

    # Reading

    async def _read(self, index: str, max_age_s: float = 0.0) -> None:
        op = self.world.begin("read", index, self.process)
        await self._look(op, lambda: self.reader.snapshot(index, max_age_s=max_age_s), max_age_s)

    async def _stale(self, index: str) -> None:
        await self._read(index, self.rng.choice((1.0, 10.0, 100.0)))

    async def _hold(self, index: str) -> None:
        op = self.world.begin("hold", index, self.process)
        snapshot = await self._look(op, lambda: self.reader.snapshot(index), 0.0)
        record = self.world.record_of(snapshot.manifest) if snapshot else None
        if snapshot is not None and record is not None:
            self.held.append(Held(snapshot, record))
            del self.held[:-4]

    async def _look(self, op: Op, opening: Callable[[], Awaitable[Snapshot]], max_age_s: float, filtering: float = 0.2) -> Snapshot | None:
        """Open a snapshot and compare all of it with the model."""
        try:
            snapshot = await opening()
            record = self.world.check_snapshot(op, snapshot.manifest, max_age_s)
        except Violation as violation:
            self.world.fail(violation.kind, violation.message)
            return None
        except (Exception, asyncio.CancelledError) as error:
            self.world.end(op, error=error)
            return None
        await self._compare(op, snapshot, record, filtering)
        return snapshot

    async def _compare(self, op: Op, snapshot: Snapshot, record: Record, filtering: float = 0.2) -> None:
        """Everything that a snapshot says is what the model says of that generation, while the generation must be readable."""
        try:
            ids = (await snapshot.live_ids()).tolist()
            if ids != sorted(record.state.docs):
                raise Violation("read", f"{op} sees {ids} in generation {record.generation}, should see {sorted(record.state.docs)}")
            if self.rng.random() < 0.4:
                rows = await snapshot.rows(ids)
                wanted = [{"_subset_": n, **{c: record.state.docs[n].fields.get(c) for c in record.state.columns}} for n in ids]
                if rows != wanted:
                    raise Violation("read", f"{op} sees rows {rows} in generation {record.generation}, should see {wanted}")
            if self.rng.random() < 0.15:
                await self._search_in(op, snapshot, record)
            if "n" in record.state.columns and self.rng.random() < filtering:
                found = (await snapshot.select("n >= ?", [50])).tolist()
                wanted_ids = [n for n in ids if (record.state.docs[n].fields.get("n") or 0) >= 50]
                if found != wanted_ids:
                    raise Violation("read", f"{op}: a filter finds {found} in generation {record.generation}, should find {wanted_ids}")
        except Violation as violation:
            self.world.fail(violation.kind, violation.message)
            self.world.end(op)
        except (CorruptData, NotFound) as error:
            why = self.world.is_protected(record)
            if why and record.life.confirmed and not record.life.damage:
                self.world.fail("read", f"{op} cannot read generation {record.generation}, which {why}: {error}")
            self.world.end(op, error=Unavailable(str(error)))
        except (Unavailable, asyncio.CancelledError) as error:
            self.world.end(op, error=error)
        except Exception as error:
            self.world.end(op, error=error)
        else:
            self.world.end(op)

    async def _search_in(self, op: Op, snapshot: Snapshot, record: Record) -> None:
        """The best hits are the model's, within what eight bits per dimension lose."""
        if record.state.dim != DIM:
            return
        query = np.random.default_rng(self.rng.getrandbits(32)).standard_normal((3, DIM)).astype(np.float32)
        query /= np.linalg.norm(query, axis=1, keepdims=True)
        k = 5
        [answer] = await self.searcher.search(snapshot, [query], SearchParams(k=k), mode=self.rng.choice(("auto", "warm", "cold")))
        exact = self.world.brute_force(record.state, query)
        kth = sorted(exact.values(), reverse=True)[:k][-1] if exact else 0.0
        tolerance = 0.01 if all(segment.kind == "flat" for segment in snapshot.segments) else 0.6
        if len(answer.ids) != min(k, len(exact)):
            raise Violation("search", f"{op} finds {answer.ids.tolist()} among {sorted(exact)}")
        for number, score in zip(answer.ids.tolist(), answer.scores.tolist(), strict=True):
            if number not in exact or abs(exact[number] - score) > tolerance or exact[number] < kth - 2 * tolerance:
                raise Violation(
                    "search", f"{op} finds document {number} with {score:.3f}, should be {exact.get(number)}; best {k} reach {kth:.3f}"
                )

    async def _search(self, index: str) -> None:
        op = self.world.begin("search", index, self.process)
        try:
            snapshot = await self.reader.snapshot(index)
            record = self.world.check_snapshot(op, snapshot.manifest, 0.0)
            await self._search_in(op, snapshot, record)
        except Violation as violation:
            self.world.fail(violation.kind, violation.message)
        except CorruptData as error:
            held = self.world.record_of(snapshot.manifest)
            why = self.world.is_protected(held) if held else "never was"
            self.world.end(op, error=error if why and held and held.life.confirmed else Unavailable(str(error)))
        except (Exception, asyncio.CancelledError) as error:
            self.world.end(op, error=error)
        else:
            self.world.end(op)

    async def _reread(self, index: str) -> None:
        if self.held:
            held = self.rng.choice(self.held)
            op = self.world.begin("reread", held.snapshot.index, self.process, generation=held.record.generation)
            await self._compare(op, held.snapshot, held.record)

    def _some_generation(self, index: str) -> int | None:
        """Mostly one that may still be kept."""
        record = self.world.current(index)
        if record is None:
            return None
        if self.rng.random() < 0.4:
            life = record.life.id
            kept = [n for (own, n), one in self.world.records.items() if own == life and one.archive in self.world.bucket.objects]
            if kept:
                return self.rng.choice(kept)
        return max(0, record.generation - self.rng.choice((0, 1, 1, 2, 3, 5, 9)))

    async def _old(self, index: str) -> None:
        generation = self._some_generation(index)
        if generation is None:
            return
        op = self.world.begin("old", index, self.process, generation=generation)
        before = self.world.current(index)
        must = self.world.records.get((before.life.id, generation)) if before else None
        try:
            snapshot = await self.reader.snapshot(index, generation=generation)
        except NotFound as error:
            why = self.world.is_protected(must) if must else ""
            if why and error.code == "generation-not-found":
                self.world.fail("read", f"{op}: not found, although it {why}")
            self.world.end(op, error=error)
            return
        except (Exception, asyncio.CancelledError) as error:
            self.world.end(op, error=error)
            return
        record = self.world.record_of(snapshot.manifest)
        if record is None:
            self.world.fail("phantom", f"{op} opened a generation that never was")
            return
        await self._compare(op, snapshot, record)

    # Aliases

    async def _point(self, index: str) -> None:
        """One or two moves of one alias at once, and a look at it before and after."""
        alias = self.rng.choice(ALIASES)
        await self._resolve(index, alias)
        other = self.rng.choice(INDICES)
        await asyncio.gather(*(self._move(alias, one) for one in self.rng.choice(((index,), (index, other)))))
        await self._resolve(index, alias)

    async def _move(self, alias: str, index: str) -> None:
        op = self.world.begin("point", index, self.process, alias=alias)
        await self._call(op, self.aliases.point(alias, index), lambda is_new: is_new)

    async def _unpoint(self, index: str) -> None:
        op = self.world.begin("unpoint", index, self.process, alias=self.rng.choice(ALIASES))
        await self._call(op, self.aliases.drop(op.args["alias"]))

    async def _resolve(self, index: str, alias: str = "") -> None:
        """An alias stands for what it stood for at a moment of the call."""
        op = self.world.begin("resolve", index, self.process, alias=alias or self.rng.choice(ALIASES))
        try:
            found: str | None = await self.aliases.resolve(op.args["alias"])
        except NotFound:
            found = None
        except (Exception, asyncio.CancelledError) as error:
            self.world.end(op, error=error)
            return
        stood_for = self.world.alias_stood_for(op.args["alias"], op.invoked_tick)
        if found not in stood_for:
            self.world.fail("alias", f"{op} is told {found}, but it was {stood_for}")
        self.world.end(op)

    # Maintenance

    async def _compact(self, index: str) -> None:
        await self._compact_with(index, self.rng.choice((0, 40, 100)), self.rng.choice((1, 2, 3, 12)))

    async def _fold(self, index: str) -> None:
        """Compaction until nothing is left to do and nothing is flat."""
        await self._compact_with(index, 0, 12)

    async def _compact_with(self, index: str, max_flat_tokens: int, max_steps: int) -> None:
        op = self.world.begin("compact", index, self.process)
        params = msgspec.structs.replace(self.world.params, max_flat_tokens=max_flat_tokens)
        report = await self._call(op, compact.compact(self.reader, index, params=params, max_steps=max_steps))
        if report is not None:
            for kind, n in report.steps.items():
                self.world.counts[f"compaction {kind}"] += n
            self.world.counts["compaction given up"] += report.n_given_up

    async def _churn(self, index: str) -> None:
        """Compaction while the same documents change."""
        kinds = self.rng.choices(["delete", "update", "add", "rollback"], [3, 4, 1, 0.5], k=3)
        await asyncio.gather(self._compact(index), *(self._late(kind, index) for kind in kinds))

    async def _late(self, kind: str, index: str) -> None:
        await asyncio.sleep(self.rng.uniform(0, 1))
        await getattr(self, f"_{kind}")(index)

    async def _collect(self, index: str) -> None:
        """Garbage collection while others write, and revive what it is about to take."""
        kinds = self.rng.choices(["pin", "rollback", "branch", "add", "compact", "unpin"], [6, 3, 2, 4, 1, 1], k=self.rng.randint(2, 5))
        await asyncio.gather(self._sweep(index), *(self._late(kind, index) for kind in kinds))

    def _living(self, index: str) -> str:
        """An index that is there, this one if possible."""
        living = [other for other in INDICES if self.world.current(other) is not None]
        return index if index in living or not living else self.rng.choice(living)

    async def _part(self, index: str) -> None:
        """An index is deleted while somebody branches it, or its branch."""
        index = self._living(index)
        await self._add(index)
        free = [other for other in INDICES if other != index and self.world.current(other) is None]
        name = self.rng.choice(free or [other for other in INDICES if other != index])
        if not free:
            await self._drop(name)
        victim = index if self.rng.random() < 0.7 else self.rng.choice(INDICES)
        await asyncio.gather(self._branch_to(index, name), self._late("drop", victim))

    async def _chain(self, index: str) -> None:
        """A branch of a branch; then the one between goes, and the first one too, perhaps while the last is made again."""
        index = self._living(index)
        await self._add(index)
        between, last = self.rng.sample([other for other in INDICES if other != index], 2)
        await self._drop(between)
        await self._drop(last)
        await self._branch_to(index, between)
        how = self.rng.choice(("last again", "last while first goes", "in order", "all at once"))
        if how == "all at once":
            await asyncio.gather(self._branch_to(between, last), self._late("drop", between), self._late("drop", index))
            return
        await self._branch_to(between, last)
        if how == "last again":
            await self._drop(last)
            await asyncio.gather(self._branch_to(between, last), self._late("drop", index))
        elif how == "last while first goes":
            await asyncio.gather(self._drop(between), self._late("drop", index))
        await self._drop(between)
        await self._drop(index) if self.rng.random() < 0.7 else await self._sweep(index)

    async def _glance(self, index: str) -> None:
        """Pin what is in force and let go of it: its archive is written early."""
        known = set(self.world.pinned_names(index))
        await self._pin(index, now=True)
        for name in self.world.pinned_names(index):
            if name not in known:
                await self._unpin(index, name)

    async def _refilter(self, index: str) -> None:
        """Filter, change, filter: what a process remembers must not show."""
        for _ in range(2):
            op = self.world.begin("read", index, self.process)
            await self._look(op, lambda: self.reader.snapshot(index), 0.0, filtering=1.0)
            await self._update(index)

    async def _sweep(self, index: str) -> None:
        op = self.world.begin("sweep", index, self.process)
        report = await self._call(op, sweep.sweep(self.reader.store, index, params=self.world.params, clock=self.reader.clock))
        if report is not None:
            self.world.counts["objects collected"] += report.n_deleted

    async def _remake(self, index: str) -> None:
        await self._drop(index)
        await self._create(index)

    async def _build(self, index: str) -> None:
        docs, tokens, offsets = self._documents(self.rng.randint(6, 14))
        fields = [doc.fields for doc in docs] if docs[0].fields else None
        source = _Source(self.name + str(self.n_docs), tokens, offsets, fields, self.rng.choice((4, 6, 100)))
        await self._build_from(index, source, docs)

    async def _resume(self, index: str) -> None:
        """Somebody takes up what another left, or believes so: the other may only be slow."""
        if self.world.unfinished:
            index, source, docs = self.rng.choice(self.world.unfinished)
            self.world.counts["builds resumed"] += 1
            await self._build_from(index, source, docs)
        else:
            await asyncio.gather(self._build(index), self._late("resume", index) if self.rng.random() < 0.5 else self._add(index))

    async def _build_from(self, index: str, source: _Source, docs: list[Doc]) -> None:
        op = self.world.begin("build", index, self.process, docs=docs, n=len(docs), dim=DIM, source_of=source.fingerprint)
        if (index, source, docs) not in self.world.unfinished:
            self.world.unfinished.append((index, source, docs))
        for _ in range(3):
            build = bulk.BulkBuild(self.reader, index, source, params=self.world.params)
            op.args["began_at"] = lambda build=build: build._began_at
            try:
                await build.run()
            except Unavailable as error:
                failure: BaseException = error
                continue
            except (Exception, asyncio.CancelledError) as error:
                failure = error
            else:
                self.world.end(op)
                self.world.unfinished[:] = [left for left in self.world.unfinished if left[1] is not source]
                return
            break
        if isinstance(failure, EngineError) and failure.code in ("commit-conflict", "missing-object", "dimension-mismatch"):
            failure = Unavailable(str(failure))  # the index was another one at some moment of the build
        self.world.end(op, error=failure)

    # Time

    async def _pin(self, index: str, now: bool = False) -> None:
        name = f"p{len(self.world.ops)}"
        generation = self._some_generation(index) if not now and self.rng.random() < 0.8 else None
        op = self.world.begin("pin", index, self.process, name=name, generation=generation)
        pin = await self._call(op, snapshots.pin(self.reader.store, index, name, generation=generation, clock=self.reader.clock))
        if pin is None:
            return
        record = self.world.records.get((pin.index_id, pin.generation))
        if record is None:
            self.world.fail("phantom", f"{op} pinned a generation that never was")
            return
        self.world.pinned.setdefault((pin.index_id, pin.generation), {})[name] = None
        gone = [name for name in sorted(record.objects | {record.archive}) if name not in self.world.bucket.objects]
        if gone and record.life.alive:
            self.world.fail("pin", f"{op} was acknowledged, but {gone[0]} of generation {pin.generation} is gone")

    def _a_pin(self, index: str, wanted: str = "") -> tuple[str, Record] | None:
        known = [(name, key) for name, key in self.world.pinned_names(index).items() if wanted in ("", name)]
        if not known:
            return None
        name, key = self.rng.choice(known)
        return name, self.world.records[key]

    async def _unpin(self, index: str, wanted: str = "") -> None:
        chosen = self._a_pin(index, wanted)
        if chosen is None:
            return
        name, record = chosen
        self.world.pinned[record.life.id, record.generation].pop(name)
        op = self.world.begin("unpin", index, self.process, name=name)
        try:
            await snapshots.unpin(self.reader.store, index, name)
        except NotFound as error:
            if record.life.alive:
                self.world.fail("pin", f"{op}: {error}, although it was acknowledged")
            self.world.end(op, error=Unavailable(str(error)))
        except (Exception, asyncio.CancelledError) as error:
            self.world.end(op, error=error)
        else:
            self.world.end(op)

    async def _pinned(self, index: str) -> None:
        """What a pin keeps can be opened and is what it was."""
        chosen = self._a_pin(index)
        if chosen is None:
            return
        _, record = chosen
        op = self.world.begin("pinned", index, self.process, generation=record.generation)
        try:
            snapshot = await self.reader.snapshot(index, generation=record.generation)
        except (Exception, asyncio.CancelledError) as error:
            if isinstance(error, NotFound) and (why := self.world.is_protected(record)):
                self.world.fail("read", f"{op}: {error}, although it {why}")
            self.world.end(op, error=Unavailable(str(error)))
            return
        if snapshot.manifest.index_id == record.life.id:
            await self._compare(op, snapshot, record)
        else:
            self.world.end(op)

    async def _rollback(self, index: str) -> None:
        generation = self._some_generation(index)
        if generation is not None:
            op = self.world.begin("rollback", index, self.process, generation=generation)
            await self._call(op, snapshots.rollback(self.reader.store, index, generation, clock=self.reader.clock))

    async def _branch(self, index: str) -> None:
        others = [other for other in INDICES if other != index]
        free = [other for other in others if self.world.current(other) is None]
        name = self.rng.choice(free if free and self.rng.random() < 0.8 else others)
        await self._branch_to(index, name, self._some_generation(index) if self.rng.random() < 0.5 else None)

    async def _branch_to(self, index: str, name: str, generation: int | None = None) -> None:
        op = self.world.begin("branch", name, self.process, source=index, generation=generation)
        await self._call(op, snapshots.branch(self.reader.store, index, name, generation=generation, clock=self.reader.clock))

    async def _drop(self, index: str) -> None:
        op = self.world.begin("drop", index, self.process)
        await self._call(op, indices.drop(self.reader.store, index), lambda existed: existed)

    async def _create(self, index: str) -> None:
        limit = self.rng.choice((None, None, 12, 30))
        op = self.world.begin("create", index, self.process, max_documents=limit)
        config = IndexConfig(nbits=8, seed=1, max_documents=limit)
        await self._call(op, create(self.reader.store, index, config, clock=self.reader.clock))


@dataclass(frozen=True, eq=False)
class _Source:
    """A source of a bulk build, which gives its documents `block` at a time; each block becomes a segment."""

    fingerprint: str
    tokens: np.ndarray
    offsets: np.ndarray
    fields: list[dict[str, Any]] | None
    block: int

    @property
    def n_documents(self) -> int:
        return len(self.offsets) - 1

    @property
    def n_tokens(self) -> int:
        return len(self.tokens)

    def sample(self, n_tokens: int) -> np.ndarray:
        return self.tokens[:n_tokens]

    def blocks(self, first_document: int) -> Any:
        for first in range(first_document, self.n_documents, self.block):
            last = min(first + self.block, self.n_documents)
            start, end = self.offsets[first], self.offsets[last]
            fields = None if self.fields is None else self.fields[first:last]
            yield bulk.Block(self.tokens[start:end], self.offsets[first : last + 1] - start, fields)


class Fate:
    """Starts processes, kills them, freezes them, and lets hours pass."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.rng = random.Random(f"fate {world.settings.seed}")
        self.n_started = 0
        self.living: list[tuple[Process, list[asyncio.Task[None]]]] = []

    async def run(self) -> None:
        world, settings = self.world, self.world.settings
        for _ in range(settings.n_processes):
            self.start()
        while not world.stopping:
            await asyncio.sleep(self.rng.uniform(0.05, 1.0))
            if self.rng.random() < settings.kills:
                self.kill()
            if self.rng.random() < settings.freezes:
                process, _ = self.rng.choice(self.living)
                process.frozen_until = world.loop.now + self.rng.choice((3.0, 20.0, 300.0))
                world.note(f"{process.name} freezes until {process.frozen_until:.1f}")
            if self.rng.random() < settings.lulls:
                world.lull_until = world.loop.now + self.rng.choice((30.0, 3000.0, 4000.0, 4000.0, 8000.0))
                world.note(f"all rest until {world.lull_until:.1f}")
                await asyncio.sleep(world.lull_until - world.loop.now)
        await self.settle()

    def start(self) -> None:
        name = f"p{self.n_started}"
        self.n_started += 1
        skew = self.world.settings.skew_s
        process = Process(name, self.rng.uniform(-skew, skew))
        reader = self.world.reader_of(process, self.rng.choice((0, 20_000, 1 << 26)))
        token = PROCESS.set(process)
        aliases = Aliases(reader.store, clock=reader.clock)
        clients = [Client(self.world, process, reader, aliases, f"{name}.{n}") for n in range(self.world.settings.n_clients)]
        self.living.append((process, [asyncio.create_task(client.run()) for client in clients]))
        PROCESS.reset(token)
        self.world.note(f"{name} starts, clock wrong by {process.skew_s:.1f} s")

    def kill(self) -> None:
        at = self.rng.randrange(len(self.living))
        process, _ = self.living.pop(at)
        self.world.note(f"{process.name} is killed")
        self.world.counts["kills"] += 1
        process.kill()
        self.start()

    async def settle(self) -> None:
        """Wait until every call of the living has ended."""
        tasks = [task for _, tasks in self.living for task in tasks]
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(result, Exception):
                raise result
