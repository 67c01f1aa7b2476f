"""`tartan compact`, `gc` and `verify`: keeping indices in order."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from handler.cli.progress import Reporter
from handler.cli.session import MAINTENANCE_MEMORY_BYTES, AsJson, IndexName, Output, Session, StoreUrl, count, facts, run, size

if TYPE_CHECKING:
    from rich.console import Console

MAX_SHOWN_NAMES = 20


def register(app: typer.Typer) -> None:
    app.command("compact")(compact)
    app.command("gc")(gc)
    app.command("verify")(verify)


def compact(
    index: IndexName,
    force: Annotated[bool, typer.Option("--force", help="Quantise what is flat however little it is.")] = False,
    max_steps: Annotated[int | None, typer.Option("--max-steps", min=1, help="Stop after so many steps.")] = None,
    store: StoreUrl = None,
    as_json: AsJson = False,
) -> None:
    """Fold new documents into quantised segments, merge small segments, drop deleted documents.

    Neither readers nor writers wait; it can be killed at any moment and given again.

    [dim]tartan compact demo
    tartan compact demo --force[/dim]
    """

    async def work(session: Session) -> Output:
        from engine.index import compact as compaction
        from handler.runtime import n_cores

        with Reporter() as report:
            done = await compaction.compact(
                session.runtime.reader,
                index,
                force=force,
                max_steps=max_steps or compaction.MAX_STEPS,
                n_threads=session.runtime.settings.search_threads or n_cores(),
                progress=report,
            )
        document = {
            "index": index,
            "steps": done.steps,
            "documents": done.n_documents,
            "tokens": done.n_tokens,
            "given_up": done.n_given_up,
        }

        def show(console: Console) -> None:
            if not done.steps and not done.n_given_up:
                console.print(f"{index} is in good order")
                return
            steps = ", ".join(f"{n} x {kind}" for kind, n in done.steps.items()) or "none"
            lost = f"{done.n_given_up} to another compactor" if done.n_given_up else None
            rewritten = f"{count(done.n_documents, 'document')}, {count(done.n_tokens, 'token')}"
            facts(console, {"steps": steps, "rewritten": rewritten, "lost": lost})

        return Output(document, show)

    run(work, store, as_json, memory_bytes=MAINTENANCE_MEMORY_BYTES)


def gc(
    index: IndexName,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be deleted.")] = False,
    grace_s: Annotated[
        float | None,
        typer.Option(
            "--grace-s", min=0, help="Keep what was in force within so many seconds; below 3600 only if nobody else reads or writes."
        ),
    ] = None,
    store: StoreUrl = None,
    as_json: AsJson = False,
) -> None:
    """Collect garbage: delete objects that no kept generation, pin, branch or unfinished build names.

    INDEX may also be the name of a deleted index that left something behind.

    [dim]tartan gc demo --dry-run
    tartan gc demo[/dim]
    """

    async def work(session: Session) -> Output:
        from engine.config import MaintenanceParams, check_index_name
        from engine.index.sweep import sweep

        params = MaintenanceParams() if grace_s is None else MaintenanceParams(grace_s=grace_s)
        swept = await sweep(session.runtime.store, check_index_name(index), params=params, dry_run=dry_run)
        document = {
            "index": index,
            "dry_run": swept.dry_run,
            "objects": swept.n_objects,
            "kept": swept.n_kept,
            "young": swept.n_young,
            "deleted": swept.n_deleted,
            "deleted_bytes": swept.deleted_bytes,
            "names": list(swept.deleted),
        }

        def show(console: Console) -> None:
            verb = "would be deleted" if swept.dry_run else "deleted"
            kept = f"{count(swept.n_kept, 'object')} in use, {swept.n_young:,} too young to judge"
            facts(console, {verb: f"{count(swept.n_deleted, 'object')}, {size(swept.deleted_bytes)}", "kept": kept})
            if swept.dry_run:
                for name in swept.deleted[:MAX_SHOWN_NAMES]:
                    console.print(f"  {name}", markup=False)
                if swept.n_deleted > MAX_SHOWN_NAMES:
                    console.print(f"  and {swept.n_deleted - MAX_SHOWN_NAMES:,} more; --json lists all")

        return Output(document, show)

    run(work, store, as_json)


def verify(
    index: Annotated[str | None, typer.Argument(metavar="[INDEX]", help="Name of the index.", show_default="every index")] = None,
    all_generations: Annotated[bool, typer.Option("--all", help="Every kept generation, not only the current.")] = False,
    store: StoreUrl = None,
    as_json: AsJson = False,
) -> None:
    """Read everything that an index names; check every checksum and every reference. Exit code 1 if anything is wrong.

    [dim]tartan verify demo --all
    tartan verify --store s3://bucket/indices --json[/dim]
    """

    async def work(session: Session) -> Output:
        import msgspec

        from engine.index import verify as verification
        from engine.index.indices import list_indices

        names = [index] if index is not None else list(await list_indices(session.runtime.store))
        reports = {}
        with Reporter("objects") as report:
            for name in names:
                reports[name] = await verification.verify(session.runtime.reader, name, all_generations=all_generations, progress=report)
        lines = [
            {"index": name, **{key.removeprefix("n_"): value for key, value in msgspec.to_builtins(found).items()}}
            for name, found in reports.items()
        ]
        is_sound = not any(found.problems for found in reports.values())

        def show(console: Console) -> None:
            for name, found in reports.items():
                read = f"{count(found.n_generations, 'generation')}, {count(found.n_objects, 'object')}, {size(found.n_bytes)}"
                verdict = "sound" if not found.problems else count(len(found.problems), "problem")
                console.print(f"{name}: {verdict}; {read}, {count(found.n_documents, 'document')} stored", markup=False)
                for problem in found.problems:
                    console.print(f"  {problem}", markup=False)

        return Output({"sound": is_sound, "indices": lines}, show, is_good=is_sound)

    run(work, store, as_json, memory_bytes=MAINTENANCE_MEMORY_BYTES)
