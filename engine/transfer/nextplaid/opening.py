"""Open an index directory of NextPlaid or FastPlaid: document token vectors, settings and metadata rows.

`tartan import` calls `read`; a bulk build takes the result by way of source.py. Nothing in this package writes, neither into the
directory (it may belong to a running server) nor into a Tartan index, and nothing of the peer's codes is kept: what comes out are unit
vectors, reconstructed from centroid + residual as the peer itself does it before scoring. ../README.md says why.

The layout, as far as it binds here (NextPlaid 1.6, FastPlaid 1.7; both are relatives of one form, both without checksums):

    metadata.json           num_chunks, nbits, counts; `next_plaid_compatible` tells NextPlaid from FastPlaid
    centroids.npy           (K, D) float16 or float32
    bucket_weights.npy      (2^nbits,) the value that a bucket number adds to a dimension of the centroid
    doclens.{i}.json        tokens per document of chunk i; documents are numbered through the chunks in numeric order
    {i}.codes.npy           (t,) centroid numbers            merged_codes.npy      all chunks' rows, then padding rows
    {i}.residuals.npy       (t, D·nbits/8) packed buckets    merged_residuals.npy  likewise
    merged_*.manifest.json  how many rows each chunk has in the merged file
    embeddings.npy          NextPlaid, small indexes only: the vectors as they came
    metadata.db             SQLite, rows by document number; config.json: the server's settings
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec

from engine.config import NBITS, IndexConfig
from engine.errors import CorruptData, NotFound, UnsupportedFormat
from engine.transfer.nextplaid.files import Watch, count_of, json_object, lengths_of, malformed
from engine.transfer.nextplaid.index import PlaidIndex
from engine.transfer.nextplaid.payload import codec, payload_slices, raw_vectors
from engine.transfer.nextplaid.rows import database_of, tables_of

_LOSSLESS_NBITS = 4
"""Measured, see ../README.md: reconstructed 2-bit vectors keep their recall when encoded again at 4 bits, and lose 1.4 points at 2."""


def read(directory: str | os.PathLike[str]) -> PlaidIndex:
    """Open an index directory and verify everything that can be verified without reading the payload.

    Cost: reads centroids, weights and document lengths (8 bytes a document are kept); headers only of the large files.
    Raises NotFound (no directory, no index in it, no payload), CorruptData (contradicting or impossible content), UnsupportedFormat
    (an object array, a one-bit `binary` index).
    """
    root = Path(directory)
    if not root.is_dir():
        raise NotFound("no such directory", directory=str(root))
    if not (root / "metadata.json").exists():
        declared = (root / "config.json").exists()
        reason = "the index is declared but holds no documents" if declared else "not an index directory: it has no metadata.json"
        raise NotFound(reason, directory=str(root))
    watch = Watch(root)
    description = json_object(watch, "metadata.json")
    settings = json_object(watch, "config.json") if (root / "config.json").exists() else {}
    for kind in ("binary", "ternary"):
        if settings.get(kind) is True or description.get(kind) is True:
            raise UnsupportedFormat(f"a {kind} index holds signs instead of bucket numbers and is not read", directory=str(root))
    nbits = count_of(description, "nbits", "metadata.json")
    if nbits not in NBITS:
        raise malformed("nbits is 1, 2, 4 or 8", "metadata.json", expected=NBITS, found=nbits)
    centroids, weights = codec(watch, nbits)
    doclens = [lengths_of(watch, f"doclens.{i}.json") for i in range(count_of(description, "num_chunks", "metadata.json"))]
    plaid = PlaidIndex(root, nbits, centroids, weights, doclens, description.get("next_plaid_compatible") is True, watch)
    plaid.payload = payload_slices(plaid)
    plaid.raw = raw_vectors(plaid)
    plaid.compare_counts(description)
    plaid.config = _config(plaid, settings)
    if nbits < _LOSSLESS_NBITS and not plaid.exact:
        plaid.notes.append(
            f"{nbits}-bit vectors lose recall when they are encoded again at {nbits} bits; at {_LOSSLESS_NBITS} they lose none"
        )
    watch.check()
    return plaid


def _config(plaid: PlaidIndex, settings: dict[str, Any]) -> IndexConfig:
    """IndexConfig from config.json; nbits from the payload; the tokenizer from the database where there is no config.json."""
    known: dict[str, object] = {"nbits": plaid.nbits}
    for key in ("seed", "batch_size", "start_from_scratch", "max_documents"):
        value = settings.get(key)
        if type(value) is int and (key != "max_documents" or value > 0):
            known[key] = value
        elif value is not None:
            plaid.notes.append(f"config.json says {key} is {value!r}: left at our default")
    tokenizer: object = settings.get("fts_tokenizer") or _tokenizer(plaid)
    if tokenizer not in ("unicode61", "trigram"):
        if tokenizer is not None:
            plaid.notes.append(f"the keyword tokenizer {tokenizer!r} is not known here: unicode61 instead")
        tokenizer = "unicode61"
    return msgspec.convert({**known, "fts_tokenizer": tokenizer}, IndexConfig)


def _tokenizer(plaid: PlaidIndex) -> str | None:
    """The keyword tokenizer that the database names. An unreadable database is no obstacle here: `fields` will say so."""
    if not plaid.has_fields:
        return None
    try:
        with database_of(plaid.directory) as database:
            if "_FTS_SETTINGS_" not in tables_of(database):
                return None
            row = database.execute("SELECT value FROM _FTS_SETTINGS_ WHERE key = 'tokenizer'").fetchone()
    except CorruptData as error:
        plaid.notes.append(str(error))
        return None
    return str(row[0]) if row else None
