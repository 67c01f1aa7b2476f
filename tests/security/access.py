"""Who may call what, written down by hand: the table of docs/access.md. A route that is not in it fails test_access.py.

    PYTHONPATH=.:tests python -m security.access      writes the table into docs/access.md
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal, NamedTuple

DOCUMENT = Path(__file__).resolve().parents[2] / "docs/access.md"
COLUMNS = ("no key", "unknown key", "search", "write", "admin", "a key of other indices")

Who = Literal["anyone", "a key", "search", "write", "admin"]


class Line(NamedTuple):
    """who    what a request must bring: nothing, any valid key, or a key with this scope
    names  where the request names indices that the key's pattern must match; "" if it names none
    area   of TARTAN_OPEN_AREAS: without it a key is needed
    """

    who: Who
    names: str = ""
    area: str = ""


ACCESS: dict[str, Line] = {
    "GET /": Line("anyone", area="health"),
    "GET /health": Line("anyone", area="health"),
    "GET /livez": Line("anyone"),
    "GET /readyz": Line("anyone"),
    "GET /metrics": Line("a key", area="metrics"),
    "GET /swagger-ui": Line("anyone", area="docs"),
    "GET /swagger-ui/{file}": Line("anyone", area="docs"),
    "GET /api-docs/openapi.json": Line("anyone", area="docs"),
    "GET /indices": Line("search"),
    "POST /indices": Line("admin", "body"),
    "GET /indices/{name}": Line("search", "path"),
    "DELETE /indices/{name}": Line("admin", "path"),
    "PUT /indices/{name}/config": Line("admin", "path"),
    "POST /indices/{name}/update": Line("write", "path"),
    "POST /indices/{name}/update_with_encoding": Line("write", "path"),
    "POST /indices/{name}/documents": Line("write", "path"),
    "DELETE /indices/{name}/documents": Line("write", "path"),
    "POST /indices/{name}/uploads": Line("write", "path"),
    "POST /indices/{name}/uploads/{upload}/commit": Line("write", "path"),
    "POST /indices/{name}/search": Line("search", "path"),
    "POST /indices/{name}/search/filtered": Line("search", "path"),
    "POST /indices/{name}/search_with_encoding": Line("search", "path"),
    "POST /indices/{name}/search/filtered_with_encoding": Line("search", "path"),
    "GET /indices/{name}/metadata": Line("search", "path"),
    "GET /indices/{name}/metadata/count": Line("search", "path"),
    "POST /indices/{name}/metadata/check": Line("search", "path"),
    "POST /indices/{name}/metadata/query": Line("search", "path"),
    "POST /indices/{name}/metadata/get": Line("search", "path"),
    "POST /indices/{name}/metadata/update": Line("write", "path"),
    "POST /encode": Line("search"),
    "POST /rerank": Line("search"),
    "POST /rerank_with_encoding": Line("search"),
    "GET /indices/{name}/generations": Line("search", "path"),
    "GET /indices/{name}/pins": Line("search", "path"),
    "POST /indices/{name}/pins": Line("admin", "path"),
    "DELETE /indices/{name}/pins/{pin}": Line("admin", "path"),
    "POST /indices/{name}/rollback": Line("admin", "path"),
    "POST /indices/{name}/branch": Line("admin", "path and body"),
    "GET /aliases": Line("search"),
    "GET /aliases/{alias}": Line("search", "alias"),
    "PUT /aliases/{alias}": Line("admin", "alias and body"),
    "DELETE /aliases/{alias}": Line("admin", "alias"),
    "POST /indices/{name}/warm": Line("search", "path"),
    "POST /indices/{name}/recall": Line("admin", "path"),
    "GET /indices/{name}/export": Line("search", "path"),
    "POST /internal/shard": Line("search", "body"),
}


def expected(line: Line, column: str) -> int | None:
    """The status that refuses; None where the request passes."""
    if column == "unknown key":
        return 401
    if line.who == "anyone":
        return None
    if column == "no key":
        return 401
    if column == "a key of other indices":
        return 403 if line.names else None
    return None if line.who in ("a key", column) else 403


def table() -> str:
    """The table in Markdown."""
    lines = ["| route | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for route, line in ACCESS.items():
        cells = [str(expected(line, column) or "yes") for column in COLUMNS]
        lines.append(f"| `{route}` | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def written(document: str) -> str:
    """The document with the table as it should be."""
    return re.sub(r"^\| route \|.*?(?=\n\n)", lambda _: table().rstrip("\n"), document, flags=re.DOTALL | re.MULTILINE)


if __name__ == "__main__":
    DOCUMENT.write_text(written(DOCUMENT.read_text()))
