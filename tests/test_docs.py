"""The documents: all linked, links and anchors alive, short, and what they name is there: commands, options, settings, metrics, targets, files."""

from __future__ import annotations

import re
import subprocess
from functools import cache
from pathlib import Path

import pytest
import typer.main

from engine.config import PRESETS
from handler.cli import app
from handler.metrics import Metrics
from handler.settings import SETTINGS

ROOT = Path(__file__).resolve().parent.parent
MAX_WORDS = 3_500
"""A page that is longer is two pages. FORMAT.md is normative and lists every field; a change log grows."""
LONG = {"engine/format/FORMAT.md", "CHANGELOG.md"}
FOREIGN_VARIABLES = re.compile(r"(TARTAN_API_KEY|TARTAN_RIE|TARTAN_TEST_\w+)$")
"""Read by a command or a test, not by the server."""
_MODULES = {"next_plaid_client", "tartan_engine"}


def _documents() -> list[Path]:
    skipped = {"node_modules", "data", "results", "static", "build", "dist"}
    return sorted(path for path in ROOT.rglob("*.md") if not skipped & set(path.relative_to(ROOT).parts) and not _is_hidden(path))


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(ROOT).parts)


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


DOCUMENTS = _documents()
EACH = pytest.mark.parametrize("path", DOCUMENTS, ids=_name)


def _links(path: Path) -> list[tuple[Path, str]]:
    """(file, anchor) of each link that stays in the repository; code is no text."""
    text = re.sub(r"```.*?```|`[^`\n]*`", "", path.read_text(), flags=re.DOTALL)
    found = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" not in target and not target.startswith("mailto:"):
            file, _, anchor = target.partition("#")
            found.append(((path.parent / file).resolve() if file else path, anchor))
    return found


@cache
def _anchors(path: Path) -> frozenset[str]:
    """As GitHub makes them of headings."""
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    seen: dict[str, int] = {}
    found = set()
    for heading in re.findall(r"^#+ +(.*)$", text, re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", plain.strip().lower()).replace(" ", "-")
        n = seen[slug] = seen.get(slug, -1) + 1
        found.add(slug if not n else f"{slug}-{n}")
    return frozenset(found)


def _code(path: Path) -> str:
    """Everything that is set as code: blocks and words in backticks, one a line."""
    text = path.read_text()
    blocks = re.findall(r"```[a-z]*\n(.*?)```", text, re.DOTALL)
    return "\n".join([*blocks, *re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))])


@EACH
def test_links_and_anchors_of_a_document_resolve(path: Path) -> None:
    for target, anchor in _links(path):
        assert target.exists(), f"{_name(path)}: no {target}"
        if anchor and target.suffix == ".md":
            assert anchor in _anchors(target), f"{_name(path)}: no heading #{anchor} in {target.name}"


def test_every_document_is_reached_from_the_readme() -> None:
    reached, waiting = set(), [ROOT / "README.md"]
    while waiting:
        path = waiting.pop()
        if path in reached or path.suffix != ".md":
            continue
        reached.add(path)
        waiting += [target for target, _ in _links(path) if target.exists() and target.is_file()]
    unreached = [_name(path) for path in DOCUMENTS if path not in reached]
    assert unreached == [], "link them from README.md or from a page that it links"


@EACH
def test_a_document_is_short(path: Path) -> None:
    if _name(path) in LONG:
        pytest.skip("lists what has to be listed")
    assert len(path.read_text().split()) <= MAX_WORDS


@EACH
def test_settings_named_in_a_document_exist(path: Path) -> None:
    known = {variable for setting in SETTINGS for variable in setting.variables}
    named = set(re.findall(r"\bTARTAN_[A-Z0-9_]*[A-Z0-9]\b", path.read_text()))
    assert {name for name in named - known if not FOREIGN_VARIABLES.match(name)} == set()


@cache
def _metrics() -> frozenset[str]:
    """Every name that a scrape can show."""
    text = Metrics().render().decode()
    names = set(re.findall(r"^# TYPE (\S+)", text, re.MULTILINE))
    return frozenset(names | {f"{name}{suffix}" for name in names for suffix in ("", "_total", "_bucket", "_count", "_sum")})


@EACH
def test_metrics_named_in_a_document_exist(path: Path) -> None:
    for name in re.findall(r"(?<![\w./])((?:tartan|next_plaid)_[a-z0-9_]*[a-z0-9])\b(?![*./{(])", _code(path)):
        assert name in _metrics() or name in _MODULES, f"{_name(path)}: no metric {name}"


def _commands() -> dict[tuple[str, ...], set[str]]:
    """Options of each command, by its words."""
    found: dict[tuple[str, ...], set[str]] = {}

    def visit(words: tuple[str, ...], command: object) -> None:
        options = {
            option
            for parameter in getattr(command, "params", [])
            for option in (*getattr(parameter, "opts", ()), *getattr(parameter, "secondary_opts", ()))
        }
        found[words] = options | {"--help"}
        for name, inner in getattr(command, "commands", {}).items():
            visit((*words, name), inner)

    visit((), typer.main.get_command(app))
    return found


COMMANDS = _commands()


@EACH
def test_commands_and_options_named_in_a_document_exist(path: Path) -> None:
    for line in _code(path).splitlines():
        for call in re.findall(r"(?:^|[|;&$(]\s*|\S*/bin/)tartan ([a-z][^|;&#\n]*)", line.strip()):
            words = call.split()
            command = next((tuple(words[:n]) for n in (2, 1) if tuple(words[:n]) in COMMANDS), None)
            assert command is not None, f"{_name(path)}: no command in {line!r}"
            for option in re.findall(r"(?<=\s)(--[a-z][a-z0-9-]*)", call):
                assert option in COMMANDS[command], f"{_name(path)}: {' '.join(command)} has no {option}"


@EACH
def test_make_targets_named_in_a_document_exist(path: Path) -> None:
    files = [ROOT / "Makefile", *sorted((ROOT / "infra").rglob("*.mk"))]
    targets = set(re.findall(r"^([A-Za-z][\w-]*) ?:", "\n".join(file.read_text() for file in files), re.MULTILINE))
    for line in _code(path).splitlines():
        for target in re.findall(r"(?:^|[;&]\s*)make ([a-z][\w-]*)", line.strip()):
            assert target in targets, f"{_name(path)}: no target {target}"


@EACH
def test_files_named_in_a_document_exist(path: Path) -> None:
    """Paths with a folder of ours in front."""
    for name in re.findall(r"(?<![\w/.{-])((?:docs|engine|handler|infra|tests|benchmarks)/[\w./-]*\w)", _code(path)):
        found = (ROOT / name).exists() or (path.parent / name).exists() or list(ROOT.glob(f"{name}*")) or _is_ignored(name)
        assert found, f"{_name(path)}: no {name}"


def _is_ignored(name: str) -> bool:
    """Made by a command that the document speaks of."""
    return subprocess.run(["git", "check-ignore", "-q", name], cwd=ROOT, check=False).returncode == 0


def test_the_presets_are_in_the_page_about_tuning() -> None:
    text = (ROOT / "docs/tuning.md").read_text()
    for name, values in PRESETS.items():
        assert f"`{name}`" in text
        for value in values.values():
            assert str(value) in text.replace(",", "") or value > 1 << 32
