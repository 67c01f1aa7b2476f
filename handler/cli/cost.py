"""`tartan cost`: what a month of an index costs on AWS, and when a container is cheaper than functions. Asks no store; engine/cost.py has the prices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import msgspec
import typer

from handler.cli.session import AsJson, Output, count, facts, fail, print_json, size, stdout, table

if TYPE_CHECKING:
    from rich.console import Console

    from engine.cost import Month, Workload


def register(app: typer.Typer) -> None:
    app.command("cost")(cost)


def cost(
    documents: Annotated[int, typer.Option("--documents", "-n", min=1, help="Documents of the index.", show_default=False)],
    tokens_per_document: Annotated[float, typer.Option("--tokens-per-document", min=1.0, help="Token vectors of a document.")] = 150.0,
    nbits: Annotated[int, typer.Option("--nbits", help="1, 2, 4 or 8.")] = 4,
    queries_per_day: Annotated[float, typer.Option("--queries-per-day", "-q", min=0.0, help="Searches a day.")] = 10_000.0,
    hit_rate: Annotated[
        float, typer.Option("--hit-rate", min=0.0, max=1.0, help="Share that meets a process with the index in memory.")
    ] = 0.9,
    adds_per_day: Annotated[float, typer.Option("--adds-per-day", min=0.0, help="Requests a day that add documents.")] = 0.0,
    memory: Annotated[int, typer.Option("--memory", min=128, max=10_240, help="MB of the function.")] = 2048,
    ephemeral: Annotated[int, typer.Option("--ephemeral", min=512, max=10_240, help="MB of the function's /tmp.")] = 512,
    architecture: Annotated[str, typer.Option("--architecture", help="arm64 or x86_64.")] = "arm64",
    region: Annotated[
        str | None, typer.Option("--region", help="Of the price table.", show_default="TARTAN_REGION or AWS_REGION, else us-east-1")
    ] = None,
    vcpu: Annotated[float, typer.Option("--vcpu", help="Of a container task.")] = 1.0,
    tasks: Annotated[int, typer.Option("--tasks", min=1, help="Least number of container tasks, for redundancy.")] = 2,
    peak: Annotated[float, typer.Option("--peak", min=1.0, help="Busiest hour over the average.")] = 4.0,
    warm_ms: Annotated[
        float | None, typer.Option("--warm-ms", min=0.0, help="Of a warm search of this index; else from docs/sizing.md.")
    ] = None,
    cold_ms: Annotated[float | None, typer.Option("--cold-ms", min=0.0, help="Of a cold search; else from docs/sizing.md.")] = None,
    cold_gets: Annotated[float | None, typer.Option("--cold-gets", min=1.0, help="Requests of a cold search of one segment.")] = None,
    answer_bytes: Annotated[float | None, typer.Option("--answer-bytes", min=0.0, help="Of an answer; 0 if it stays within AWS.")] = None,
    bytes_per_token: Annotated[float | None, typer.Option("--bytes-per-token", min=0.1, help="Stored; else from docs/sizing.md.")] = None,
    as_json: AsJson = False,
) -> None:
    """Estimate a month: storage, requests, compute, and the same load on containers.

    Prices are list prices of a table with a date: check them before you rely on them. Encoding texts, logs and transfers between
    zones are not counted.

    [dim]tartan cost --documents 20000 --queries-per-day 50000 --hit-rate 0.95
    tartan cost -n 100000 --tokens-per-document 60 --nbits 2 --memory 1769 --region eu-central-1 --json[/dim]
    """
    from engine.cost import MEASURED, Workload, estimate, prices
    from engine.errors import EngineError

    given = {"cold_ms": cold_ms, "cold_gets": cold_gets, "answer_bytes": answer_bytes}
    measured = _replaced(MEASURED, {name: value for name, value in given.items() if value is not None})
    if warm_ms is not None:
        measured = _replaced(measured, {"warm_ms": warm_ms, "warm_ms_per_million_tokens": 0.0})
    if bytes_per_token is not None:
        measured = _replaced(measured, {"bytes_per_token": ((nbits, bytes_per_token),)})
    try:
        if architecture not in ("arm64", "x86_64"):
            raise typer.BadParameter("architecture is arm64 or x86_64")
        work = Workload(
            n_documents=documents,
            tokens_per_document=tokens_per_document,
            nbits=nbits,
            queries_per_day=queries_per_day,
            hit_rate=hit_rate,
            adds_per_day=adds_per_day,
            memory_mb=memory,
            ephemeral_mb=ephemeral,
            peak=peak,
            architecture=cast(Literal["arm64", "x86_64"], architecture),
            vcpu=vcpu,
            min_tasks=tasks,
        )
        at = prices(region or _region())
        month = estimate(work, at, measured)
    except EngineError as error:
        fail(error.message, as_json, code=error.code, **error.details)
    output = _output(month, work, at.region, measured)
    if as_json:
        print_json(output.document)
    else:
        output.show(stdout())


def _region() -> str:
    """The deployment's region, if it has said one whose prices are known."""
    from engine.cost import prices_near
    from handler.cli.session import settings_of

    return prices_near(settings_of(None).region).region


def _replaced(measured: Any, changed: dict[str, Any]) -> Any:
    return msgspec.structs.replace(measured, **changed)


def _output(month: Month, work: Workload, region: str, measured: Any) -> Output:
    from engine.cost import PRICES_AS_OF

    document = {
        "region": region,
        "prices_as_of": PRICES_AS_OF,
        "workload": msgspec.to_builtins(work),
        "measured": msgspec.to_builtins(measured) | {"bytes_per_token": {str(n): value for n, value in measured.bytes_per_token}},
        "usd_per_month": month.usd,
        **msgspec.to_builtins(month),
    }
    document["container"]["usd"] = month.container.usd

    def show(console: Console) -> None:
        lines = table("a month on functions", "$", right=("$",))
        for name, usd in month.usd_items.items():
            lines.add_row(name, f"{usd:,.2f}")
        lines.add_row("together", f"{month.usd:,.2f}", style="bold")
        console.print(lines)
        box = month.container
        lines = table("a month on containers", "$", right=("$",))
        for name, usd in box.usd_items.items():
            lines.add_row(
                f"{box.n_tasks} tasks of {box.vcpu:g} vCPU, {box.memory_gb:g} GB" if name == "Fargate tasks" else name, f"{usd:,.2f}"
            )
        lines.add_row("together", f"{box.usd:,.2f}", style="bold")
        console.print(lines)
        cheaper = "never at this hit rate and size"
        if month.cheaper_from is not None:
            cheaper = f"{month.cheaper_from:,.0f} queries a day on, with {month.cheaper_with_tasks} tasks"
        memory = size(int(month.memory_bytes))
        facts(
            console,
            {
                "index": f"{count(int(work.n_tokens), 'token')}, {size(int(month.stored_bytes))} stored",
                "memory of a warm process": memory if month.fits else f"{memory}: more than the function has, so every query is cold",
                "a million queries": f"${month.usd_per_million_warm:.2f} warm, ${month.usd_per_million_cold:.2f} cold, answers' transfer not counted",
                "containers are cheaper from": cheaper,
                "prices": f"{region}, list prices written down on {PRICES_AS_OF}: check them",
            },
        )

    return Output(document, show)
