"""The house's own rules: layers, purity, one speller of names, one mover of CURRENT, codes and settings in the manual, links alive."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from engine.errors import CODES

ROOT = Path(__file__).resolve().parent.parent
LAYERS = [
    "engine.errors",
    "engine.config",
    "engine.cost",
    "engine.codec",
    "engine.store engine.format engine.scoring engine.metadata engine.encoding",
    "engine.index",
    "engine.cold engine.explain",
    "engine.near",
    "engine.opening",
    "engine.searcher",
    "engine.evaluate engine.transfer engine.demo engine.fanout",
    "handler",
]
"""Lowest first. Packages of one line are strangers to each other."""
RANK = {package: rank for rank, line in enumerate(LAYERS) for package in line.split()}


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def package_of(module: str) -> str | None:
    return next((package for package in RANK if module == package or module.startswith(package + ".")), None)


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported(path: Path) -> set[str]:
    """Modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


@pytest.mark.parametrize("path", sources("engine", "handler"), ids=module_of)
def test_imports_run_down_only(path: Path) -> None:
    own = package_of(module_of(path))
    for module in imported(path):
        other = package_of(module)
        if own is None or other is None or other == own:
            continue
        assert RANK[other] < RANK[own], f"{module_of(path)} imports {module}"


def test_arithmetic_does_no_input_or_output() -> None:
    forbidden = {"asyncio", "obstore", "os", "socket", "pathlib", "sqlite3"}
    for path in sources("engine/codec", "engine/format", "engine/scoring"):
        assert not {module.partition(".")[0] for module in imported(path)} & forbidden, path


def test_only_one_file_names_obstore() -> None:
    users = {module_of(path) for path in sources("engine", "handler") if any(m.partition(".")[0] == "obstore" for m in imported(path))}
    assert users == {"engine.store.objects"}


def test_only_one_file_reads_the_environment() -> None:
    users = {module_of(path) for path in sources("engine", "handler") if re.search(r"\bos\.environ|\bgetenv\(", path.read_text())}
    assert users <= {"handler.settings"}


def test_only_one_file_moves_current() -> None:
    movers = {
        module_of(path)
        for path in sources("engine", "handler")
        if "replace_if_unchanged(" in path.read_text() and not module_of(path).startswith("engine.store")
    }
    assert movers <= {"engine.index.commit", "engine.index.aliases"}
    assert "names.current" not in (ROOT / "engine/index/aliases.py").read_text()


def test_only_one_file_spells_object_names() -> None:
    spelt = re.compile(r"""["'][^"']*(/manifests/|/segments/|/codecs/|/tombstones/|/patches/|/pins/|/CURRENT)""")
    for path in sources("engine", "handler"):
        if module_of(path) == "engine.format.names":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                assert not spelt.search(ast.unparse(node)), f"{path}:{node.lineno}"


def test_no_file_collects_strangers() -> None:
    assert not [
        path for path in sources("engine", "handler", "tests", "benchmarks") if path.stem in {"utils", "util", "helpers", "common", "misc"}
    ]


def test_what_benchmarks_import_is_there() -> None:
    """Nothing else runs or types all of them."""
    for path in sources("benchmarks"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in ("engine", "handler"):
                module = importlib.import_module(str(node.module))
                for alias in node.names:
                    is_module = hasattr(module, "__path__") and importlib.util.find_spec(f"{node.module}.{alias.name}")
                    assert hasattr(module, alias.name) or is_module, f"{path.name}:{node.lineno} {alias.name}"


def test_every_error_code_that_is_raised_is_listed_and_in_the_manual() -> None:
    raised = set()
    for path in sources("engine", "handler"):
        raised.update(re.findall(r"""\bcode="([a-z][a-z-]+)\"""", path.read_text()))
    assert raised <= set(CODES)
    manual = (ROOT / "engine/README.md").read_text()
    assert [code for code in CODES if f"`{code}`" not in manual] == []


def test_the_search_path_imports_nothing_heavy() -> None:
    """A cold start pays for imports: no AWS SDK, no SQLite, no encoder, no plotting before they are asked for."""
    code = "import sys, engine.searcher, engine.index.reader, engine.store.objects; print(' '.join(sys.modules))"
    loaded = set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout.split())
    assert not loaded & {
        "boto3",
        "botocore",
        "aioboto3",
        "sqlite3",
        "onnxruntime",
        "tokenizers",
        "numexpr",
        "scipy",
        "litestar",
        "matplotlib",
    }
