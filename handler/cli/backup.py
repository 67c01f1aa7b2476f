"""`tartan backup`, `restore`, `undelete` and `drill`: copies of indices elsewhere, and the way back."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from handler.cli.progress import Reporter, duration
from handler.cli.session import (
    MAINTENANCE_MEMORY_BYTES,
    AsJson,
    IndexName,
    Output,
    Session,
    StoreUrl,
    check_is_there,
    count,
    facts,
    moment,
    run,
    size,
    usage,
)

if TYPE_CHECKING:
    from rich.console import Console

    from engine.index.undelete import Recovery
    from engine.transfer.backup import BackupReport
    from engine.transfer.copying import Copied
    from engine.transfer.drill import DrillRecord

MAX_SHOWN_NAMES = 20

Target = Annotated[
    str, typer.Option("--to", metavar="URL", help="Where backups lie: a directory or s3://bucket/prefix.", show_default=False)
]
AsOf = Annotated[
    str | None,
    typer.Option("--as-of", metavar="WHEN", help="A generation's number, a time such as 2026-01-31T12:00Z, or a pin.", show_default="now"),
]


def register(app: typer.Typer) -> None:
    app.command("backup")(backup)
    app.command("restore")(restore)
    app.command("undelete")(undelete)
    app.command("drill")(drill)


# backup


def backup(
    to: Target,
    index: Annotated[str | None, typer.Argument(metavar="[INDEX]", help="Name of the index.", show_default="every index")] = None,
    as_of: AsOf = None,
    all_generations: Annotated[bool, typer.Option("--all", help="Every kept generation, not only the current and the pinned.")] = False,
    keep: Annotated[int | None, typer.Option("--keep", min=1, help="Let go of all but so many backups.", show_default="all")] = None,
    store: StoreUrl = None,
    as_json: AsJson = False,
) -> None:
    """Copy an index to another place, as far as it is not there yet, and check the copy.

    The copy is an index: it can be searched where it lies. It may be killed at any moment and given again.

    [dim]tartan backup demo --to s3://elsewhere/backups
    tartan backup --to /mnt/backups --keep 7
    tartan backup demo --to /mnt/backups --as-of before-import[/dim]
    """
    if as_of is not None and all_generations:
        usage("either --as-of or --all")
    wanted = _moment_of(as_of)

    async def work(session: Session) -> Output:
        from engine.errors import CorruptData, EngineError
        from engine.index.indices import survey
        from engine.index.snapshots import generations
        from engine.transfer.backup import backup, generation_of
        from handler.runtime import open_at

        _check_elsewhere(session.url, to)
        source, target = session.runtime.store, open_at(to, session.runtime.settings)
        reports = {}
        wished, damaged = [index] if index is not None else [], dict[str, EngineError]()
        if index is None:
            found_there = await survey(source)
            wished, damaged = list(found_there.heads), dict(found_there.unreadable)
        with Reporter("MB") as report:
            for name in wished:
                numbers: list[int] | None = None
                try:
                    if all_generations:
                        numbers = [line.generation for line in await generations(source, name)]
                    elif wanted is not None:
                        number = await generation_of(source, name, wanted)
                        assert number is not None
                        numbers = [number]
                    reports[name] = await backup(source, name, target, generations=numbers, keep=keep, progress=report)
                except CorruptData as error:
                    if index is not None:
                        raise
                    damaged[name] = error  # the others are backed up all the same
        lines = [_backup_line(name, found) for name, found in reports.items()]
        failed = {name: str(error) for name, error in damaged.items()}

        def show(console: Console) -> None:
            for line, (name, found) in zip(lines, reports.items(), strict=True):
                said = f"generation {found.record.generation} is in {to}"
                console.print(f"{name}: {said}; {_copied(found.copied)}; {duration(line['seconds'])}", markup=False)
                if found.dropped:
                    console.print(f"  let go of {count(len(found.dropped), 'older backup')}", markup=False)
            for name, why in failed.items():
                console.print(f"{name}: not backed up: {why}", markup=False, style="bold red")

        return Output({"to": to, "indices": lines, "failed": failed}, show, is_good=not failed)

    run(work, store, as_json, memory_bytes=MAINTENANCE_MEMORY_BYTES)


def _backup_line(name: str, found: BackupReport) -> dict[str, Any]:
    record = found.record
    return {
        "index": name,
        "generation": record.generation,
        "generations": list(found.generations),
        "moved": found.moved,
        **_copied_line(found.copied),
        "dropped": list(found.dropped),
        "seconds": round(record.finished_s - record.started_s, 3),
    }


def _copied_line(copied: Copied) -> dict[str, int]:
    return {
        "objects": copied.n_objects,
        "copied": copied.n_copied,
        "present": copied.n_present,
        "repaired": copied.n_repaired,
        "bytes_copied": copied.bytes_copied,
    }


def _copied(copied: Copied) -> str:
    said = f"{count(copied.n_copied, 'object')} copied ({size(copied.bytes_copied)}), {copied.n_present:,} there already"
    return said + (f", {copied.n_repaired:,} repaired" if copied.n_repaired else "")


# restore


def restore(
    url: Annotated[str, typer.Argument(metavar="URL", help="Where the backup lies.", show_default=False)],
    index: IndexName,
    as_of: AsOf = None,
    name: Annotated[str | None, typer.Option("--name", "-n", metavar="NEW", help="Restore under another name.")] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Over an index that is there: a new generation, which can be rolled back.")
    ] = False,
    store: StoreUrl = None,
    as_json: AsJson = False,
) -> None:
    """Bring an index back from a backup, and check every object of it.

    [dim]tartan restore s3://elsewhere/backups demo
    tartan restore /mnt/backups demo --as-of 2026-01-31T12:00Z --name demo-of-january
    tartan restore /mnt/backups demo --replace[/dim]
    """
    wanted, new = _moment_of(as_of), name or index

    async def work(session: Session) -> Output:
        from engine.store.objects import probe_conditional_writes
        from engine.transfer.backup import generation_of, restore
        from handler.runtime import open_at

        check_is_there(url)
        if new == index:
            _check_elsewhere(session.url, url)
        source, target = open_at(url, session.runtime.settings), session.runtime.store
        generation = await generation_of(source, index, wanted)
        await probe_conditional_writes(target, "")
        with Reporter("MB") as report:
            done = await restore(source, index, target, new, generation=generation, replace=replace, progress=report)
        document = {
            "index": new,
            "from": url,
            "from_generation": done.from_generation,
            "generation": done.generation,
            "created": done.is_new,
            "documents": done.n_documents,
            **_copied_line(done.copied),
        }
        said = f"{new} is generation {done.from_generation} of {url}: {count(done.n_documents, 'document')}; {_copied(done.copied)}"
        return Output(document, lambda console: console.print(said, markup=False))

    run(work, store, as_json, makes_store=True, memory_bytes=MAINTENANCE_MEMORY_BYTES)


# undelete


def undelete(
    index: IndexName,
    as_of: Annotated[
        str | None,
        typer.Option(
            "--as-of", metavar="WHEN", help="A generation's number, or a time such as 2026-01-31T12:00Z.", show_default="the newest"
        ),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do it; otherwise it is only said what would be done.")] = False,
    store: StoreUrl = None,
    as_json: AsJson = False,
) -> None:
    """Bring back what was deleted or overwritten behind the engine's back, from the old versions that an S3 bucket keeps.

    Exactly the objects that the generation names come back, and each is checked. Needs the extra `aws` and the right to list,
    read and delete versions. Exit code 1 if anything is lost for good.

    [dim]tartan undelete demo
    tartan undelete demo --yes
    tartan undelete demo --as-of 2026-01-31T12:00Z --yes[/dim]
    """
    wanted = _moment_of(as_of)
    if isinstance(wanted, str):
        usage(f"--as-of wants a generation's number or a time, not {as_of!r}")

    async def work(session: Session) -> Output:
        from engine.config import check_index_name
        from engine.index.undelete import plan_recovery, recover
        from engine.store.bucket import open_bucket
        from handler.runtime import store_options

        bucket = open_bucket(session.url, store_options(session.runtime.settings))
        plan = await plan_recovery(session.runtime.counting, bucket, check_index_name(index), wanted)
        if yes and plan.is_whole:
            with Reporter("objects") as report:
                await recover(session.runtime.counting, bucket, index, plan, progress=report)
        return _recovery(index, plan)

    run(work, store, as_json)


def _recovery(index: str, plan: Recovery) -> Output:
    lost = plan.lost or [repair.expected.name for repair in plan.repairs if repair.is_lost]
    document = {
        "index": index,
        "wanted": plan.wanted.generation,
        "created": moment(plan.wanted.created_s),
        "documents": plan.wanted.n_documents,
        "sound": plan.n_sound,
        "missing": [repair.expected.name for repair in plan.repairs],
        "lost": lost,
        "brought_back": plan.brought_back,
        "done": plan.generation is not None,
        "generation": plan.generation,
    }

    def show(console: Console) -> None:
        what = f"generation {plan.wanted.generation} of {document['created']}, {count(plan.wanted.n_documents, 'document')}"
        facts(console, {"wanted": what, "sound": count(plan.n_sound, "object"), "missing": count(len(plan.repairs), "object")})
        for name in lost[:MAX_SHOWN_NAMES]:
            console.print(f"  lost for good: {name}", markup=False)
        if plan.generation is not None:
            came = f"{count(len(plan.brought_back), 'object')} came back, every object is checked"
            console.print(f"{index} is at generation {plan.generation}; {came}", markup=False)
        elif lost:
            console.print("nothing is shown: restore a backup, or name another generation with --as-of")
        elif plan.repairs or plan.shows:
            console.print("this was only a plan; --yes carries it out")
        else:
            console.print("nothing is missing; --yes would read and check every object")

    return Output(document, show, is_good=not lost)


# drill


def drill(
    index: IndexName,
    to: Target,
    n_queries: Annotated[int, typer.Option("--queries", min=1, help="Queries whose answers are compared.")] = 20,
    k: Annotated[int, typer.Option("-k", min=1, help="Hits of each.")] = 10,
    as_is: Annotated[bool, typer.Option("--as-is", help="Try the backup that is there; do not bring it up to date first.")] = False,
    store: StoreUrl = None,
    as_json: AsJson = False,
) -> None:
    """Try a recovery: back up, restore beside the backup, verify, compare answers, roll back, delete what was restored.

    Reports what would have been lost (RPO) and how long recovery takes (RTO). Exit code 1 if what was restored is not the index.

    [dim]tartan drill demo --to s3://elsewhere/backups
    tartan drill demo --to /mnt/backups --as-is --json[/dim]
    """

    async def work(session: Session) -> Output:
        from engine.index.reader import Reader
        from engine.transfer.drill import drill
        from handler.runtime import open_at

        _check_elsewhere(session.url, to)
        backups = Reader(open_at(to, session.runtime.settings), executor=session.runtime.executor)
        with Reporter("MB") as report:
            record = await drill(session.runtime.reader, index, backups, n_queries=n_queries, k=k, as_is=as_is, progress=report)
        return _drilled(record)

    run(work, store, as_json)


def _drilled(record: DrillRecord) -> Output:
    import msgspec

    document = {"good": record.is_good, **msgspec.to_builtins(record)}

    def show(console: Console) -> None:
        lost = (
            "no backup was there: everything"
            if record.rpo_s is None
            else "nothing"
            if not record.rpo_s
            else f"changes of {duration(record.rpo_s)}"
        )
        backed_up = None if record.backup_s is None else f"{record.backup_s:.1f} s"
        compared = f"{count(record.n_queries, 'query', 'queries')}, {record.n_different:,} answered otherwise"
        lines: dict[str, object] = {
            "would have been lost": f"{lost} (RPO)",
            "backup": backed_up,
            "recovery": f"{record.rto_s:.1f} s to the first answer (RTO); {size(record.n_bytes)}, {count(record.n_documents, 'document')}",
            "verified": f"{count(record.n_problems, 'problem')}, {record.verify_s:.1f} s",
            "compared": compared,
            "rollback": "works" if record.rolled_back else "does not work",
        }
        facts(console, lines)
        console.print(f"{record.index}: the backup of generation {record.generation} {'can' if record.is_good else 'can NOT'} be relied on")

    return Output(document, show, is_good=record.is_good)


# Places and times


def _moment_of(text: str | None) -> int | float | str | None:
    """A generation's number, unix seconds of a time (without a zone it is UTC), or the name of a pin."""
    if text is None:
        return None
    if text.isascii() and text.isdigit():
        return int(text)
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        return text
    return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()


def _check_elsewhere(one: str, other: str) -> None:
    """A copy in the same place is none."""
    from engine.errors import InvalidRequest

    def place(url: str) -> str:
        from pathlib import Path
        from urllib.parse import unquote, urlsplit

        parts = urlsplit(url)
        return (
            str(Path(unquote(parts.path) if parts.scheme == "file" else url).expanduser().resolve())
            if parts.scheme in ("", "file")
            else url.rstrip("/")
        )

    if place(one) == place(other):
        raise InvalidRequest("the backup would be in the place that it is of", store=one)
