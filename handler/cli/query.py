"""`tartan search` and `tartan recall`: asking an index, and asking how well it answers."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from handler.cli.progress import Reporter
from handler.cli.session import AsJson, IndexName, Output, Session, StoreUrl, count, facts, run, size, table, usage

if TYPE_CHECKING:
    import numpy as np
    from rich.console import Console

    from engine.config import SearchParams
    from engine.index.reader import Snapshot

MAX_SHOWN_FIELDS = 4
MAX_SHOWN_CHARACTERS = 70
MAX_SHOWN_MATCHES = 12
SWEEP = (
    {"n_probe": 4, "n_candidates": 256, "n_rerank": 32},
    {"n_probe": 4, "n_candidates": 512, "n_rerank": 64},
    {"n_probe": 4, "n_candidates": 1024, "n_rerank": 128},
    {"n_probe": 8, "n_candidates": 1024, "n_rerank": 256},
    {"n_probe": 8, "n_candidates": 2048, "n_rerank": 512},
    {"n_probe": 8, "n_candidates": 4096, "n_rerank": 1024},
    {"n_probe": 16, "n_candidates": 8192, "n_rerank": 2048},
    {"n_probe": 32, "n_candidates": 16384, "n_rerank": 4096},
)
"""Settings that `recall` tries, each more work than the one before."""

NProbe = Annotated[int | None, typer.Option("--n-probe", min=1, help="Centroids probed per query token.", show_default="8")]
NCandidates = Annotated[int | None, typer.Option("--n-candidates", min=1, help="Documents scored by centroids.", show_default="4096")]
NRerank = Annotated[int | None, typer.Option("--n-rerank", min=1, help="Most documents scored exactly.", show_default="1024")]


def register(app: typer.Typer) -> None:
    app.command("search")(search)
    app.command("recall")(recall)


# search


@dataclass(frozen=True)
class _Asked:
    """What to search for: a text or token vectors, a filter, how hard to try. in_memory: bring the index into memory first."""

    text: str | None
    vectors: str | None
    is_keyword: bool
    where: str | None
    parameters: tuple[object, ...]
    params: SearchParams
    explain: bool
    in_memory: bool


@dataclass
class _Found:
    """An answer in the form of both outputs."""

    hits: list[dict[str, Any]]
    times_ms: dict[str, float]
    counts: dict[str, int]
    columns: tuple[str, ...] = ()


def search(
    index: IndexName,
    text: Annotated[str | None, typer.Argument(metavar="[TEXT]", help="What to search for.", show_default=False)] = None,
    vectors: Annotated[str | None, typer.Option("--vectors", metavar="FILE", help="A query as token vectors (Q, D) in .npy.")] = None,
    k: Annotated[int, typer.Option("-k", min=0, help="Hits wanted.")] = 10,
    where: Annotated[str | None, typer.Option("--where", metavar="CONDITION", help="Only documents that meet it: 'year > ?'.")] = None,
    param: Annotated[list[str] | None, typer.Option("--param", help="A value for each ? of the condition; JSON, else text.")] = None,
    keyword: Annotated[bool, typer.Option("--keyword", help="Search for the words of TEXT (BM25) and not its vectors.")] = False,
    explain: Annotated[bool, typer.Option("--explain", help="Show which document token answered each query token.")] = False,
    preset: Annotated[str, typer.Option("--preset", help="How hard to try: fast, balanced or exact.")] = "balanced",
    n_probe: NProbe = None,
    n_candidates: NCandidates = None,
    n_rerank: NRerank = None,
    threshold: Annotated[float | None, typer.Option("--threshold", help="Drop probed centroids that score less.")] = None,
    generation: Annotated[int | None, typer.Option("--generation", "-g", help="An older generation.", show_default="the current")] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="Encoder of TEXT: a folder, s3://, a hub name or 'hashing'.", show_default="hashing")
    ] = None,
    int8: Annotated[bool | None, typer.Option("--int8", help="Load the encoder's int8 network.", show_default=False)] = None,
    store: StoreUrl = None,
    as_json: AsJson = False,
) -> None:
    """Search an index, and see what the search cost.

    TEXT goes through the encoder that the documents went through: give the same --model.

    [dim]tartan search demo "bridges that fell down" -k 5
    tartan search demo "storm" --where "year > ? AND topic = ?" --param 1900 --param engineering
    tartan search demo "Tacoma" --keyword
    tartan search papers --vectors query.npy --preset fast --explain --json[/dim]
    """
    if (text is None) == (vectors is None):
        usage("give either TEXT or --vectors")
    if keyword and (text is None or explain):
        usage("--keyword searches for the words of a TEXT and has no vectors to explain")
    if param and where is None:
        usage("--param goes with --where")
    wanted: dict[str, Any] = {"n_probe": n_probe, "n_candidates": n_candidates, "n_rerank": n_rerank, "centroid_score_threshold": threshold}

    async def work(session: Session) -> Output:
        from engine.config import PRESETS, SearchParams

        usual = next((values for name, values in PRESETS.items() if name == preset), None)
        if usual is None:
            usage(f"--preset is one of {', '.join(PRESETS)}, not {preset!r}")
        params = SearchParams(k=k, **{**usual, **{key: value for key, value in wanted.items() if value is not None}})
        asked = _Asked(text, vectors, keyword, where, tuple(map(_value, param or ())), params, explain, preset == "exact")
        return await _search(session, index, generation, asked)

    run(work, store, as_json, model=model, model_int8=int8)


def _value(text: str) -> object:
    """1900 is a number, "1900" in quotes a text, anything that is no JSON a text as it stands."""
    try:
        found = json.loads(text)
    except ValueError:
        return text
    return text if isinstance(found, dict | list) else found


async def _search(session: Session, index: str, generation: int | None, asked: _Asked) -> Output:
    reader = session.runtime.reader
    query = await _query(session, asked)
    began = time.perf_counter()
    with reader.counted() as cost:
        snapshot = await reader.snapshot(index, generation=generation)
        subset = None if asked.where is None else await snapshot.select(asked.where, asked.parameters)
        if query is None:
            found = await _by_keyword(snapshot, asked, subset)
        else:
            found = await _by_vectors(session, snapshot, asked, query, subset)
    found.times_ms["total"] = round((time.perf_counter() - began) * 1000, 3)
    found.counts |= {"requests": cost.n_requests, "bytes": cost.bytes_read, "rounds": cost.rounds}
    found.columns = tuple(column.name for column in snapshot.columns)
    document = {
        "index": index,
        "generation": snapshot.manifest.generation,
        "hits": found.hits,
        "cost": {**found.counts, "times_ms": found.times_ms},
        "documents_allowed": None if subset is None else len(subset),
    }
    return Output(document, lambda console: _show(console, found, asked))


async def _query(session: Session, asked: _Asked) -> np.ndarray | None:
    """Token vectors float32 (Q, D); None for a keyword query."""
    if asked.is_keyword:
        return None
    if asked.vectors is not None:
        return _query_vectors(asked.vectors)
    import msgspec

    from handler.runtime import load_encoder
    from handler.settings import LEXICAL_MODEL

    settings = session.runtime.settings
    if not session.runtime.has_model:
        settings = msgspec.structs.replace(settings, model=LEXICAL_MODEL)
    assert asked.text is not None
    encoder = await load_encoder(settings)
    tokens, _ = await encoder.encode_queries([asked.text])
    encoder.close()
    return tokens


def _query_vectors(path: str) -> np.ndarray:
    import numpy as np

    from engine.config import MAX_QUERY_TOKENS
    from engine.errors import InvalidRequest
    from engine.transfer.content import FileContent
    from engine.transfer.npy import NpyArray

    array = NpyArray.open(FileContent(path))
    if len(array.shape) != 2 or array.dtype.kind != "f" or not 1 <= array.shape[0] <= MAX_QUERY_TOKENS:
        expected = f"floats, 1 to {MAX_QUERY_TOKENS} tokens x dimensions"
        raise InvalidRequest("not the token vectors of a query", file=path, expected=expected, found=f"{array.dtype} {array.shape}")
    tokens: np.ndarray = array.runs([(0, array.shape[0])])[0].astype(np.float32)
    return tokens


async def _by_keyword(snapshot: Snapshot, asked: _Asked, subset: np.ndarray | None) -> _Found:
    assert asked.text is not None
    [(ids, scores)] = await snapshot.keyword([asked.text], asked.params.k, subset)
    rows = await snapshot.rows(ids)
    return _Found([_hit(*line, None) for line in zip(ids.tolist(), scores.tolist(), rows, strict=True)], {}, {})


async def _by_vectors(session: Session, snapshot: Snapshot, asked: _Asked, query: np.ndarray, subset: np.ndarray | None) -> _Found:
    searcher, mode = session.runtime.searcher, "warm" if asked.in_memory else "auto"
    [answer] = await searcher.search(snapshot, [query], asked.params, subset=subset, explain=asked.explain, mode=mode)  # type: ignore[arg-type]
    hits = [_hit(*line) for line in zip(answer.ids.tolist(), answer.scores.tolist(), answer.rows, answer.keys, strict=True)]
    for hit, matches in zip(hits, answer.matches or (), strict=False):
        hit["matches"] = [{"query_token": n, "token": token, "similarity": round(value, 6)} for n, (token, value) in enumerate(matches)]
    stats = answer.stats
    counts = {"candidates": stats.n_candidates, "reranked": stats.n_reranked, "tokens_scored": stats.n_tokens_scored}
    counts["cold_segments"] = stats.n_cold_segments
    return _Found(hits, {stage: ms for stage, ms in stats.times_ms.items() if stage != "total"}, counts)


def _hit(document_id: int, score: float, row: dict[str, Any] | None, key: str | None) -> dict[str, Any]:
    hit: dict[str, Any] = {"document_id": document_id, "score": score, "fields": {k: v for k, v in (row or {}).items() if k != "_subset_"}}
    if key is not None:
        hit["id"] = key
    return hit


def _show(console: Console, found: _Found, asked: _Asked) -> None:
    if not found.hits:
        console.print("no hits")
    else:
        has_keys = any("id" in hit for hit in found.hits)
        columns = tuple(sorted(found.columns, key=lambda name: name != "title")[:MAX_SHOWN_FIELDS])
        shown = table("", "score", "document", *(("id",) if has_keys else ()), *columns, right=("", "score", "document"), clipped=columns)
        for rank, hit in enumerate(found.hits, 1):
            keys = (hit.get("id", ""),) if has_keys else ()
            shown.add_row(
                str(rank), f"{hit['score']:.4f}", str(hit["document_id"]), *keys, *(_short(hit["fields"].get(name)) for name in columns)
            )
        console.print(shown)
        if asked.explain:
            _show_matches(console, found.hits)
    facts(console, {"cost": _cost_line(found)})


def _short(value: object) -> str:
    from rich.markup import escape

    text = "" if value is None else " ".join(str(value).split())
    return escape(text if len(text) <= MAX_SHOWN_CHARACTERS else text[: MAX_SHOWN_CHARACTERS - 1] + "…")


def _show_matches(console: Console, hits: Sequence[dict[str, Any]]) -> None:
    console.print("query token > document token, similarity; the best first")
    for rank, hit in enumerate(hits, 1):
        best = sorted(hit["matches"], key=lambda match: -match["similarity"])
        said = ", ".join(f"{match['query_token']}>{match['token']} {match['similarity']:.3f}" for match in best[:MAX_SHOWN_MATCHES])
        console.print(f"{rank:>3}  {said}{' ...' if len(best) > MAX_SHOWN_MATCHES else ''}", markup=False)


def _cost_line(found: _Found) -> str:
    stages = ", ".join(f"{stage} {ms:.1f}" for stage, ms in found.times_ms.items() if stage != "total")
    c = found.counts
    parts = [f"{found.times_ms['total']:.1f} ms" + (f" ({stages})" if stages else "")]
    parts.append(f"{count(c['requests'], 'request')} in {count(c['rounds'], 'round')}, {size(c['bytes'])}")
    if "candidates" in c:
        parts.append(f"{count(c['candidates'], 'candidate')}, {c['reranked']:,} scored exactly, {count(c['tokens_scored'], 'token')}")
    return "; ".join(parts)


# recall


def recall(
    index: IndexName,
    k: Annotated[int, typer.Option("-k", min=1, help="Recall of so many hits.")] = 10,
    n_queries: Annotated[int, typer.Option("--queries", min=1, help="Documents taken as queries.")] = 50,
    query_tokens: Annotated[int, typer.Option("--query-tokens", min=1, help="Tokens taken of each.")] = 16,
    target: Annotated[float, typer.Option("--target", min=0, max=1, help="Mean recall to reach.")] = 0.95,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the choice of documents and tokens.")] = 0,
    store: StoreUrl = None,
    as_json: AsJson = False,
) -> None:
    """Measure the search against exhaustive search over the stored vectors, and find the cheapest parameters that reach a target.

    Queries are a few tokens of the index's own documents. This is the loss of the search alone: what the codec loses, the stored vectors
    have lost already; and real queries are harder than pieces of documents. Everything is read once. Exit code 1 if nothing reaches it.

    [dim]tartan recall demo
    tartan recall papers -k 100 --queries 200 --target 0.98 --json[/dim]
    """

    async def work(session: Session) -> Output:
        with Reporter() as report:
            return await _recall(session, index, k, n_queries, query_tokens, target, seed, report)

    run(work, store, as_json)


async def _recall(
    session: Session, index: str, k: int, n_queries: int, query_tokens: int, target: float, seed: int, report: Reporter
) -> Output:
    import numpy as np

    from engine.config import SearchParams
    from engine.errors import InvalidRequest
    from engine.evaluate import Exhaustive
    from engine.transfer.sampling import sampled_queries

    snapshot = await session.runtime.reader.snapshot(index)
    ids = await snapshot.live_ids()
    if not len(ids):
        raise InvalidRequest("recall needs documents", index=index, found=0)
    k = min(k, len(ids))
    queries = await sampled_queries(snapshot, ids, n_queries, query_tokens, seed)
    truth = Exhaustive(np.concatenate(queries), np.cumsum([0, *map(len, queries)]), k)
    await _read_truth(snapshot, truth, report)
    true_ids, _ = truth.result()
    tries = []
    default = SearchParams(k=k)
    for number, choice in enumerate(SWEEP):
        report("search", number, len(SWEEP))
        tries.append(await _try(session, snapshot, queries, true_ids, SearchParams(k=k, **choice)))
    reaching = [line for line in tries if line["recall"] >= target]
    document = {
        "index": index,
        "generation": snapshot.manifest.generation,
        "k": k,
        "queries": len(queries),
        "target": target,
        "settings": tries,
        "cheapest": reaching[0] if reaching else None,
        "command": _command(index, k, reaching[0]) if reaching else None,
        "http_params": _http_params(k, reaching[0]) if reaching else None,
    }
    return Output(document, lambda console: _show_recall(console, document, default), is_good=bool(reaching))


def _command(index: str, k: int, line: dict[str, Any]) -> str:
    """What to type to search with the settings of a line."""
    options = " ".join(f"--{name.replace('_', '-')} {line[name]}" for name in ("n_probe", "n_candidates", "n_rerank"))
    return f'tartan search {index} "..." -k {k} {options}'


def _http_params(k: int, line: dict[str, Any]) -> dict[str, int]:
    """The same for the HTTP API, where a quarter of n_full_scores is scored exactly: not less of anything than the line has."""
    return {"top_k": k, "n_ivf_probe": line["n_probe"], "n_full_scores": max(line["n_candidates"], 4 * line["n_rerank"])}


async def _read_truth(snapshot: Snapshot, truth: Any, report: Reporter) -> None:
    from engine.transfer.export import blocks

    n_done = 0
    async for block in blocks(snapshot):
        tokens, offsets = await block.tokens()
        await snapshot.parts.compute(truth.add, tokens, offsets, block.ids)
        n_done += len(block.ids)
        report("exact", n_done, snapshot.n_documents)


async def _try(
    session: Session, snapshot: Snapshot, queries: Sequence[np.ndarray], true_ids: np.ndarray, params: SearchParams
) -> dict[str, Any]:
    """One line of the sweep: mean recall, and what a query costs in memory."""
    import numpy as np

    from engine.evaluate import ABSENT, recall_at_k

    found = np.full(true_ids.shape, ABSENT, np.int64)
    times_ms, n_tokens = [], []
    for line, query in zip(found, queries, strict=True):
        [answer] = await session.runtime.searcher.search(snapshot, [query], params, with_rows=False, mode="warm")
        line[: len(answer.ids)] = answer.ids
        times_ms.append(answer.stats.times_ms["total"])
        n_tokens.append(answer.stats.n_tokens_scored)
    shares = recall_at_k(true_ids, found, params.k)
    return {
        "n_probe": params.n_probe,
        "n_candidates": params.n_candidates,
        "n_rerank": params.n_rerank,
        "recall": round(float(shares.mean()), 4),
        "worst": round(float(shares.min()), 4),
        "p50_ms": round(statistics.median(times_ms), 3),
        "tokens_scored": round(statistics.mean(n_tokens)),
    }


def _show_recall(console: Console, document: dict[str, Any], default: SearchParams) -> None:
    named = ("n_probe", "n_candidates", "n_rerank")
    columns = (*named, f"recall@{document['k']}", "worst", "p50 ms", "tokens scored")
    shown = table(*columns, "", right=columns)
    for line in document["settings"]:
        is_default = all(line[name] == getattr(default, name) for name in named)
        marks = [mark for mark, holds in (("default", is_default), ("cheapest", line is document["cheapest"])) if holds]
        numbers = (f"{line['recall']:.4f}", f"{line['worst']:.2f}", f"{line['p50_ms']:.1f}", f"{line['tokens_scored']:,}")
        shown.add_row(*(str(line[name]) for name in named), *numbers, ", ".join(marks))
    console.print(shown)
    said = f"of {count(document['queries'], 'query', 'queries')}; target {document['target']}"
    console.print(said + ("" if document["cheapest"] else ", which no setting reaches"))
    if document["cheapest"]:
        console.print(f"use it:  {document['command']}", markup=False)
        console.print(f'over HTTP:  "params": {json.dumps(document["http_params"])}', markup=False)
