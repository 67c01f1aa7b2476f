"""Bombs: small or simple requests that would cost a careless server its memory, its time or its life; what each must be answered with."""

from __future__ import annotations

import base64
import gzip
import io
import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .service import DIM, UPLOAD

VECTORS = [[0.1, 0.2, 0.3, 0.4]]


@dataclass(frozen=True)
class Bomb:
    """A request, made when it is wanted, and its answer: status, and code of an error. `upload` is put into the store before."""

    status: int
    code: str
    path: str
    body: Callable[[], bytes]
    method: str = "POST"
    headers: dict[str, str] = field(default_factory=lambda: {"content-type": "application/json"})
    upload: Callable[[], bytes] | None = None


def _json(**values: Any) -> Callable[[], bytes]:
    return lambda: json.dumps(values).encode()


def _text(make: Callable[[], str]) -> Callable[[], bytes]:
    return lambda: make().encode()


def _search(status: int = 200, code: str = "", index: str = "papers", **values: Any) -> Bomb:
    return Bomb(status, code, f"/indices/{index}/search", _json(**{"queries": [{"embeddings": VECTORS}], **values}))


def _condition(status: int, code: str, make: Callable[[], tuple[str, list[Any]]]) -> Bomb:
    def body() -> bytes:
        text, parameters = make()
        return json.dumps({"condition": text, "parameters": parameters}).encode()

    return Bomb(status, code, "/indices/papers/metadata/query", body)


def _update(status: int, code: str, row: Callable[[], dict[str, Any]] = dict, **values: Any) -> Bomb:
    def body() -> bytes:
        return json.dumps({"documents": [{"embeddings": VECTORS}], "metadata": [row()], **values}).encode()

    return Bomb(status, code, "/indices/papers/update", body)


def _vectors(status: int, **item: Any) -> Bomb:
    return Bomb(status, "BAD_REQUEST", "/indices/papers/update", _json(documents=[item], metadata=[{}]))


def _upload(status: int, code: str, data: Callable[[], bytes]) -> Bomb:
    return Bomb(status, code, f"/indices/papers/uploads/{UPLOAD}/commit", bytes, upload=data)


def _keywords(make: Callable[[], str], status: int = 200, code: str = "") -> Bomb:
    return Bomb(status, code, "/indices/papers/search", lambda: json.dumps({"text_query": [make()]}).encode())


def _named(name: str, status: int = 400) -> Bomb:
    return Bomb(status, "BAD_REQUEST", "/indices", _json(name=name))


# Parts of them


def _npy(shape: str, payload: bytes = b"") -> bytes:
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + payload


def _npz(tokens: bytes, lengths: np.ndarray) -> bytes:
    buffer, own = io.BytesIO(), io.BytesIO()
    np.lib.format.write_array(own, lengths)
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("tokens.npy", tokens)
        archive.writestr("doclens.npy", own.getvalue())
    return buffer.getvalue()


def _zip_bomb() -> bytes:
    """40 MB of zeros, as 40 kB."""
    n_tokens = 40_000_000 // (4 * DIM)
    return _npz(_npy(f"({n_tokens}, {DIM})", bytes(4 * DIM * n_tokens)), np.ones(3, np.int64))


def _nested(depth: int, opening: str = "[", closing: str = "]") -> str:
    return opening * depth + closing * depth


MAX_UPLOAD_BYTES = 16 << 20
"""What the services that are bombed are told to take."""
HEAVY = frozenset((
    "a thousand keyword queries", "a subset of a million", "a million ids to look up", "a text of a million words", "IN of the most that is allowed",
))  # fmt: skip
"""Requests that are right, and dear."""
BASE64 = base64.b64encode(bytes(16)).decode()
_UNEXPECTED = {"content-type": "application/json", "content-encoding": "gzip"}

BOMBS: dict[str, Bomb] = {
    # JSON
    "a million open brackets": Bomb(422, "UNPROCESSABLE", "/indices/papers/search", lambda: b"[" * 1_000_000),
    "a hundred thousand nested lists": Bomb(422, "UNPROCESSABLE", "/indices/papers/search", _text(lambda: _nested(100_000))),
    "deep metadata": Bomb(400, "BAD_REQUEST", "/indices/papers/update", _text(lambda: '{"documents": [{"embeddings": [[1,2,3,4]]}], "metadata": [{"a": ' + _nested(50_000, '{"a":[', "]}") + "}]}")),
    "deep parameter": Bomb(400, "BAD_REQUEST", "/indices/papers/metadata/query", _text(lambda: '{"condition": "year = ?", "parameters": [' + _nested(50_000) + "]}")),
    "deep value below a parameter": _condition(200, "", lambda: ("year = ?", [json.loads(_nested(300))])),
    "NaN": Bomb(400, "BAD_REQUEST", "/indices/papers/search", _text(lambda: '{"queries": [{"embeddings": [[NaN, 1, 2, 3]]}]}')),
    "a number of ten thousand digits": Bomb(422, "UNPROCESSABLE", "/indices/papers/search", _text(lambda: '{"queries": [{"embeddings": [[1,2,3,4]]}], "params": {"top_k": ' + "9" * 10_000 + "}}")),
    "a metadata number of ten thousand digits": Bomb(422, "UNPROCESSABLE", "/indices/papers/update", _text(lambda: '{"documents": [{"embeddings": [[1,2,3,4]]}], "metadata": [{"a": ' + "9" * 10_000 + "}]}")),
    "a gzip bomb": Bomb(415, "UNSUPPORTED_MEDIA_TYPE", "/indices/papers/search", lambda: gzip.compress(bytes(8 << 20)), headers=_UNEXPECTED),
    # Vectors
    "a shape of a billion rows": _vectors(400, embeddings_b64=BASE64, shape=[1_000_000_000, 128]),
    "a shape whose product overflows": _vectors(400, embeddings_b64=BASE64, shape=[2**62, 4]),
    "a shape of no rows": _vectors(400, embeddings_b64="", shape=[0, 2**62]),
    "a query of a billion rows": _search(400, "BAD_REQUEST", queries=[{"embeddings_b64": BASE64, "shape": [1_000_000_000, 4]}]),
    "a query beyond float32": _search(400, "BAD_REQUEST", queries=[{"embeddings": [[1e39, 0, 0, 0]]}]),
    "a query at the end of float32": _search(400, "BAD_REQUEST", queries=[{"embeddings": [[3e38, 3e38, -3e38, 3e38], [-3e38, 3e38, 3e38, 3e38]]}]),
    "a query of zeros": _search(queries=[{"embeddings": [[0, 0, 0, 0]]}]),
    "a document of zeros": _update(202, "", documents=[{"embeddings": [[0, 0, 0, 0]]}]),
    "a document of denormals": _update(202, "", documents=[{"embeddings": [[1e-45, 0, 0, 0], [1e38, 1e38, 0, 0]]}]),
    "NaN in base64": _vectors(400, embeddings_b64=base64.b64encode(np.full(4, np.nan, "<f4")).decode(), shape=[1, 4]),
    "a query of too many tokens": _search(400, "BAD_REQUEST", queries=[{"embeddings": VECTORS * 1025}]),
    "reranking at the end of float32": Bomb(400, "BAD_REQUEST", "/rerank", _json(query=[[3e38, 3e38]], documents=[{"embeddings": [[3e38, 3e38]]}])),
    # Numbers that say how much
    "top_k of everything": _search(params={"top_k": 2**63 - 1}),
    "top_k beyond 63 bits": _search(422, "UNPROCESSABLE", params={"top_k": 2**63}),
    "every number at its end": _search(params=dict.fromkeys(("top_k", "n_ivf_probe", "n_full_scores"), 2**63 - 1), explain=True),
    "hybrid top_k of everything": _search(params={"top_k": 2**62}, text_query=["word1"]),
    "a threshold at the end of floats": _search(params={"centroid_score_threshold": 1e308}),
    "a thousand and one queries": _search(413, "PAYLOAD_TOO_LARGE", queries=[{"embeddings": VECTORS}] * 1001),
    "a hundred thousand queries": _search(413, "PAYLOAD_TOO_LARGE", queries=[{"embeddings_b64": BASE64, "shape": [1, 4]}] * 100_000),
    "a thousand keyword queries": Bomb(200, "", "/indices/papers/search", _json(text_query=["word1"] * 1000)),
    "a subset of a million": Bomb(200, "", "/indices/papers/search", _text(lambda: '{"queries": [{"embeddings": [[1,2,3,4]]}], "subset": ' + str(list(range(1_000_000))) + "}")),
    "a million ids to look up": Bomb(200, "", "/indices/papers/metadata/get", _text(lambda: '{"document_ids": ' + str(list(range(1_000_000))) + "}")),
    "a generation far away": _search(404, "GENERATION_NOT_FOUND", as_of=2**63 - 1),
    "a time before all": _search(404, "GENERATION_NOT_FOUND", as_of="0001-01-01T00:00:00+23:59"),
    "a recall of a billion queries": Bomb(422, "UNPROCESSABLE", "/indices/papers/recall", _json(n_queries=10**9)),
    "pooling by everything": Bomb(202, "", "/indices/texts/update_with_encoding", _json(documents=["red loom"], metadata=[{}], pool_factor=2**63 - 1)),
    "a text of a million words": Bomb(202, "", "/indices/texts/update_with_encoding", _json(documents=["loom " * 1_000_000], metadata=[{}])),
    # Conditions
    "REGEXP that backtracks": Bomb(400, "BAD_REQUEST", "/indices/texts/metadata/query", _json(condition="title REGEXP ?", parameters=["^(a|a|aa)+[^a]$"])),
    "REGEXP of nested repeats": _condition(400, "BAD_REQUEST", lambda: ("title REGEXP ?", ["((a{100}){100}){100}"])),
    "REGEXP of a megabyte": _condition(400, "BAD_REQUEST", lambda: ("title REGEXP ?", ["a" * (1 << 20)])),
    "LIKE of a megabyte": _condition(400, "BAD_REQUEST", lambda: ("title LIKE ?", ["%a" * (1 << 19)])),
    "a hundred thousand parentheses": _condition(400, "BAD_REQUEST", lambda: ("(" * 100_000 + "year = ?" + ")" * 100_000, [1])),
    "a thousand times NOT": _condition(400, "BAD_REQUEST", lambda: ("NOT (" * 1000 + "year = ?" + ")" * 1000, [1])),
    "IN of a million": _condition(400, "BAD_REQUEST", lambda: ("year IN (" + ",".join("?" * 1_000_000) + ")", list(range(1_000_000)))),
    "a million parameters": _condition(400, "BAD_REQUEST", lambda: ("year = ?", list(range(1_000_000)))),
    "IN of the most that is allowed": _condition(200, "", lambda: ("year IN (" + ",".join("?" * 100_000) + ")", list(range(100_000)))),
    "ten thousand comparisons": _condition(400, "BAD_REQUEST", lambda: (" OR ".join(["year = ?"] * 10_000), [1] * 10_000)),
    "a condition of a megabyte": _condition(400, "BAD_REQUEST", lambda: ("year = ? AND " + " " * (1 << 20) + "year = ?", [1, 1])),
    "NUL and surrogates in a condition": Bomb(400, "BAD_REQUEST", "/indices/papers/metadata/query", _text(lambda: '{"condition": "ye\\u0000ar = ?", "parameters": ["\\u0000"]}')),
    "an unpaired surrogate": Bomb(400, "BAD_REQUEST", "/indices/papers/metadata/query", _text(lambda: '{"condition": "title = ?", "parameters": ["\\ud800"]}')),
    # Keyword queries
    "a keyword query of a megabyte": _keywords(lambda: "a " * (1 << 19), 400, "BAD_REQUEST"),
    "a keyword query of two thousand NOTs": _keywords(lambda: "a" + " NOT a" * 1600, 400, "BAD_REQUEST"),
    "a keyword query of nested parentheses": _keywords(lambda: "(" * 4000 + "a" + ")" * 4000),
    "a keyword query of a thousand ORs": _keywords(lambda: " OR ".join(["word1"] * 1000), 400, "BAD_REQUEST"),
    "a keyword query of NUL": _keywords(lambda: "\0 word1 \0"),
    # Names
    "a name of 10 kB": _named("a" * 10_240),
    "a name that climbs": _named("../../etc/passwd"),
    "a name of dots": _named(".."),
    "a name with a slash": _named("a/b"),
    "a name with NUL": _named("a\0b"),
    "a name with a line end": _named("a\n"),
    "a name of other letters": _named("\u0430bc"),
    "a path of 10 kB": Bomb(404, "INDEX_NOT_FOUND", "/indices/" + "a" * 10_240 + "/search", _json(queries=[{"embeddings": VECTORS}])),
    "a path that climbs": Bomb(404, "INDEX_NOT_FOUND", "/indices/..%5C..%5Cetc/search", _json(queries=[{"embeddings": VECTORS}])),
    "a path with NUL": Bomb(404, "INDEX_NOT_DECLARED", "/indices/pa%00pers/update", _json(documents=[{"embeddings": VECTORS}], metadata=[{}])),
    "an alias that climbs": Bomb(400, "BAD_REQUEST", "/aliases/..%2e", _json(index="papers"), method="PUT"),
    "a branch that climbs": Bomb(400, "BAD_REQUEST", "/indices/papers/branch", _json(name="../x")),
    "a pin that climbs": Bomb(400, "BAD_REQUEST", "/indices/papers/pins", _json(pin="../../x")),
    # Metadata
    "a hundred thousand columns": _update(413, "PAYLOAD_TOO_LARGE", lambda: {f"c{n}": n for n in range(100_000)}),
    "a column name of 10 kB": _update(400, "BAD_REQUEST", lambda: {"a" * 10_240: 1}),
    "a value of 20 MB": _update(413, "PAYLOAD_TOO_LARGE", lambda: {"title": "x" * (20 << 20)}),
    "an integer of 400 digits": _update(400, "BAD_REQUEST", lambda: {"year": 10**400}),
    "an integer of 400 digits in a list": _update(202, "", lambda: {"tags": [10**400]}),
    "NUL in a value": _update(202, "", lambda: {"title": "a\0b"}),
    "an id of a megabyte": _update(400, "BAD_REQUEST", ids=["k" * (1 << 20)]),
    "an id of NUL": _update(202, "", ids=["\0"]),
    "a limit of documents beyond 63 bits": Bomb(422, "UNPROCESSABLE", "/indices/papers/config", _json(max_documents=2**64), method="PUT"),
    # Uploads
    "an array of 10^12 rows": _upload(400, "BAD_REQUEST", lambda: _npz(_npy(f"(1000000000000, {DIM})"), np.ones(3, np.int64))),
    "an array of negative rows": _upload(400, "BAD_REQUEST", lambda: _npz(_npy(f"(-1, -{DIM})", bytes(4 * DIM)), np.ones(1, np.int64))),
    "a zip bomb": _upload(413, "PAYLOAD_TOO_LARGE", _zip_bomb),
    "lengths that overflow": _upload(400, "BAD_REQUEST", lambda: _npz(_npy(f"(2, {DIM})", bytes(8 * DIM)), np.array([2**63 - 1, 2**63 - 1, 4], np.int64))),
    "an upload of brackets": _upload(400, "BAD_REQUEST", lambda: b"[" * 1_000_000),
}  # fmt: skip
