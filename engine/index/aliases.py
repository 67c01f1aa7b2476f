"""Aliases: names that stand for an index and can be moved to another one in a single step (blue-green).

A name of an index always wins over an alias of the same spelling, so an ordinary index never pays for aliases. Moving an alias is one
conditional write; a request that began after it was acknowledged sees the new index. Callers: handler/, the CLI.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

from engine.config import check_index_name
from engine.errors import Conflict, NotFound
from engine.format import names
from engine.format.markers import Alias, read_marker, write_marker
from engine.index.clock import Clock, SystemClock
from engine.index.commit import load_head
from engine.store.base import ObjectStore

_MOVES = 8


class Aliases:
    """The aliases of one store, with those seen lately remembered by etag (a check of one costs a conditional GET)."""

    def __init__(self, store: ObjectStore, *, clock: Clock | None = None) -> None:
        self._store = store
        self._clock = clock or SystemClock()
        self._known: dict[str, tuple[str, str]] = {}

    def known(self, alias: str) -> str | None:
        """The index that an alias stood for when last asked, without a request; `resolve` confirms it."""
        known = self._known.get(alias)
        return known[0] if known else None

    async def resolve(self, alias: str) -> str:
        """The index that an alias stands for now. NotFound (`index-not-found`) if there is no such alias. One request."""
        known = self._known.get(alias)
        name = names.alias(alias)
        try:
            found = await (self._store.get(name) if known is None else self._store.get_if_changed(name, known[1]))
        except NotFound as error:
            self._known.pop(alias, None)
            raise NotFound("no index or alias of this name", code="index-not-found", index=alias) from error
        if found is not None:
            known = self._known[alias] = (read_marker(found.data, Alias, name=name).index, found.etag)
        assert known is not None
        return known[0]

    async def all(self) -> dict[str, str]:
        """Alias to index, by name."""
        return {alias: index async for alias, index in self._listed()}

    async def _listed(self) -> AsyncIterator[tuple[str, str]]:
        async for listed in self._store.list(names.aliases()):
            alias = listed.name.removeprefix(names.aliases())
            try:
                yield alias, await self.resolve(alias)
            except NotFound:
                continue

    async def point(self, alias: str, index: str) -> bool:
        """Let an alias stand for an index, which must exist; returns whether the alias is new.

        Raises NotFound for an unknown index, Conflict (`index-exists`) if the alias is the name of an index. Three or four requests.
        """
        check_index_name(alias)
        check_index_name(index)
        await load_head(self._store, index)
        if await self._is_index(alias):
            raise Conflict("an index has this name, so it cannot be an alias", code="index-exists", index=alias)
        name = names.alias(alias)
        for _ in range(_MOVES):
            data = write_marker(Alias(index=index, id=names.fresh_id(), created_s=self._clock.now_s()))
            try:
                found = await self._store.get(name)
            except NotFound:
                found = None
            try:
                if found is None:
                    etag = await self._store.put_if_absent(name, data)
                else:
                    etag = await self._store.replace_if_unchanged(name, data, found.etag)
            except (Conflict, NotFound):
                continue
            self._known[alias] = (index, etag)
            return found is None
        raise Conflict("others moved the alias each time", alias=alias, attempts=_MOVES)

    async def _is_index(self, name: str) -> bool:
        try:
            await load_head(self._store, name)
        except NotFound:
            return False
        return True

    async def drop(self, alias: str) -> bool:
        """Forget an alias; the index stays. Returns whether there was one."""
        check_index_name(alias)
        self._known.pop(alias, None)
        name = names.alias(alias)
        try:
            await self._store.get(name)
        except NotFound:
            return False
        await self._store.delete([name])
        return True
