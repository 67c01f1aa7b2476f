"""The bundled demo collection: 300 short texts of general knowledge, written for this project and under its licence.

demo.jsonl has one document a line: title, topic (one of a dozen words), year (of the event; negative is BC, null where none fits), text
(two to five sentences). The quick start, the guide's examples and the tests use it. It is not a benchmark: nothing in it is judged.
"""

from __future__ import annotations

import json
from importlib import resources
from typing import TypedDict


class DemoDocument(TypedDict):
    title: str
    topic: str
    year: int | None
    text: str


def documents() -> list[DemoDocument]:
    """All documents, in their fixed order, as fresh dictionaries. Reads one file of 100 kB."""
    content = resources.files(__name__).joinpath("demo.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in content.splitlines()]


def text(document: DemoDocument) -> str:
    """What to encode of a document: its title and its text."""
    return f"{document['title']}. {document['text']}"
