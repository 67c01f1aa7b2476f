"""`tartan build-status`: bulk builds of many inputs (infra/build.asl.json) that are under way or were broken off."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any

import typer

from handler.cli.session import AsJson, IndexName, Output, Session, StoreUrl, count, moment, run, table

if TYPE_CHECKING:
    from rich.console import Console

    from engine.index.joint import BuildStatus


def register(app: typer.Typer) -> None:
    app.command("build-status")(build_status)


def build_status(
    index: IndexName,
    give_up: Annotated[
        str | None, typer.Option("--give-up", metavar="BUILD", help="Forget a build that will not be finished; gc takes its segments.")
    ] = None,
    store: StoreUrl = None,
    as_json: AsJson = False,
) -> None:
    """How far bulk builds of many inputs are: those that are not committed yet, or whose last step broke off.

    A build that was broken off goes on when it is started again with the same request.

    [dim]tartan build-status papers
    tartan build-status papers --give-up 1d1e8f4f100a8f50759babbffe066e34[/dim]
    """

    async def work(session: Session) -> Output:
        from engine.errors import InvalidRequest
        from engine.index import joint

        if give_up is not None and not re.fullmatch("[0-9a-f]{32}", give_up):
            raise InvalidRequest("not the id of a build", build=repr(give_up)[:140])
        await session.runtime.reader.head(index)
        n_removed = 0 if give_up is None else await joint.give_up(session.runtime.store, index, give_up)
        found = [_document(status) for status in await joint.builds(session.runtime.store, index)]

        def show(console: Console) -> None:
            if give_up is not None:
                console.print(f"{count(n_removed, 'record')} of build {give_up} removed")
            if not found:
                console.print(f"{index}: no build is under way")
                return
            lines = table(
                "build", "begun", "inputs done", "documents", "segments", "committed", right=("inputs done", "documents", "segments")
            )
            for one in found:
                done = f"{one['inputs_done']} of {one['inputs']}"
                lines.add_row(
                    one["build"], one["begun"], done, f"{one['documents']:,}", f"{one['segments']:,}", "yes" if one["committed"] else "no"
                )
            console.print(lines)

        return Output({"index": index, "removed_records": n_removed, "builds": found}, show)

    run(work, store, as_json)


def _document(status: BuildStatus) -> dict[str, Any]:
    import msgspec

    plan = msgspec.json.decode(status.plan)
    return {
        "build": status.build,
        "begun": moment(status.created_s),
        "inputs": len(plan.get("inputs", ())),
        "inputs_done": status.n_done,
        "documents": status.n_documents,
        "segments": sum(share.n_segments for share in status.shares),
        "committed": status.is_committed,
    }
