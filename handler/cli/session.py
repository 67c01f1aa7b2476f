"""What all commands share: the common options, the store and engine behind them, output, errors.

A command is a function that takes options and calls `run` with what it wants done; `run` opens the Runtime, waits, prints the Output and
turns failures into one line on stderr and exit code 1. Only JSON or the answer itself goes to stdout.
"""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from handler.runtime import Runtime

DEFAULT_STORE = "./data/indices"
"""That of Settings, shown by --help without importing it; a test compares."""
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
PIPED_COLUMNS = 160
"""Width of what does not go to a terminal."""
MAINTENANCE_MEMORY_BYTES = 128 << 20
"""For commands that read everything once: a cache would only hold what is not asked for again."""

StoreUrl = Annotated[
    str | None,
    typer.Option(
        "--store",
        metavar="URL",
        help="Where indices lie: a directory or s3://bucket/prefix. Otherwise TARTAN_INDEX_DIR.",
        show_default=DEFAULT_STORE,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a table.")]
IndexName = Annotated[str, typer.Argument(metavar="INDEX", help="Name of the index.", show_default=False)]


@dataclass(frozen=True)
class Output:
    """What a command found: `document` for --json, `show` for people. is_good False makes the exit code 1."""

    document: dict[str, Any]
    show: Callable[[Console], None]
    is_good: bool = True


@dataclass(frozen=True)
class Session:
    """One command at work."""

    runtime: Runtime
    url: str
    as_json: bool


Work = Callable[[Session], Awaitable[Output | None]]


def run(work: Work, store: str | None, as_json: bool, *, makes_store: bool = False, **overrides: Any) -> None:
    """Do `work` with a runtime on the chosen store, print what it gives, and exit with 1 if it fails.

    makes_store  the command may be the first to write there; others want a directory that exists
    overrides    settings that options of the command set; None leaves them to the environment
    """
    try:
        from engine.errors import EngineError

        settings = settings_of(store, **overrides)
        output = asyncio.run(_run(work, settings, as_json, makes_store))
    except EngineError as error:
        fail(error.message, as_json, code=error.code, **error.details)
    except BrokenPipeError:
        raise
    except OSError as error:
        facts = {"file": error.filename} if error.filename else {}
        fail((error.strerror or str(error)).lower(), as_json, code="store-unavailable", **facts)
    except UnreadableSetting as error:
        fail(str(error), as_json, code="invalid-request")
    if output is None:
        return
    if as_json:
        print_json(output.document)
    else:
        output.show(stdout())
    if not output.is_good:
        raise typer.Exit(1)


class UnreadableSetting(Exception):
    """A variable of the environment cannot be read."""


def settings_of(store: str | None, **overrides: Any) -> Any:
    """handler.settings.Settings of the environment and the command line."""
    from handler.settings import Settings

    try:
        return Settings.from_environment(index_dir=store, **overrides)
    except ValueError as error:
        raise UnreadableSetting(f"a setting cannot be read: {error}") from error


async def _run(work: Work, settings: Any, as_json: bool, makes_store: bool) -> Output | None:
    from handler.runtime import Runtime

    runtime = Runtime(settings)
    try:
        if not makes_store:
            check_is_there(settings.index_dir)
        return await work(Session(runtime, settings.index_dir, as_json))
    finally:
        await runtime.aclose()


def check_is_there(url: str) -> None:
    """A directory that is not there reads as an empty store; whoever names one that he did not mean should hear of it."""
    from pathlib import Path
    from urllib.parse import unquote, urlsplit

    from engine.errors import NotFound

    parts = urlsplit(url)
    path = unquote(parts.path) if parts.scheme == "file" else "" if "://" in url else url
    if path and not Path(path).expanduser().is_dir():
        raise NotFound("no such directory; 'tartan index' makes an index", store=url)


# Output


def stdout() -> Console:
    return _console(highlight=False, width=None if sys.stdout.isatty() else PIPED_COLUMNS)


def stderr() -> Console:
    return _console(stderr=True, highlight=False, soft_wrap=True)


def _console(**options: Any) -> Console:
    """A console that shows documents, names and notes of others without what would command the terminal."""
    from rich.console import Console
    from rich.segment import Segment

    class Quiet(Console):
        def render(self, renderable: Any, options: Any = None) -> Any:
            for segment in super().render(renderable, options):
                yield segment if segment.control else Segment(harmless(segment.text), segment.style)

    return Quiet(**options)


def harmless(text: str) -> str:
    """Without control characters but line ends and tabs: escape sequences of a terminal begin with one."""
    return _CONTROLS.sub("", text)


def print_json(document: Any) -> None:
    import msgspec

    from handler.logs import one_line

    sys.stdout.write(one_line(msgspec.json.encode(document, enc_hook=str).decode()) + "\n")


def fail(message: str, as_json: bool, *, code: str, **details: object) -> NoReturn:
    """One line on stderr, exit code 1."""
    if as_json:
        import msgspec

        error = {"error": {"code": code, "message": message, "details": details}}
        line = msgspec.json.encode(error, enc_hook=str).decode()
    else:
        facts = "".join(f" {key}={value}" for key, value in details.items())
        line = f"tartan: {message}{facts}"
    sys.stderr.write(harmless(" ".join(line.splitlines())) + "\n")
    raise typer.Exit(1)


def usage(message: str) -> NoReturn:
    """The command line is wrong: exit code 2."""
    raise typer.BadParameter(message)


def table(*columns: str, right: tuple[str, ...] = (), clipped: tuple[str, ...] = ()) -> Table:
    """A plain table; the columns named in `right` hold numbers, those in `clipped` lose their ends where space is short."""
    from rich import box
    from rich.table import Table

    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        is_clipped = column in clipped
        justify: Literal["left", "right"] = "right" if column in right else "left"
        made.add_column(column, justify=justify, overflow="ellipsis" if is_clipped else "fold", no_wrap=is_clipped)
    return made


def facts(console: Console, lines: dict[str, object]) -> None:
    """Aligned names and values, one a line; None is left out."""
    width = max(map(len, lines), default=0)
    for name, value in lines.items():
        if value is not None:
            console.print(f"{name:<{width}}  {value}", markup=False)


def moment(time_s: float) -> str:
    """A time for people and JSON alike: UTC, to the second."""
    return datetime.fromtimestamp(time_s, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def count(n: int, noun: str, plural: str = "") -> str:
    return f"{n:,} {noun if n == 1 else plural or noun + 's'}"


def size(n_bytes: float) -> str:
    """Bytes in decimal units, three digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 999.5:
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.3g} TB"
