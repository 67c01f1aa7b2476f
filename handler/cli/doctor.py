"""`tartan doctor`: the checklist for production, as checks that run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from handler.cli.session import AsJson, Output, Session, StoreUrl, run, table

if TYPE_CHECKING:
    from rich.console import Console

STYLES = {"pass": "green", "warn": "yellow", "fail": "bold red", "skip": "dim"}


def register(app: typer.Typer) -> None:
    app.command("doctor")(doctor)


def doctor(
    url: Annotated[str | None, typer.Option("--url", help="A running server to examine, too.", show_default="none")] = None,
    backups: Annotated[str | None, typer.Option("--backups", metavar="URL", help="Where backups lie.", show_default="none")] = None,
    key: Annotated[str | None, typer.Option("--key", envvar="TARTAN_API_KEY", help="API key of the server.", show_default=False)] = None,
    max_backup_days: Annotated[float, typer.Option("--max-backup-days", min=0, help="A changed index with an older backup fails.")] = 2.0,
    max_drill_days: Annotated[float, typer.Option("--max-drill-days", min=0, help="An older recovery drill is a warning.")] = 90.0,
    load_test: Annotated[Path, typer.Option("--load-test", metavar="FILE", help="Result of the load test.")] = Path("data/load-test.json"),
    lock: Annotated[
        Path | None, typer.Option("--lock", metavar="FILE", help="Lock file to compare with.", show_default="infra/requirements.lock")
    ] = None,
    no_writes: Annotated[bool, typer.Option("--no-writes", help="Leave out the checks that write a probe and delete it.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="A warning is a failure.")] = False,
    store: StoreUrl = None,
    as_json: AsJson = False,
) -> None:
    """Go through the checklist for production: store, machine, server, recovery. Exit code 1 if a check fails.

    Run it where the server runs, with its environment and its identity. Each line that is not passed says what to do.

    [dim]tartan doctor
    tartan doctor --store s3://bucket/indices --url https://search.example.com --backups s3://elsewhere/backups
    tartan doctor --strict --json[/dim]
    """

    async def work(session: Session) -> Output:
        from handler.doctor.examination import Case, examine

        named: dict[str, Any] = {} if lock is None else {"lock": lock}
        case = Case(
            session.runtime,
            session.url,
            url=url,
            key=key,
            backups=backups,
            max_backup_days=max_backup_days,
            max_drill_days=max_drill_days,
            may_write=not no_writes,
            load_test=load_test,
            **named,
        )
        found = await examine(case)
        counts = {verdict: sum(finding.verdict == verdict for finding in found) for verdict in STYLES}
        is_good = not counts["fail"] and not (strict and counts["warn"])
        document = {"good": is_good, "counts": counts, "checks": found}

        def show(console: Console) -> None:
            shown = table("", "check", "", "found", "what to do")
            group = ""
            for finding in found:
                head, group = (finding.group if finding.group != group else ""), finding.group
                verdict = f"[{STYLES[finding.verdict]}]{finding.verdict}[/]"
                shown.add_row(head, finding.check, verdict, _plain(finding.said), _plain(finding.todo))
            console.print(shown)
            console.print(", ".join(f"{n} {verdict}" for verdict, n in counts.items() if n))

        return Output(document, show, is_good=is_good)

    run(work, store, as_json)


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)
