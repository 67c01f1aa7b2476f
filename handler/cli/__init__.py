"""`tartan`: the engine and the server on the command line.

    session    what all commands share: options, the store, output as tables or JSON, errors
    progress   how far a long command is
    build      index, import
    builds     build-status
    query      search, recall
    indices    list, info, export, delete
    history    generations, pin, rollback, branch
    backup     backup, restore, undelete, drill
    doctor     doctor
    cost       cost
    upkeep     compact, gc, verify
    service    serve, key, version
    smoke      smoke

Exit codes: 0 done, 1 it failed (one line on stderr says why), 2 the command line is wrong, 130 interrupted. Numeric libraries and the
engine are imported by the commands that need them, so that help is quick.
"""

from __future__ import annotations

import os
import sys

import typer

from handler.cli import backup, build, builds, cost, doctor, history, indices, query, service, smoke, upkeep

INTERRUPTED = 130

app = typer.Typer(
    name="tartan",
    help="Multi-vector (late-interaction) search on a directory or S3.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
for module in (build, builds, query, indices, history, backup, upkeep, doctor, cost, service, smoke):
    module.register(app)


def main() -> None:
    """The entry point of the `tartan` command."""
    try:
        app()
    except SystemExit as ended:
        if ended.code == INTERRUPTED:
            print("tartan: interrupted", file=sys.stderr)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(INTERRUPTED)  # an orderly exit would wait for threads that train or encode
        raise
