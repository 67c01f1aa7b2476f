"""`tartan list`, `info`, `export` and `delete`: what is there, one index in detail, its documents, its end."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

import typer

from handler.cli.progress import Reporter
from handler.cli.session import (
    MAINTENANCE_MEMORY_BYTES,
    AsJson,
    IndexName,
    Output,
    Session,
    StoreUrl,
    count,
    facts,
    moment,
    run,
    size,
    table,
    usage,
)

if TYPE_CHECKING:
    from rich.console import Console

    from engine.format.manifest import Manifest


def register(app: typer.Typer) -> None:
    app.command("list")(list_)
    app.command("info")(info)
    app.command("export")(export)
    app.command("delete")(delete)


def list_(store: StoreUrl = None, as_json: AsJson = False) -> None:
    """List the indices of a store.

    [dim]tartan list
    tartan list --store s3://bucket/indices --json[/dim]
    """

    async def work(session: Session) -> Output:
        from engine.index.indices import list_indices

        lines = [_summary(name, head.manifest) for name, head in (await list_indices(session.runtime.store)).items()]

        def show(console: Console) -> None:
            if not lines:
                console.print(f"no indices in {session.url}", markup=False)
                return
            shown = table("index", "documents", "tokens", "dim", "bits", "segments", "size", "generation", right=_NUMBERS)
            for line in lines:
                numbers = (f"{line['documents']:,}", f"{line['tokens']:,}", str(line["dim"] or "-"), str(line["nbits"]))
                shown.add_row(line["index"], *numbers, str(line["segments"]), size(line["bytes"]), str(line["generation"]))
            console.print(shown)

        return Output({"store": session.url, "indices": lines}, show)

    run(work, store, as_json)


_NUMBERS = ("documents", "tokens", "dim", "bits", "segments", "size", "generation")


def _summary(name: str, manifest: Manifest) -> dict[str, Any]:
    return {
        "index": name,
        "generation": manifest.generation,
        "created": moment(manifest.created_s),
        "documents": manifest.n_documents,
        "tokens": sum(segment.n_tokens for segment in manifest.segments),
        "dim": manifest.dim,
        "nbits": manifest.config.nbits,
        "segments": len(manifest.segments),
        "bytes": sum(_segment_bytes(segment) for segment in manifest.segments) + sum(codec.size_bytes for codec in manifest.codecs),
    }


def _segment_bytes(segment: Any) -> int:
    return int(segment.size_bytes) + (segment.metadata.size_bytes if segment.metadata else 0)


def info(
    index: IndexName,
    generation: Annotated[int | None, typer.Option("--generation", "-g", help="An older generation.", show_default="the current")] = None,
    store: StoreUrl = None,
    as_json: AsJson = False,
) -> None:
    """Describe an index: size, settings, codecs, segments, fields.

    [dim]tartan info demo
    tartan info demo --generation 3 --json[/dim]
    """

    async def work(session: Session) -> Output:
        snapshot = await session.runtime.reader.snapshot(index, generation=generation)
        document = _description(index, snapshot.manifest)
        return Output(document, lambda console: _show_description(console, document))

    run(work, store, as_json)


def _description(name: str, manifest: Manifest) -> dict[str, Any]:
    codecs = [
        {"id": ref.id, "nbits": ref.nbits, "centroids": ref.n_centroids, "tokens_trained": ref.n_tokens_trained, "bytes": ref.size_bytes}
        for ref in manifest.codecs
    ]
    segments = [
        {
            "id": ref.id,
            "kind": ref.kind,
            "home": ref.home or name,
            "codec": ref.codec or None,
            "documents": ref.n_live,
            "deleted": ref.n_documents - ref.n_live,
            "tokens": ref.n_tokens,
            "bytes": _segment_bytes(ref),
            "first_id": ref.first_id,
            "last_id": ref.last_id,
            "external_ids": ref.has_keys,
        }
        for ref in manifest.segments
    ]
    n_tokens = sum(ref.n_tokens for ref in manifest.segments)
    vector_bytes = sum(ref.size_bytes for ref in manifest.segments) + sum(ref.size_bytes for ref in manifest.codecs)
    return {
        **_summary(name, manifest),
        "index_id": manifest.index_id,
        "cause": manifest.cause,
        "next_id": manifest.next_id,
        "deleted": sum(ref.n_documents - ref.n_live for ref in manifest.segments),
        "bytes_per_token": round(vector_bytes / n_tokens, 1) if n_tokens else None,
        "max_documents": manifest.config.max_documents,
        "fts_tokenizer": manifest.config.fts_tokenizer,
        "fields": {column.name: column.type for column in manifest.columns},
        "codec_list": codecs,
        "segment_list": segments,
    }


def _show_description(console: Console, found: dict[str, Any]) -> None:
    per_token = f"; {found['bytes_per_token']} bytes a token, codec and stored fields included" if found["bytes_per_token"] else ""
    lines: dict[str, object] = {
        "index": found["index"],
        "generation": f"{found['generation']} of {found['created']}: {found['cause']}",
        "documents": f"{found['documents']:,}" + (f", and {found['deleted']:,} deleted" if found["deleted"] else ""),
        "tokens": f"{found['tokens']:,}",
        "dimensions": found["dim"] or "not known before the first document",
        "bits": found["nbits"],
        "limit": count(found["max_documents"], "document") if found["max_documents"] else None,
        "size": size(found["bytes"]) + per_token,
        "keywords": found["fts_tokenizer"],
        "fields": ", ".join(f"{name} {kind}" for name, kind in found["fields"].items()) or "none",
        "codecs": ", ".join(f"{codec['centroids']:,} centroids at {codec['nbits']} bits" for codec in found["codec_list"]) or "none yet",
    }
    facts(console, lines)
    if found["segment_list"]:
        shown = table("segment", "kind", "documents", "deleted", "tokens", "size", "ids", right=("documents", "deleted", "tokens", "size"))
        for ref in found["segment_list"]:
            numbers = (f"{ref['documents']:,}", f"{ref['deleted']:,}", f"{ref['tokens']:,}", size(ref["bytes"]))
            name = ref["id"] if ref["home"] == found["index"] else f"{ref['home']}:{ref['id']}"
            shown.add_row(name, ref["kind"], *numbers, f"{ref['first_id']} to {ref['last_id']}")
        console.print(shown)


def export(
    index: IndexName,
    output: Annotated[str, typer.Argument(metavar="FILE", help="File to write; - is standard output.")] = "-",
    vectors: Annotated[bool, typer.Option("--vectors/--no-vectors", help="With the vectors, decoded, as base64 of float32.")] = True,
    generation: Annotated[int | None, typer.Option("--generation", "-g", help="An older generation.", show_default="the current")] = None,
    store: StoreUrl = None,
    as_json: AsJson = False,
) -> None:
    """Write every document as a line of JSON, which 'tartan index' reads again.

    The generation is held until the last line is written. A file appears whole or not at all.

    [dim]tartan export demo demo.jsonl
    tartan export demo --no-vectors | head -3[/dim]
    """
    if as_json and output == "-":
        usage("--json prints a summary, so the lines need a FILE")

    async def work(session: Session) -> Output | None:
        with Reporter() as report:
            if output == "-":
                await _write_lines(session, index, generation, sys.stdout.buffer, vectors, report)
                return None
            with _appearing_whole(output) as file:
                n_lines, number = await _write_lines(session, index, generation, file, vectors, report)
        document = {"index": index, "generation": number, "documents": n_lines, "file": output}
        return Output(document, lambda console: console.print(f"{count(n_lines, 'document')} in {output}", markup=False))

    run(work, store, as_json, memory_bytes=MAINTENANCE_MEMORY_BYTES)


async def _write_lines(
    session: Session, index: str, generation: int | None, file: BinaryIO, with_vectors: bool, report: Reporter
) -> tuple[int, int]:
    """Write the documents of a generation, held meanwhile. Returns (lines, generation)."""
    from engine.index import snapshots
    from engine.transfer.export import json_lines

    n_lines = 0
    async with snapshots.held(session.runtime.store, index, generation, "export") as manifest:
        snapshot = await session.runtime.reader.snapshot(index, generation=manifest.generation)
        async for line in json_lines(snapshot, with_vectors=with_vectors):
            file.write(line)
            n_lines += 1
            report("export", n_lines, snapshot.n_documents)
        file.flush()
    return n_lines, manifest.generation


@contextlib.contextmanager
def _appearing_whole(path: str) -> Iterator[BinaryIO]:
    """A file that is there when the block has ended well, and not before."""
    partial = Path(f"{path}.part")
    try:
        with partial.open("wb") as file:
            yield file
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def delete(
    index: IndexName,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    store: StoreUrl = None,
    as_json: AsJson = False,
) -> None:
    """Delete an index with all its generations and pins. Objects that branches share stay.

    [dim]tartan delete demo
    tartan delete demo --yes[/dim]
    """
    if not yes and not sys.stdin.isatty():
        usage("deleting needs --yes where nobody can be asked")

    async def work(session: Session) -> Output:
        from engine.index.indices import drop

        snapshot = await session.runtime.reader.snapshot(index)
        question = f"Delete {index} with {count(snapshot.n_documents, 'document')} from {session.url}?"
        if not yes and not typer.confirm(question, err=True):
            return Output({"index": index, "deleted": False}, lambda console: console.print("nothing was deleted"), is_good=False)
        await drop(session.runtime.store, index)
        return Output({"index": index, "deleted": True}, lambda console: console.print(f"deleted {index}"))

    run(work, store, as_json)
