"""Where a peer's vectors lie: its codec, each chunk's codes and residuals, the original vectors if they are still there.

Which copy is true: the chunk's own file if it is there (NextPlaid always; FastPlaid until it has folded it in), else its slice of
the merged file. Only headers are read here; index.py reads the rows.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from engine.errors import CorruptData, UnsupportedFormat
from engine.transfer.nextplaid.files import Slice, Watch, array_slice, count_of, json_object, lengths_of, malformed
from engine.transfer.nextplaid.index import PlaidIndex


def codec(watch: Watch, nbits: int) -> tuple[np.ndarray, np.ndarray]:
    """centroids float32 (K, D) and weights float32 (2^nbits,), finite and of fitting shapes."""
    found = []
    for name, axes in (("centroids.npy", 2), ("bucket_weights.npy", 1)):
        header = array_slice(watch, name, "f")
        if len(header.shape) != axes:
            raise malformed("another number of axes was expected", name, expected=axes, found=len(header.shape))
        values = header.read(0, header.shape[0]).astype(np.float32)
        if not np.isfinite(values).all():
            raise malformed("a value is not finite", name)
        found.append(values)
    centroids, weights = found
    if len(weights) != 1 << nbits:
        raise malformed("one weight per bucket was expected", "bucket_weights.npy", expected=1 << nbits, found=len(weights))
    if centroids.shape[1] == 0 or centroids.shape[1] * nbits % 8:
        raise malformed("a residual does not fill whole bytes", "centroids.npy", dim=centroids.shape[1], nbits=nbits)
    return centroids, weights


def payload_slices(plaid: PlaidIndex) -> list[tuple[Slice | None, Slice | None]]:
    """Where each chunk's codes and residuals are; None for a chunk without tokens."""
    rows = [int(lengths.sum()) for lengths in plaid.doclens]
    width = plaid.dim * plaid.nbits // 8
    codes = _chunk_slices(plaid, "codes", "iu", rows, ())
    residuals = _chunk_slices(plaid, "residuals", "u", rows, (width,))
    for found in residuals:
        if found is not None and found.dtype.itemsize != 1:
            raise malformed("residuals are bytes", found.name, found=str(found.dtype))
    return list(zip(codes, residuals, strict=True))


def _chunk_slices(plaid: PlaidIndex, payload: str, kinds: str, rows: list[int], row_shape: tuple[int, ...]) -> list[Slice | None]:
    """For each chunk the slice with its rows[i] rows: its own file, else its part of the merged file."""
    watch, merged = plaid.watch, None
    found: list[Slice | None] = []
    for i, n_rows in enumerate(rows):
        name = f"{i}.{payload}.npy"
        if n_rows == 0:
            found.append(None)
            continue
        if (watch.root / name).exists():
            own = array_slice(watch, name, kinds)
            if own.shape != (n_rows, *row_shape):
                raise malformed("a chunk's rows and its document lengths differ", name, expected=(n_rows, *row_shape), found=own.shape)
            found.append(own)
            continue
        if merged is None:
            merged = _merged(plaid, payload, kinds, row_shape)
            first_rows = _first_rows(watch, payload, rows)
        first_row = first_rows(i)
        if first_row + n_rows > merged.shape[0]:
            facts = {"chunk": i, "expected": first_row + n_rows, "found": merged.shape[0]}
            raise malformed("the merged file has fewer rows than the documents have tokens", merged.name, **facts)
        found.append(merged.at(first_row))
    return found


def _merged(plaid: PlaidIndex, payload: str, kinds: str, row_shape: tuple[int, ...]) -> Slice:
    name = f"merged_{payload}.npy"
    if not (plaid.directory / name).exists():
        if plaid.nextplaid:
            reason = (
                f"the index has documents but no {payload}: NextPlaid converted a FastPlaid index whose only copy was the merged files,"
                " and removed them; restore the FastPlaid directory from a backup"
            )
        else:
            reason = f"the index has documents but neither chunk files nor a merged file of {payload}"
        raise CorruptData(reason, code="missing-object", object=name, n_documents=plaid.n_documents)
    merged = array_slice(plaid.watch, name, kinds)
    if len(merged.shape) != 1 + len(row_shape) or merged.shape[1:] != row_shape:
        raise malformed("another form of rows was expected", name, expected=("rows", *row_shape), found=merged.shape)
    return merged


def _first_rows(watch: Watch, payload: str, rows: list[int]) -> Callable[[int], int]:
    """A function from a chunk to its first row in the merged file. From the manifest, which counts what was merged; else from doclens.

    The two differ where a chunk was written again (then its own file wins) and those behind it still lie where they were.
    """
    name = f"merged_{payload}.manifest.json"
    if not (watch.root / name).exists():
        starts = np.concatenate([[0], np.cumsum(rows)])
        return lambda i: int(starts[i])
    content = json_object(watch, name)
    entries = content.get("chunks", content)  # NextPlaid keeps them one level down

    def merged_rows(i: int) -> int:
        entry = entries.get(f"{i}.{payload}.npy") if isinstance(entries, dict) else None
        if entry is None or (isinstance(entry, dict) and entry.get("merged") is False):
            return 0
        return count_of(entry if isinstance(entry, dict) else {}, "rows", name)

    def first_row(i: int) -> int:
        if merged_rows(i) != rows[i]:
            facts = {"chunk": i, "expected": rows[i], "found": merged_rows(i)}
            raise malformed("the manifest and the document lengths differ, and the chunk has no file of its own", name, **facts)
        return sum(merged_rows(j) for j in range(i))

    return first_row


def raw_vectors(plaid: PlaidIndex) -> Slice | None:
    """NextPlaid's embeddings.npy if it holds every document as it came; None otherwise (FastPlaid's is a pickle: never read)."""
    names = ("embeddings.npy", "embeddings_lengths.json")
    if plaid.n_tokens == 0 or not all((plaid.directory / name).exists() for name in names):
        return None
    try:
        raw = array_slice(plaid.watch, names[0], "f")
    except UnsupportedFormat:
        return None
    lengths = lengths_of(plaid.watch, names[1])
    if not np.array_equal(lengths, np.concatenate(plaid.doclens)) or raw.shape != (plaid.n_tokens, plaid.dim):
        plaid.notes.append("embeddings.npy does not cover every document and is left aside: vectors are reconstructed")
        return None
    return raw
