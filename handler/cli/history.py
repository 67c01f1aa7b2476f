"""`tartan generations`, `pin`, `rollback` and `branch`: an index through time."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from handler.cli.session import AsJson, IndexName, Output, Session, StoreUrl, count, moment, run, table, usage

if TYPE_CHECKING:
    from rich.console import Console

GenerationOption = Annotated[int | None, typer.Option("--generation", "-g", help="The generation.", show_default="the current", min=0)]
PinName = Annotated[str, typer.Argument(metavar="NAME", help="Name of the pin.", show_default=False)]


def register(app: typer.Typer) -> None:
    app.command("generations")(generations)
    pins = typer.Typer(no_args_is_help=True)
    pins.command("add")(pin_add)
    pins.command("list")(pin_list)
    pins.command("remove")(pin_remove)
    app.add_typer(pins, name="pin", help="Keep generations under a name, safe from garbage collection.")
    app.command("rollback")(rollback)
    app.command("branch")(branch)


def generations(
    index: IndexName,
    last: Annotated[int | None, typer.Option("--last", min=1, help="Show only so many, the newest.")] = None,
    store: StoreUrl = None,
    as_json: AsJson = False,
) -> None:
    """List the kept generations, newest first, each with its time and cause.

    [dim]tartan generations demo
    tartan generations demo --last 5 --json[/dim]
    """

    async def work(session: Session) -> Output:
        from engine.index import snapshots

        found = await snapshots.generations(session.runtime.store, index, last=last)
        lines = [
            {
                "generation": line.generation,
                "created": moment(line.created_s),
                "cause": line.cause,
                "documents": line.n_documents,
                "segments": line.n_segments,
                "pins": list(line.pins),
                "current": line.is_current,
            }
            for line in found
        ]

        def show(console: Console) -> None:
            shown = table("generation", "created", "documents", "segments", "cause", "pins", right=("generation", "documents", "segments"))
            for line in found:
                number = f"{line.generation}{' *' if line.is_current else '  '}"
                numbers = (f"{line.n_documents:,}", str(line.n_segments))
                shown.add_row(number, moment(line.created_s), *numbers, line.cause, ", ".join(line.pins))
            console.print(shown)

        return Output({"index": index, "generations": lines}, show)

    run(work, store, as_json)


def pin_add(
    index: IndexName,
    name: PinName,
    generation: GenerationOption = None,
    note: Annotated[str, typer.Option("--note", help="What the pin is for.")] = "",
    store: StoreUrl = None,
    as_json: AsJson = False,
) -> None:
    """Keep a generation under a name.

    [dim]tartan pin add demo before-import
    tartan pin add demo release-3 --generation 12 --note "as shipped"[/dim]
    """

    async def work(session: Session) -> Output:
        from engine.index import snapshots

        made = await snapshots.pin(session.runtime.store, index, name, generation=generation, note=note)
        document = {"index": index, "pin": name, "generation": made.generation, "created": moment(made.created_s), "note": made.note}
        return Output(document, lambda console: console.print(f"pinned generation {made.generation} of {index} as {name}"))

    run(work, store, as_json)


def pin_list(index: IndexName, store: StoreUrl = None, as_json: AsJson = False) -> None:
    """List the pins of an index.

    [dim]tartan pin list demo[/dim]
    """

    async def work(session: Session) -> Output:
        from engine.index import snapshots
        from engine.index.commit import load_head

        await load_head(session.runtime.store, index)
        found = sorted((await snapshots.pins(session.runtime.store, index)).items())
        lines = [
            {"pin": name, "generation": pin.generation, "created": moment(pin.created_s), "note": pin.note, "temporary": pin.temporary}
            for name, pin in found
        ]

        def show(console: Console) -> None:
            if not found:
                console.print(f"no pins on {index}")
                return
            shown = table("pin", "generation", "created", "note", right=("generation",))
            for name, pin in found:
                shown.add_row(name, str(pin.generation), moment(pin.created_s), pin.note)
            console.print(shown)

        return Output({"index": index, "pins": lines}, show)

    run(work, store, as_json)


def pin_remove(index: IndexName, name: PinName, store: StoreUrl = None, as_json: AsJson = False) -> None:
    """Remove a pin; garbage collection may then take what only it kept.

    [dim]tartan pin remove demo before-import[/dim]
    """

    async def work(session: Session) -> Output:
        from engine.index import snapshots

        await snapshots.unpin(session.runtime.store, index, name)
        return Output({"index": index, "pin": name, "removed": True}, lambda console: console.print(f"removed pin {name} of {index}"))

    run(work, store, as_json)


def rollback(
    index: IndexName,
    generation: Annotated[
        int | None, typer.Argument(metavar="[GENERATION]", min=0, help="The generation to return to.", show_default=False)
    ] = None,
    at: Annotated[str | None, typer.Option("--at", metavar="TIME", help="To what was in force then: 2026-01-31T12:00Z.")] = None,
    pin: Annotated[str | None, typer.Option("--pin", metavar="NAME", help="To what a pin holds.")] = None,
    store: StoreUrl = None,
    as_json: AsJson = False,
) -> None:
    """Make an older generation current again. This is a new generation: what came in between is kept and can be rolled back to.

    [dim]tartan rollback demo 3
    tartan rollback demo --pin before-import
    tartan rollback demo --at 2026-01-31T12:00Z[/dim]
    """
    if sum(choice is not None for choice in (generation, at, pin)) != 1:
        usage("name the generation in one way: its number, --at or --pin")
    time_s = _unix_time(at)

    async def work(session: Session) -> Output:
        from engine.errors import NotFound
        from engine.index import snapshots

        wanted = generation
        if time_s is not None:
            wanted = await snapshots.generation_at_time(session.runtime.store, index, time_s)
        elif pin is not None:
            pins = await snapshots.pins(session.runtime.store, index)
            if pin not in pins:
                raise NotFound("no pin of this name", code="pin-not-found", index=index, pin=pin)
            wanted = pins[pin].generation
        assert wanted is not None
        manifest = (await snapshots.rollback(session.runtime.store, index, wanted)).manifest
        document = {"index": index, "to": wanted, "generation": manifest.generation, "documents": manifest.n_documents}
        said = f"{index} is at generation {wanted} again, as generation {manifest.generation}: {count(manifest.n_documents, 'document')}"
        return Output(document, lambda console: console.print(said))

    run(work, store, as_json)


def _unix_time(text: str | None) -> float | None:
    """ISO 8601 to unix seconds; without a zone it is UTC."""
    if text is None:
        return None
    try:
        moment_ = datetime.fromisoformat(text)
    except ValueError:
        usage(f"--at wants a time as 2026-01-31T12:00Z, not {text!r}")
    return (moment_ if moment_.tzinfo else moment_.replace(tzinfo=UTC)).timestamp()


def branch(
    index: IndexName,
    name: Annotated[str, typer.Argument(metavar="NEW", help="Name of the new index.", show_default=False)],
    generation: GenerationOption = None,
    store: StoreUrl = None,
    as_json: AsJson = False,
) -> None:
    """Make a new index over the same objects, without copying them. Both then go their own ways.

    [dim]tartan branch demo experiment
    tartan branch demo demo-of-may --generation 12[/dim]
    """

    async def work(session: Session) -> Output:
        from engine.index import snapshots

        manifest = (await snapshots.branch(session.runtime.store, index, name, generation=generation)).manifest
        document = {"index": name, "from": index, "cause": manifest.cause, "documents": manifest.n_documents}
        return Output(document, lambda console: console.print(f"{name}: {manifest.cause}, {count(manifest.n_documents, 'document')}"))

    run(work, store, as_json)
