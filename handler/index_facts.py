"""What monitoring says of an index: a few numbers of one generation, for metrics.py, emf.py and nobody's answer."""

from __future__ import annotations

from dataclasses import dataclass

from engine.config import MaintenanceParams
from engine.format.manifest import Manifest
from engine.index.plan import backlog_tokens

_LEAVES_FLAT = MaintenanceParams()


@dataclass(frozen=True, slots=True)
class IndexFacts:
    """One generation in numbers. `n_documents` counts live documents; tokens and bytes are what is stored, deleted documents included.

    created_s    when the generation was committed (unix seconds): how fresh the index is
    flat_tokens  tokens that wait for compaction; 0 while the index is so small that compaction leaves it flat
    """

    generation: int
    created_s: float
    n_documents: int
    n_tokens: int
    size_bytes: int
    n_segments: int
    n_tombstones: int
    flat_tokens: int
    flat_segments: int
    document_limit: int | None

    @classmethod
    def of(cls, manifest: Manifest) -> IndexFacts:
        """Cost: a pass over the manifest's segments; no request."""
        segments = manifest.segments
        return cls(
            generation=manifest.generation,
            created_s=manifest.created_s,
            n_documents=manifest.n_documents,
            n_tokens=sum(segment.n_tokens for segment in segments),
            size_bytes=_size_bytes(manifest),
            n_segments=len(segments),
            n_tombstones=sum(segment.tombstones.n_deleted for segment in segments if segment.tombstones is not None),
            flat_tokens=backlog_tokens(manifest) if _is_compacted(manifest) else 0,
            flat_segments=sum(segment.kind == "flat" for segment in segments),
            document_limit=manifest.config.max_documents,
        )


def _is_compacted(manifest: Manifest) -> bool:
    """Whether flat segments are to be folded: not where exact search over all documents is as fast (engine/index/plan.py)."""
    is_large = manifest.n_documents >= _LEAVES_FLAT.min_quantise_documents
    return is_large or any(segment.kind == "quantised" for segment in manifest.segments)


def _size_bytes(manifest: Manifest) -> int:
    """Everything that the generation names; what garbage collection has still to take is not in it."""
    size = sum(codec.size_bytes for codec in manifest.codecs)
    for segment in manifest.segments:
        beside = (segment.metadata, segment.tombstones, *segment.patches)
        size += segment.size_bytes + sum(part.size_bytes for part in beside if part is not None)
    return size
