"""Planted mistakes of protocol, each as edits of the engine's own source text, and the score of the simulation against them.

A mistake replaces the code of a function in place, so that every reference to it runs the mistake. If the text that an edit replaces
is not there (the engine has changed), planting fails loudly: mend the edit.
"""

from __future__ import annotations

import importlib
import inspect
import multiprocessing
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import CodeType, FunctionType
from typing import Any

from .runner import simulate

Edit = tuple[str, str, str]
"""(function as module:qualified name, text in it, text instead)."""


@dataclass(frozen=True)
class Mutation:
    name: str
    edits: tuple[Edit, ...]


def _one(name: str, function: str, old: str, new: str) -> Mutation:
    return Mutation(name, ((function, old, new),))


COMMIT, SWEEP, PARTS = "engine.index.commit", "engine.index.sweep", "engine.index.parts"
WRITER, OPERATIONS, COMPACT = "engine.index.writer", "engine.index.operations", "engine.index.compact"
ALIASES, BULK = "engine.index.aliases", "engine.index.bulk"
SNAPSHOTS, INDICES, READER, OBJECTS = "engine.index.snapshots", "engine.index.indices", "engine.index.reader", "engine.store.objects"

MUTATIONS = (
    # Commit
    _one("a lost answer is taken for a refusal", f"{COMMIT}:commit", "if await _was_made(store, index, following, head):", "if False:"),
    _one("the replaced generation is not archived", f"{COMMIT}:_upload", "wanted[archive] = head.data", "pass"),
    Mutation(
        "CURRENT is written before the uploads",
        (
            (f"{COMMIT}:commit", "        await _upload(store, index, head, draft.uploads, uploaded)\n", ""),
            (
                f"{COMMIT}:commit",
                "        return Head(following, data, etag)\n",
                "        await _upload(store, index, head, draft.uploads, uploaded)\n        return Head(following, data, etag)\n",
            ),
        ),
    ),
    _one(
        "CURRENT is replaced whatever it holds",
        f"{COMMIT}:commit",
        "replace_if_unchanged(names.current(index), data, head.etag)",
        "replace_if_unchanged(names.current(index), data, (await store.get(names.current(index))).etag)",
    ),
    _one(
        "a retry does not apply the change again",
        f"{COMMIT}:commit",
        "        draft = await apply(head.manifest)\n",
        "        draft = draft if attempt else await apply(head.manifest)\n",
    ),
    _one("nothing to do is believed of an old generation", f"{COMMIT}:commit", "if draft is None and head is believed:", "if False:"),
    _one("the first lost race is reported", f"{COMMIT}:commit", "range(params.max_attempts)", "range(1)"),
    _one(
        "the generation is counted from the contents",
        f"{COMMIT}:_successor",
        "generation=before.generation + 1",
        "generation=after.generation + 1",
    ),
    _one("time runs backwards", f"{COMMIT}:_successor", "max(clock.now_s(), before.created_s)", "clock.now_s()"),
    _one("a commit outlives its index", f"{COMMIT}:commit", "if uploaded and head.manifest.index_id != life:", "if False:"),
    _one("a failed upload is forgotten", f"{COMMIT}:_upload", "if isinstance(result, BaseException):", "if False:"),
    # Writer
    _one(
        "a group loses its fourth call",
        f"{WRITER}:Writer._take_group",
        "group.append(ticket)",
        "group.append(ticket) if len(group) != 3 else ticket.fate.set_result(None)",
    ),
    _one("a call returns before its commit", f"{WRITER}:Writer._submit", "return await ticket.fate", "return ticket.fate"),
    _one(
        "one bad call fails its group",
        f"{WRITER}:Writer._apply_all",
        "ticket.error = error",
        "[setattr(other, 'error', error) for other in group]",
    ),
    _one("a failed commit is acknowledged", f"{WRITER}:Writer._commit_group", "ticket.settle(error)", "ticket.settle(None)"),
    # Operations
    _one("new tombstones forget the old", f"{OPERATIONS}:_with_tombstones", "np.union1d(before, ordinals)", "np.sort(ordinals)"),
    _one("a new patch forgets the old", f"{OPERATIONS}:_patched", "rows = {", "rows = {} and {"),
    _one(
        "ids are counted from the living",
        f"{OPERATIONS}:Add.apply",
        "first_id = manifest.next_id",
        "first_id = max((segment.last_id for segment in manifest.segments), default=-1) + 1",
    ),
    _one("a key does not replace", f"{OPERATIONS}:Add.apply", "if self.keys is not None:", "if False:"),
    _one(
        "eviction counts dead documents",
        f"{OPERATIONS}:_evict",
        "draft.manifest.n_documents - limit",
        "sum(s.n_documents for s in draft.manifest.segments) - limit",
    ),
    _one("eviction does not see the draft", f"{OPERATIONS}:_evict", "excess, draft.uploads)", "excess)"),
    _one("a new segment keeps its own ids", f"{OPERATIONS}:Add.apply", "written.segment.rebased(first_id)", "written.segment"),
    _one(
        "a segment goes when half of it is dead",
        f"{OPERATIONS}:bury",
        "if len(ordinals) == segment.n_live:",
        "if len(ordinals) * 2 >= segment.n_live > 0:",
    ),
    # Compaction
    Mutation(
        "a compactor does not look whether its sources are gone",
        (
            (f"{COMPACT}:_Work._replace", "any(source.ref.id not in now for source in sources)", "False"),
            (f"{COMPACT}:_Work._replace", "now[source.ref.id]", "now.get(source.ref.id, source.ref)"),
        ),
    ),
    _one("a compactor drops late deletes", f"{COMPACT}:_Work._carry_over", "dead.append(rank", "(rank"),
    _one("a compactor drops late updates", f"{COMPACT}:_Work._carry_over", "if source.patches.get(ordinal) != row", "if False"),
    _one(
        "a compactor drops late adds",
        f"{COMPACT}:_Work._replace",
        "for segment in manifest.segments if segment.id not in gone",
        "for segment in self.manifest.segments if segment.id not in gone",
    ),
    _one(
        "a compactor revives the dead",
        f"{COMPACT}:_Work._open",
        "return _Source(ref, dead, patches)",
        "return _Source(ref, dead[:0], patches)",
    ),
    _one("a compactor does not see a rollback", f"{COMPACT}:_Work._replace", "self._is_undone(", "False and self._is_undone("),
    _one(
        "the newest codec is the one with the greatest id",
        "engine.index.plan:newest_codec",
        "(codec.n_tokens_trained, codec.id)",
        "codec.id",
    ),
    # Time
    Mutation(
        "next_id falls on a rollback",
        (
            (f"{SNAPSHOTS}:rollback", "next_id=max(manifest.next_id, old.next_id)", "next_id=old.next_id"),
            (f"{COMMIT}:_successor", "after.next_id < before.next_id or", ""),
        ),
    ),
    _one("a pin does not look at sweeps", f"{SNAPSHOTS}:pin", "if await _is_being_collected(store, index, manifest):", "if False:"),
    _one("a pin of CURRENT is not archived", f"{SNAPSHOTS}:pin", "await archive(store, index, head)", "pass"),
    _one("a branch leaves no marker", f"{SNAPSHOTS}:branch", "for home in sorted(homes):", "for home in ():"),
    _one("a branch marks only its parent", f"{SNAPSHOTS}:branch", "for home in sorted(homes):", "for home in (index,):"),
    Mutation(
        "a branch trusts the marker of an earlier one",
        (
            (f"{SNAPSHOTS}:branch", 'f"{name}-{names.fresh_id()}"', "name"),
            (
                f"{SNAPSHOTS}:branch",
                "await store.put_if_absent(names.branch(home, own_name), marker)",
                "await asyncio.gather(store.put_if_absent(names.branch(home, own_name), marker), return_exceptions=True)",
            ),
        ),
    ),
    _one(
        "a branch does not see its parent go",
        f"{SNAPSHOTS}:branch",
        "if parent is None or parent.manifest.index_id != manifest.index_id:",
        "if False:",
    ),
    _one(
        "a branch forgets whose its objects are",
        "engine.index.references:rehomed",
        "lambda home: home or index",
        "lambda home: index",
    ),
    # Garbage collection
    _one("a sweep keeps no grace", f"{SWEEP}:_kept_names", "now_s - replaced_s[g] <= grace_s", "False"),
    _one("a sweep takes young objects", f"{SWEEP}:sweep", "now_s - listed.modified_s > _life_s(name, index, grace_s) and", ""),
    Mutation(
        "a sweep ignores pins",
        (
            (f"{SWEEP}:_pinned_names", "kept |= objects_of(manifest, index) | {archive}", "pass"),
            (f"{SWEEP}:_pinned_names", "generations.add(pin.generation)", "pass"),
        ),
    ),
    _one("a sweep ignores branches", f"{SWEEP}:_kept_names", "await names_kept_for_branches(store, index) |", ""),
    _one("a sweep sees only the newest generation of a branch", f"{SWEEP}:_names_of_branch", "if manifest is not None:", "if False:"),
    _one("branches are listed once", f"{SWEEP}:names_kept_for_branches", "while new :=", "if new :="),
    _one(
        "a sweep does not look again",
        f"{SWEEP}:_delete_unless_named_now",
        "kept = await _kept_names(store, index, now_s, grace_s)",
        "kept = set()",
    ),
    _one(
        "a sweep does not write down what it deletes",
        f"{SWEEP}:_delete_unless_named_now",
        "_put_marker(store, index, doomed, clock)",
        "_put_marker(store, index, [], clock)",
    ),
    _one(
        "a sweep deletes objects before manifests",
        f"{SWEEP}:_delete_unless_named_now",
        "        for root in roots:",
        "        await store.delete([name for name in doomed if not name.startswith(roots)])\n        for root in roots:",
    ),
    _one(
        "a sweep trusts its own clock",
        f"{SWEEP}:sweep",
        "now_s = await _store_now_s(store, index, clock or SystemClock())",
        "now_s = (clock or SystemClock()).now_s()",
    ),
    Mutation(
        "a sweep lists the history before it reads CURRENT",
        (
            (
                f"{SWEEP}:_kept_names",
                "        head = (await load_head(store, index)).manifest\n",
                "        head = (await load_head(store, index)).manifest\n        archived, replaced_s = await _history(store, index, head)\n        head = (await load_head(store, index)).manifest\n",
            ),
            (f"{SWEEP}:_kept_names", "    archived, replaced_s = await _history(store, index, head)\n    #", "    #"),
        ),
    ),
    _one(
        "a sweep takes the archive of the generation in force",
        f"{SWEEP}:_kept_names",
        "g >= head.generation or",
        "",
    ),
    _one(
        "a generation ages from its own archive",
        f"{SWEEP}:_history",
        "written_s.get(generation + 1, written_s[generation])",
        "written_s[generation]",
    ),
    # Deletion of an index
    _one("a drop takes what branches share", f"{INDICES}:drop", "| await names_kept_for_branches(store, index)", ""),
    _one("a drop takes what a branch under way holds", f"{INDICES}:drop", "await names_held(store, index) |", ""),
    Mutation(
        "a drop commits the deletion last",
        (
            (f"{INDICES}:drop", "    existed = await end(store, index)\n", ""),
            (f"{INDICES}:drop", "    return existed", "    return await end(store, index)"),
        ),
    ),
    Mutation(
        "a drop lists after the deletion",
        (
            (f"{INDICES}:drop", "    existed = await end(store, index)\n", ""),
            (f"{INDICES}:drop", "    listed = [", "    existed = await end(store, index)\n    listed = ["),
        ),
    ),
    _one("a deletion ends the next index, too", f"{COMMIT}:end", "        life = there\n", ""),
    _one("a branch is withdrawn whatever has its name", f"{SNAPSHOTS}:branch", "life=made.manifest.index_id, ", ""),
    _one(
        "a create takes a deletion for its own",
        f"{COMMIT}:_was_first",
        ".index_id == first.index_id:\n        return True",
        ".index_id:\n        return True",
    ),
    Mutation(
        "an index is deleted by removing CURRENT",
        (
            (
                f"{COMMIT}:end",
                "await store.replace_if_unchanged(names.current(index), write_marker(deletion), found.etag)",
                "await store.delete([names.current(index)])",
            ),
        ),
    ),
    # Reading
    _one(
        "a strong read is answered from memory",
        f"{READER}:Reader.head",
        "if known is not None and max_age_s > 0 and started_s - known[1] <= max_age_s:",
        "if known is not None:",
    ),
    _one(
        "what was committed is as young as its answer",
        f"{READER}:Reader.remember_head",
        "if asked_s is None else asked_s",
        "if True else asked_s",
    ),
    _one("a writer builds on what it knew yesterday", f"{READER}:Reader.known_head", "MAX_HEAD_AGE_S", "1e9"),
    _one(
        "an old read is older than it may be",
        f"{READER}:Reader.head",
        "started_s - known[1] <= max_age_s",
        "started_s - known[1] <= 10 * max_age_s + 60",
    ),
    _one("tombstones are remembered by segment", f"{PARTS}:Parts.tombstones", '("tombstones", ref.id)', '("tombstones", segment.id)'),
    _one("patches are remembered by segment", f"{PARTS}:Parts.patches", '("patch", ref.id)', '("patch", segment.id)'),
    _one("filters are remembered without patches", f"{PARTS}:Parts.database", "tuple(ref.id for ref in segment.patches)", "()"),
    # Aliases
    _one(
        "an alias is moved whatever it stands for",
        f"{ALIASES}:Aliases.point",
        "except (Conflict, NotFound):\n            continue",
        "except (Conflict, NotFound):\n            return False",
    ),
    _one(
        "an alias is answered from memory",
        f"{ALIASES}:Aliases.resolve",
        "known = self._known.get(alias)\n",
        "known = self._known.get(alias)\n    if known is not None:\n        return known[0]\n",
    ),
    # Bulk builds
    _one(
        "a build does not look whether it was committed",
        f"{BULK}:BulkBuild._is_committed",
        "ours = {segment.id for segment in self.state.segments}",
        "return False",
    ),
    _one(
        "a build looks only at the generation in force",
        f"{BULK}:BulkBuild._is_committed",
        "async for generation, _ in archived(self.store, self.index, current.index_id):",
        "for generation in ():",
    ),
    _one("a build does not look again when it commits", f"{BULK}:BulkBuild._commit", "if await self._is_committed(manifest):", "if False:"),
    _one("a build does not see another run of it", f"{BULK}:BulkBuild._shows", "manifest.cause.endswith(self.build_id)", "False"),
    _one("a build goes on over another's record", f"{BULK}:BulkBuild._note", "raise self._other_run() from error", "pass"),
    _one("a sweep ignores unfinished builds", f"{SWEEP}:_kept_names", " | set().union(*builds.values())", ""),
    _one("a sweep takes the proof that a build was committed", f"{SWEEP}:_kept_names", "builds.values(), head", "(), head"),
    # The store
    _one("what exists is taken for ours", f"{OBJECTS}:_RemoteStore.put_if_absent", "elif held.is_ours:", "elif True:"),
    _one(
        "a refused create is not read back",
        f"{OBJECTS}:_RemoteStore.put_if_absent",
        "held = await self._read_back(name, data)",
        'held = _Held("", is_ours=False)',
    ),
    _one(
        "a replace is retried with the new etag",
        f"{OBJECTS}:_RemoteStore.replace_if_unchanged",
        "if held.etag != etag:",
        "if (etag := held.etag) is None:",
    ),
    _one("a cut answer is taken for whole", f"{OBJECTS}:_RemoteStore._read_once", 'if len(data) != meta["size"]:', "if False:"),
)


HARD = (
    "a drop takes what a branch under way holds",
    "a sweep ignores unfinished builds",
    "a branch does not see its parent go",
    "a branch trusts the marker of an earlier one",
    "a build goes on over another's record",
    "a sweep takes the archive of the generation in force",
    "a sweep takes the proof that a build was committed",
    "a sweep lists the history before it reads CURRENT",
    "a sweep takes young objects",
    "branches are listed once",
    "a drop lists after the deletion",
    "a sweep does not write down what it deletes",
    "a build does not look again when it commits",
    "an alias is moved whatever it stands for",
    "an alias is answered from memory",
)
"""Those that took more than 30,000 steps before there were situations for them. They are tried first."""


@contextmanager
def planted(mutation: Mutation) -> Iterator[None]:
    """The engine with one mistake in it."""
    texts: dict[str, str] = {}
    for path, old, new in mutation.edits:
        text = texts.get(path) or textwrap.dedent(inspect.getsource(_function(path)))
        if text.count(old) < 1:
            raise LookupError(f"{mutation.name}: {path} has no text {old!r}")
        texts[path] = text.replace(old, new)
    before = {path: _function(path).__code__ for path in texts}
    codes = {path: _compiled(path, text) for path, text in texts.items()}
    for path, code in codes.items():
        _function(path).__code__ = code
    try:
        yield
    finally:
        for path, code in before.items():
            _function(path).__code__ = code


def _function(path: str) -> FunctionType:
    module, _, qualified = path.partition(":")
    found: Any = importlib.import_module(module)
    for part in qualified.split("."):
        found = found.__dict__[part] if isinstance(found, type) else getattr(found, part)
    function = inspect.unwrap(getattr(found, "__func__", found))
    assert isinstance(function, FunctionType)
    return function


def _compiled(path: str, text: str) -> CodeType:
    """The code of a function given as text, compiled as if it stood in its module."""
    name = path.rpartition(".")[2].rpartition(":")[2]
    module = compile("from __future__ import annotations\n" + text, f"<{path} with a mistake>", "exec")
    return next(const for const in module.co_consts if isinstance(const, CodeType) and const.co_name == name)


@dataclass(frozen=True)
class Score:
    """Whether a mistake was caught, as what, and after how many steps over all seeds tried."""

    mutation: Mutation
    caught: str
    steps: int
    seconds: float


def try_mutation(mutation: Mutation, steps: int, seed: int) -> Score:
    began = time.process_time()
    with planted(mutation):
        outcome = simulate(seed, steps)
    return Score(mutation, outcome.violation.kind if outcome.violation else "", outcome.steps, time.process_time() - began)


def main(steps: int, seed: int, only: str = "", n_processes: int = 1) -> int:
    """Try all and print the table; 0 if at least 95 % are caught."""
    chosen = sorted((mutation for mutation in MUTATIONS if only in mutation.name), key=lambda mutation: mutation.name not in HARD)
    scores = []
    with multiprocessing.get_context("spawn").Pool(n_processes, maxtasksperchild=10) as pool:
        for score in pool.imap(partial(try_mutation, steps=steps, seed=seed), chosen):
            scores.append(score)
            print(f"{score.caught or 'NOT CAUGHT':12s} {score.steps:7d} steps {score.seconds:6.1f} s  {score.mutation.name}", flush=True)
    n_caught = sum(bool(score.caught) for score in scores)
    n_steps, seconds = sorted(score.steps for score in scores if score.caught), sum(score.seconds for score in scores)
    print(f"caught {n_caught} of {len(scores)} planted mistakes ({n_caught / max(len(scores), 1):.0%}) within {steps} steps each")
    print(f"half of them within {n_steps[len(n_steps) // 2] if n_steps else 0} steps; {seconds:.0f} s of processor time in all")
    return 0 if n_caught >= 0.95 * len(scores) else 1


if __name__ == "__main__":
    sys.exit(main(20_000, 1))
