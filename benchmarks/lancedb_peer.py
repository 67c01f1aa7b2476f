"""LanceDB's multivector search on a local directory: a peer that keeps its index on (object) storage too. Needs the `bench` extra.

One table, a document a row, column `vector` list<fixed_size_list<float16, D>>; cosine (the only metric LanceDB allows for multivectors,
and the same as dot product for unit rows); IVF_PQ index. Its knobs are `nprobes` and `refine_factor`; recall is measured, not assumed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.collections import Vectors

_BATCH_DOCUMENTS = 1000


class LanceEngine:
    """Peer `lancedb`: the table lies in `folder`; refine_factor r fetches r·k rows by the index and scores them with the stored vectors."""

    name = "lancedb"

    def __init__(
        self, folder: Path, *, nprobes: int = 20, refine_factor: int | None = 10, sub_vectors: int = 32, partitions: int | None = None
    ) -> None:
        self.folder, self.nprobes, self.refine_factor = folder, nprobes, refine_factor
        self.sub_vectors, self.partitions = sub_vectors, partitions
        self._table: Any = None

    def build(self, vectors: Vectors) -> dict[str, float]:
        import lancedb  # type: ignore[import-not-found,import-untyped,unused-ignore]

        times = self.folder / "times.json"
        database = lancedb.connect(str(self.folder))
        if not times.exists():
            started = time.perf_counter()
            table = database.create_table("documents", data=_batches(vectors), schema=_schema(vectors.dim), mode="overwrite")
            written = time.perf_counter() - started
            partitions = self.partitions or max(1, int(np.sqrt(vectors.n_tokens) / 2))
            table.create_index(
                metric="cosine",
                vector_column_name="vector",
                index_type="IVF_PQ",
                num_partitions=partitions,
                num_sub_vectors=self.sub_vectors,
            )
            times.write_text(json.dumps({"write_s": written, "build_s": time.perf_counter() - started, "partitions": partitions}))
        self._table = database.open_table("documents")
        found: dict[str, float] = json.loads(times.read_text())
        return found

    def search(self, query: np.ndarray, k: int) -> np.ndarray:
        """query float32 (Q, D) -> int64 (<= k,), best first."""
        request = (
            self._table.search(query.astype(np.float32), vector_column_name="vector")
            .select(["id", "_distance"])
            .limit(k)
            .nprobes(self.nprobes)
        )
        if self.refine_factor:
            request = request.refine_factor(self.refine_factor)
        found: np.ndarray = request.to_arrow()["id"].to_numpy()
        return found.astype(np.int64)

    @property
    def stored_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file() and path.name != "times.json")


def _schema(dim: int) -> Any:
    import pyarrow as pa  # type: ignore[import-not-found,import-untyped,unused-ignore]

    return pa.schema([("id", pa.int64()), ("vector", pa.list_(pa.list_(pa.float16(), dim)))])


def _batches(vectors: Vectors) -> Iterator[Any]:
    import pyarrow as pa

    for start in range(0, vectors.n_documents, _BATCH_DOCUMENTS):
        stop = min(start + _BATCH_DOCUMENTS, vectors.n_documents)
        offsets = vectors.offsets[start : stop + 1]
        rows = np.asarray(vectors.tokens[offsets[0] : offsets[-1]], np.float16)
        values = pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), vectors.dim)
        column = pa.ListArray.from_arrays(pa.array((offsets - offsets[0]).astype(np.int32)), values)
        yield pa.RecordBatch.from_arrays([pa.array(np.arange(start, stop)), column], schema=_schema(vectors.dim))
