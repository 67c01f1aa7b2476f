"""`tartan index` and `tartan import`: documents into an index, by a bulk build that survives being killed."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any

import typer

from handler.cli.progress import Reporter
from handler.cli.session import (
    MAINTENANCE_MEMORY_BYTES,
    AsJson,
    Output,
    Session,
    StoreUrl,
    count,
    facts,
    run,
    usage,
)

if TYPE_CHECKING:
    from rich.console import Console

    from engine.config import IndexConfig
    from engine.index.bulk import BuildReport, Source
    from engine.transfer.content import Background, Content

Name = Annotated[
    str | None, typer.Option("--name", "-n", metavar="INDEX", help="The index to make or to add to.", show_default="the source's name")
]
Nbits = Annotated[int | None, typer.Option("--nbits", help="Bits per dimension of a new index: 1, 2, 4 or 8.", show_default="4")]
Without = Annotated[list[str] | None, typer.Option("--without", metavar="FIELD", help="Leave this field out; may be repeated.")]
ThenCompact = Annotated[bool, typer.Option("--compact", help="Compact the index afterwards.")]
SegmentDocuments = Annotated[
    int | None,
    typer.Option("--segment-documents", min=1, help="Most documents of one segment; a killed build resumes at the last whole segment."),
]


def register(app: typer.Typer) -> None:
    app.command("index")(index)
    app.command("import")(import_)


def index(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="A .npy, .npz or .jsonl file, or s3://bucket/object.", show_default=False)
    ],
    name: Name = None,
    lengths: Annotated[
        str | None, typer.Option("--lengths", metavar="FILE", help="For .npy: tokens of each document, integers (N,).")
    ] = None,
    fields: Annotated[str | None, typer.Option("--fields", metavar="FILE", help="For arrays: JSON lines, one object a document.")] = None,
    ids: Annotated[str | None, typer.Option("--ids", metavar="FILE", help="For arrays: one external id a line.")] = None,
    nbits: Nbits = None,
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", help="Keyword search of a new index: unicode61 or trigram.", show_default="unicode61")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="Encoder of texts: a folder, s3://, a hub name or 'hashing'.", show_default="hashing")
    ] = None,
    int8: Annotated[bool | None, typer.Option("--int8", help="Load the encoder's int8 network.", show_default=False)] = None,
    pool_factor: Annotated[int | None, typer.Option("--pool-factor", min=1, help="Keep one token vector of a text in so many.")] = None,
    without: Without = None,
    segment_documents: SegmentDocuments = None,
    compact: ThenCompact = False,
    store: StoreUrl = None,
    as_json: AsJson = False,
) -> None:
    """Index documents: make the index if there is none, else add to it.

    SOURCE is one of

    - an array of token vectors, float16 or float32 (T, D), in .npy; with --lengths
    - an .npz archive with the arrays `tokens` and `doclens`
    - JSON lines with "embeddings", or "embeddings_b64" and "shape"; optionally "id" and "metadata"
    - JSON lines with "text" and/or "title", which an encoder turns into vectors; optionally "id"; every other key is a field

    Nothing is visible before everything is. A build that was killed goes on where it stopped when the same command is given again.
    A document whose id is there already replaces the older one; documents without ids are added each time.

    [dim]tartan index articles.jsonl
    tartan index tokens.npy --lengths doclens.npy --fields rows.jsonl --name papers --nbits 2
    tartan index s3://bucket/embedded/papers.npz --store s3://bucket/indices[/dim]
    """
    if fields is None and ids is None:
        pass
    elif PurePosixPath(source).suffix == ".jsonl":
        usage("--fields and --ids go with arrays; in JSON lines they stand in the line")

    async def work(session: Session) -> Output:
        wanted = name or _name_of(source)
        with Reporter() as report, _opened() as background:
            report("check", 0, 0)
            opened = await asyncio.to_thread(_contents, session, background, [source, lengths, fields, ids])
            found = await _source(session, background, opened, pool_factor, without or ())
            config = _config(nbits, tokenizer)
            return await _build(session, wanted, found, config, (nbits, tokenizer), segment_documents, compact, report)

    run(work, store, as_json, makes_store=True, memory_bytes=MAINTENANCE_MEMORY_BYTES, model=model, model_int8=int8)


def import_(
    directory: Annotated[str, typer.Argument(metavar="DIRECTORY", help="Index directory of NextPlaid or FastPlaid.", show_default=False)],
    name: Name = None,
    nbits: Annotated[int | None, typer.Option("--nbits", help="Bits per dimension: 1, 2, 4 or 8.", show_default="the directory's")] = None,
    without: Without = None,
    segment_documents: SegmentDocuments = None,
    compact: ThenCompact = False,
    store: StoreUrl = None,
    as_json: AsJson = False,
) -> None:
    """Import an index of NextPlaid or FastPlaid: documents with their ids, order and metadata.

    The directory is only read. Stop its server first, or import from a copy.

    [dim]tartan import ./indices/articles
    tartan import ./indices/articles --name articles8 --nbits 8 --store s3://bucket/indices[/dim]
    """

    async def work(session: Session) -> Output:
        import msgspec

        from engine.transfer.nextplaid.opening import read
        from engine.transfer.nextplaid.source import PlaidSource

        wanted = name or _name_of(directory)
        with Reporter() as report:
            report("check", 0, 0)
            plaid = await asyncio.to_thread(read, directory)
            config = plaid.config if nbits is None else msgspec.structs.replace(plaid.config, nbits=nbits)
            source = PlaidSource(plaid, without=without or ())
            output = await _build(session, wanted, source, config, (nbits, None), segment_documents, compact, report)
        return _with_notes(output, plaid.notes)

    run(work, store, as_json, makes_store=True, memory_bytes=MAINTENANCE_MEMORY_BYTES)


def _with_notes(output: Output, notes: list[str]) -> Output:
    def show(console: Console) -> None:
        output.show(console)
        for note in notes:
            console.print(f"note: {note}", markup=False)

    return Output({**output.document, "notes": notes}, show)


# Sources


def _name_of(source: str) -> str:
    """The last part of a path without its ending, if it can name an index."""
    stem = PurePosixPath(source.rstrip("/")).name.partition(".")[0]
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}", stem):
        usage(f"{source!r} does not name an index by itself: give --name")
    return stem


@contextlib.contextmanager
def _opened() -> Iterator[Background]:
    from engine.transfer.content import Background

    with Background() as background:
        yield background


def _contents(session: Session, background: Background, paths: list[str | None]) -> list[Content | None]:
    return [None if path is None else _content(session, background, path) for path in paths]


def _content(session: Session, background: Background, path: str) -> Content:
    """A local file, or an object of another store."""
    from engine.transfer.content import FileContent, ObjectContent

    if "://" not in path:
        return FileContent(path)
    from handler.runtime import open_at

    root, _, last = path.rpartition("/")
    return ObjectContent(open_at(root, session.runtime.settings), last, background, label=path)


async def _source(
    session: Session, background: Background, opened: list[Content | None], pool_factor: int | None, without: tuple[str, ...] | list[str]
) -> Source:
    """The source that the first content is, with what the others add to it."""
    from engine.transfer.arrays import open_npy
    from engine.transfer.input_kind import kind_of
    from engine.transfer.npz import open_npz
    from engine.transfer.vector_lines import VectorLines

    content, lengths, fields, ids = opened
    assert content is not None
    kind = await asyncio.to_thread(kind_of, content)
    if kind != "npy" and lengths is not None:
        usage("--lengths goes with an .npy array")
    if kind == "npy":
        if lengths is None:
            usage("an .npy array of tokens needs --lengths, the number of tokens of each document")
        return await asyncio.to_thread(open_npy, content, lengths, fields=fields, keys=ids, without=without)
    if kind == "npz":
        return await asyncio.to_thread(open_npz, content, fields=fields, keys=ids, without=without)
    if fields is not None or ids is not None:
        usage("--fields and --ids go with arrays; in JSON lines they stand in the line")
    if kind == "vectors":
        return await asyncio.to_thread(VectorLines, content, without=without)
    return await _texts(session, background, content, pool_factor, without)


async def _texts(
    session: Session, background: Background, content: Content, pool_factor: int | None, without: tuple[str, ...] | list[str]
) -> Source:
    from engine.transfer.text_lines import TextLines
    from handler.texts import document_encoder

    encode, named = await document_encoder(session.runtime.settings, background, pool_factor)
    return await asyncio.to_thread(TextLines, content, encode, encoder=named, without=without)


# Building


def _config(nbits: int | None, tokenizer: str | None) -> IndexConfig:
    from engine.config import IndexConfig

    chosen: dict[str, Any] = {"nbits": nbits, "fts_tokenizer": tokenizer}
    return IndexConfig(**{key: value for key, value in chosen.items() if value is not None})


async def _build(
    session: Session,
    name: str,
    source: Source,
    config: IndexConfig,
    asked: tuple[int | None, str | None],
    segment_documents: int | None,
    then_compact: bool,
    report: Reporter,
) -> Output:
    """Make the index if need be, build, perhaps compact, and say what was done."""
    import msgspec

    from engine.config import MaintenanceParams
    from engine.index.bulk import BulkBuild
    from engine.index.compact import compact
    from handler.runtime import n_cores

    reader = session.runtime.reader
    is_new = await _make_unless_there(session, name, config, asked)
    params = MaintenanceParams()
    if segment_documents is not None:
        params = msgspec.structs.replace(params, max_segment_documents=min(segment_documents, params.max_segment_documents))
    n_threads = session.runtime.settings.search_threads or n_cores()
    built = await BulkBuild(reader, name, source, params=params, n_threads=n_threads, progress=report).run()
    steps: dict[str, int] = {}
    if then_compact:
        steps = (await compact(reader, name, params=params, n_threads=n_threads, progress=report)).steps
    snapshot = await reader.snapshot(name)
    return _built(name, built, is_new, steps, snapshot.n_documents, snapshot.manifest.generation)


async def _make_unless_there(session: Session, name: str, config: IndexConfig, asked: tuple[int | None, str | None]) -> bool:
    """Create the index, on a store that has been tried first; returns whether it was made now.

    Raises InvalidRequest if it is there with other settings than those that were asked for (nbits, tokenizer).
    """
    from engine.config import check_index_name
    from engine.errors import Conflict, InvalidRequest, NotFound
    from engine.index.commit import create, load_head
    from engine.store.objects import probe_conditional_writes

    check_index_name(name)
    try:
        there = (await load_head(session.runtime.store, name)).manifest.config
    except NotFound:
        await probe_conditional_writes(session.runtime.store, "")
        try:
            await create(session.runtime.store, name, config)
            return True
        except Conflict:  # somebody made it at this moment
            there = (await load_head(session.runtime.store, name)).manifest.config
    for what, wanted, found in (("nbits", asked[0], there.nbits), ("tokenizer", asked[1], there.fts_tokenizer)):
        if wanted is not None and wanted != found:
            raise InvalidRequest(f"the index is there with another setting of {what}", index=name, expected=wanted, found=found)
    return False


def _built(name: str, built: BuildReport, is_new: bool, steps: dict[str, int], n_live: int, generation: int) -> Output:
    document = {
        "index": name,
        "generation": generation,
        "created": is_new,
        "documents_added": built.n_documents,
        "documents_replaced": built.n_replaced,
        "documents_resumed": built.n_resumed,
        "tokens_added": built.n_tokens,
        "segments_added": built.n_segments,
        "was_complete": built.was_committed_before,
        "documents": n_live,
        "compaction_steps": steps,
    }

    def show(console: Console) -> None:
        if built.was_committed_before:
            console.print(f"{name}: this source was indexed already by the run that was interrupted; nothing to do")
        lines: dict[str, object] = {
            "index": name + (" (new)" if is_new else ""),
            "added": f"{count(built.n_documents, 'document')}, {count(built.n_tokens, 'token')}, {count(built.n_segments, 'segment')}",
            "resumed": f"{count(built.n_resumed, 'document')} were there from an interrupted run" if built.n_resumed else None,
            "replaced": count(built.n_replaced, "document") if built.n_replaced else None,
            "compacted": ", ".join(f"{n} x {kind}" for kind, n in steps.items()) or None,
            "holds": count(n_live, "document"),
            "generation": generation,
        }
        facts(console, lines)

    return Output(document, show)
