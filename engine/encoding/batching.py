"""An encoder behind `await`: concurrent requests share runs of the network, which fills its batches and keeps the event loop free.

Requests are grouped by what can run together: (queries or documents, pool_factor). A group is open while the lane's worker is busy; it
closes when the worker comes free, at `max_texts`, or, if the lane was idle, after one turn of the event loop. So a lone request never
waits for company, and under load groups grow by themselves. Queries and documents have a lane each: a search does not queue behind
an ingest.

Nothing outlives its event loop: state is kept per loop, so one object may serve several loops one after another (Mangum, tests).
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from engine.encoding.encoder import Encoder, ModelInfo, flatten
from engine.errors import Unavailable

MAX_TEXTS = 64
"""Texts of a group (NextPlaid's MAX_BATCH_TEXTS)."""

MAX_WAITING_TEXTS = 1024
"""Texts accepted and not yet answered, per lane: about 40 s of long documents or 3 s of queries for a small int8 model on one core."""

Vectors = tuple[np.ndarray, np.ndarray]
_Key = tuple[bool, int]  # is_query, pool_factor (0 is off)
_QUERY: _Key = (True, 0)


@dataclass(slots=True)
class _Request:
    texts: Sequence[str]
    answer: asyncio.Future[Vectors]


@dataclass(slots=True)
class _Group:
    requests: list[_Request] = field(default_factory=list)
    n_texts: int = 0


@dataclass(slots=True)
class _Lane:
    """Queries or documents of one event loop. `turn` is held by the group that runs."""

    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    open_groups: dict[_Key, _Group] = field(default_factory=dict)
    n_waiting_texts: int = 0
    tasks: set[asyncio.Task[None]] = field(default_factory=set)


class BatchingEncoder:
    """`await` an Encoder. Each caller gets its own vectors, or its own error; a cancelled caller disturbs nobody."""

    def __init__(self, encoder: Encoder, *, max_texts: int = MAX_TEXTS, max_waiting_texts: int = MAX_WAITING_TEXTS) -> None:
        self._encoder = encoder
        self._max_texts = max_texts
        self._max_waiting_texts = max_waiting_texts
        self._lanes: dict[asyncio.AbstractEventLoop, tuple[_Lane, _Lane]] = {}
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="encode")

    @property
    def info(self) -> ModelInfo:
        return self._encoder.info

    def waiting_texts(self) -> dict[str, int]:
        """Texts accepted and not yet answered, of queries and of documents."""
        lanes = list(self._lanes.values())
        return {kind: sum(pair[at].n_waiting_texts for pair in lanes) for at, kind in enumerate(("query", "document"))}

    async def encode_queries(self, texts: Sequence[str]) -> Vectors:
        """As Encoder.encode_queries. Raises Unavailable (with retry_after_s) while too many texts wait."""
        with self._admitted(_QUERY, len(texts)) as lane:
            return await self._encode(lane, _QUERY, texts)

    async def encode_documents(self, texts: Sequence[str], pool_factor: int | None = None) -> Vectors:
        """As Encoder.encode_documents; more than `max_texts` go in pieces, so that others get their turn in between."""
        key = (False, pool_factor if pool_factor and pool_factor > 1 else 0)
        pieces = [texts[i : i + self._max_texts] for i in range(0, len(texts), self._max_texts)] or [texts]
        with self._admitted(key, len(texts)) as lane:
            answers = [await self._encode(lane, key, piece) for piece in pieces]
        if len(answers) == 1:
            return answers[0]
        rows = [tokens[start:end] for tokens, offsets in answers for start, end in itertools.pairwise(offsets)]
        return flatten(rows, self.info.embedding_dim)

    def close(self) -> None:
        """Let running work end and refuse more."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    @contextmanager
    def _admitted(self, key: _Key, n_texts: int) -> Iterator[_Lane]:
        """The lane, with the caller's texts counted as waiting. One request is let in however long it is, if nobody else waits."""
        lane = self._lane(key)
        if lane.n_waiting_texts and lane.n_waiting_texts + n_texts > self._max_waiting_texts:
            raise Unavailable("too many texts wait to be encoded", waiting=lane.n_waiting_texts, limit=self._max_waiting_texts)
        lane.n_waiting_texts += n_texts
        try:
            yield lane
        finally:
            lane.n_waiting_texts -= n_texts

    async def _encode(self, lane: _Lane, key: _Key, texts: Sequence[str]) -> Vectors:
        request = _Request(texts, asyncio.get_running_loop().create_future())
        group = lane.open_groups.get(key)
        if group is None or group.n_texts + len(texts) > self._max_texts:
            group = lane.open_groups[key] = _Group()
            task = asyncio.create_task(self._run(lane, key, group))
            lane.tasks.add(task)
            task.add_done_callback(lane.tasks.discard)
        group.requests.append(request)
        group.n_texts += len(texts)
        return await request.answer

    def _lane(self, key: _Key) -> _Lane:
        loop = asyncio.get_running_loop()
        if loop not in self._lanes:
            self._lanes = {known: lanes for known, lanes in self._lanes.items() if not known.is_closed()}
            self._lanes[loop] = (_Lane(), _Lane())
        return self._lanes[loop][0 if key[0] else 1]

    async def _run(self, lane: _Lane, key: _Key, group: _Group) -> None:
        """Wait for the lane's turn, close the group, encode what is still wanted, answer everyone."""
        try:
            async with lane.turn:
                await asyncio.sleep(0)
                if lane.open_groups.get(key) is group:
                    del lane.open_groups[key]
                wanted = [request for request in group.requests if not request.answer.done()]
                if wanted:
                    await self._answer(key, wanted)
        finally:
            for request in group.requests:
                request.answer.cancel()  # no-op for the answered; the others' loop is shutting down

    async def _answer(self, key: _Key, requests: list[_Request]) -> None:
        """Encode the requests in one call; if that fails, one by one, so that only the guilty one gets the error."""
        try:
            tokens, offsets = await self._call(key, [text for request in requests for text in request.texts])
        except Exception as error:
            if len(requests) == 1:
                _settle(requests[0], error)
                return
            for request in requests:
                await self._answer(key, [request])
            return
        first = 0
        for request in requests:
            own = offsets[first : first + len(request.texts) + 1]
            _settle(request, (tokens[own[0] : own[-1]], own - own[0]))
            first += len(request.texts)

    async def _call(self, key: _Key, texts: list[str]) -> Vectors:
        is_query, pool_factor = key
        loop = asyncio.get_running_loop()
        if is_query:
            return await loop.run_in_executor(self._threads, self._encoder.encode_queries, texts)
        return await loop.run_in_executor(self._threads, self._encoder.encode_documents, texts, pool_factor or None)


def _settle(request: _Request, outcome: Vectors | Exception) -> None:
    """Answer the caller, unless it has gone."""
    if request.answer.done():
        return
    if isinstance(outcome, Exception):
        request.answer.set_exception(outcome)
    else:
        request.answer.set_result(outcome)
