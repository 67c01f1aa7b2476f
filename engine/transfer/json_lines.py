"""One line of an input as JSON of an expected form, or the refusal that names its number.

For sources whose lines are JSON: vector_lines.py, text_lines.py, and the fields beside arrays.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NoReturn

import msgspec

from engine.errors import InvalidRequest
from engine.transfer.content import Content, Line

ANY_OBJECT = msgspec.json.Decoder(dict[str, Any])


def decoded(content: Content, line: Line, decoder: msgspec.json.Decoder[Any], data: bytes | None = None, part: str = "") -> Any:
    """A line, or a part of it, as JSON of the expected form; else InvalidRequest with the line's number."""
    try:
        return decoder.decode(line.data if data is None else data)
    except (msgspec.MsgspecError, RecursionError) as error:
        refuse(content, line, f"{part or 'the line'} is not as expected", found=str(error)[:140])


def refuse(content: Content, line: Line, message: str, *, code: str | None = None, **facts: object) -> NoReturn:
    """Raise InvalidRequest about a line."""
    raise InvalidRequest(message, code=code, file=content.label, line=line.number, **facts)


def without_names(row: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    """A row without the fields of these names."""
    return {name: value for name, value in row.items() if name not in names} if names else row
