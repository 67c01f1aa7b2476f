"""`tartan serve`, `key` and `version`: the server and what belongs to running it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from handler.cli.session import AsJson, UnreadableSetting, facts, fail, print_json, settings_of, stdout, usage

if TYPE_CHECKING:
    from handler.auth import Scope


def register(app: typer.Typer) -> None:
    app.command("serve")(serve)
    keys = typer.Typer(no_args_is_help=True)
    keys.command("mint")(key_mint)
    app.add_typer(keys, name="key", help="API keys of the server.")
    app.command("version")(version)


def serve(
    host: Annotated[str | None, typer.Option("--host", "-h", help="Address to listen on.", show_default="0.0.0.0")] = None,
    port: Annotated[int | None, typer.Option("--port", "-p", min=1, max=65535, help="Port to listen on.", show_default="8080")] = None,
    index_dir: Annotated[
        str | None,
        typer.Option(
            "--index-dir",
            "-d",
            "--store",
            metavar="URL",
            help="Where indices lie: a directory or s3://bucket/prefix.",
            show_default="./data/indices",
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Encoder of texts: a folder, s3://, a hub name or 'hashing'.", show_default="none")
    ] = None,
    int8: Annotated[bool | None, typer.Option("--int8", help="Load the encoder's int8 network.", show_default=False)] = None,
    query_length: Annotated[
        int | None, typer.Option("--query-length", min=1, help="Tokens of a query.", show_default="the model's")
    ] = None,
    document_length: Annotated[
        int | None, typer.Option("--document-length", min=1, help="Tokens of a document.", show_default="the model's")
    ] = None,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="Threads of the encoder.")] = None,
    workers: Annotated[int | None, typer.Option("--workers", min=1, help="Server processes.", show_default="1")] = None,
    read_only: Annotated[
        bool | None, typer.Option("--read-only", help="Search only: refuse every change, do no maintenance.", show_default=False)
    ] = None,
    tls_cert: Annotated[str | None, typer.Option("--tls-cert", metavar="FILE", help="Certificate (chain) to serve TLS with.")] = None,
    tls_key: Annotated[str | None, typer.Option("--tls-key", metavar="FILE", help="Its private key.")] = None,
    as_json: AsJson = False,
) -> None:
    """Serve indices over HTTP, with NextPlaid's API. SIGTERM ends it gracefully.

    Everything else is set by the environment; docs/ has the list. Logs are JSON lines on standard output.

    [dim]tartan serve --host 127.0.0.1 --model hashing
    tartan serve -d s3://bucket/indices -m s3://bucket/models/colbert --int8 --workers 4[/dim]
    """
    try:
        settings = settings_of(
            index_dir,
            host=host,
            port=port,
            model=model,
            model_int8=int8,
            query_length=query_length,
            document_length=document_length,
            encoder_threads=threads,
            workers=workers,
            read_only=read_only,
            tls_cert=tls_cert,
            tls_key=tls_key,
        )
        from handler import server

        code = server.serve(settings.host, settings.port, settings, settings.workers)
    except (UnreadableSetting, ValueError) as error:
        fail(str(error), as_json, code="invalid-request")
    except OSError as error:
        fail((error.strerror or str(error)).lower(), as_json, code="store-unavailable", address=f"{settings.host}:{settings.port}")
    if code:
        raise typer.Exit(code)


def key_mint(
    scope: Annotated[list[str], typer.Option("--scope", help="What it may do: search, write, admin; may be repeated.", show_default=False)],
    indices: Annotated[str, typer.Option("--indices", metavar="PATTERN", help="The indices it reaches.")] = "*",
    note: Annotated[str, typer.Option("--note", help="Whose key it is.")] = "",
    as_json: AsJson = False,
) -> None:
    """Make an API key. The key is shown this once; the server is configured with its record, which holds only a hash.

    Put the records as a JSON list into TARTAN_API_KEYS or the file that TARTAN_API_KEYS_FILE names.

    [dim]tartan key mint --scope search --scope write --indices "team-*" --note "team"[/dim]
    """
    import msgspec

    from handler.auth import SCOPES, mint_key

    wrong = [name for name in scope if name not in SCOPES]
    if wrong:
        usage(f"--scope is one of {', '.join(SCOPES)}, not {wrong[0]!r}")
    scopes: list[Scope] = [known for known in SCOPES if known in scope]
    key, record = mint_key(scopes, indices=indices, note=note)
    if as_json:
        print_json({"key": key, "record": record})
        return
    facts(stdout(), {"key": key, "record": msgspec.json.encode(record).decode()})


def version(as_json: AsJson = False) -> None:
    """Print the versions of Tartan and of what it stands on.

    [dim]tartan version --json[/dim]
    """
    from importlib.metadata import version as version_of

    from handler.runtime import release

    found = {"tartan": release(), "python": sys.version.split()[0], **{name: version_of(name) for name in ("numpy", "obstore", "litestar")}}
    if as_json:
        print_json(found)
    else:
        facts(stdout(), dict(found))
