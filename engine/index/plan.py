"""What compaction should do next: a pure function of the manifest.

One step at a time, each small enough for one process's memory and each its own commit, so that nothing is lost when a compactor is
killed, and long work shows progress:

    train    there is no codec and enough to train one on, or the index has outgrown the newest one
    flatten  many flat segments of an index that is too small to quantise become one flat segment
    fold     flat segments become one or more quantised segments under the newest codec
    merge    small quantised segments, and those of old codecs or with many tombstones, become one quantised segment

After `train` on an index that grew, old segments keep their old codec until a merge takes them up; a search then forms one more centroid
table, which costs less than rewriting a large index at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from engine.config import MaintenanceParams
from engine.format.manifest import CodecRef, Manifest, SegmentRef


@dataclass(frozen=True, slots=True)
class Step:
    """One commit's worth of work on `sources` (segments in manifest order)."""

    kind: Literal["train", "flatten", "fold", "merge"]
    sources: tuple[SegmentRef, ...]


def next_step(manifest: Manifest, params: MaintenanceParams, *, force: bool = False) -> Step | None:
    """The next step, or None if the index is in good order. `force` folds and quantises whatever is flat."""
    flat = tuple(segment for segment in manifest.segments if segment.kind == "flat")
    quantised = tuple(segment for segment in manifest.segments if segment.kind == "quantised")
    n_live = manifest.n_documents
    if not n_live:
        return None
    wants_folding = bool(flat) and (force or _is_time_to_fold(flat, n_live, quantised, params))
    if wants_folding and _needs_training(manifest, params):
        return Step("train", manifest.segments)
    if wants_folding:
        return Step("fold", _leading(flat, params, flat_tokens_bytes(manifest)))
    if len(flat) > params.max_flat_segments:
        return Step("flatten", flat)
    return _merge_step(manifest, quantised, params)


def newest_codec(manifest: Manifest) -> CodecRef | None:
    """The codec for new segments: the one trained on most. (Not by id: a machine whose clock is behind makes ids that sort before older ones.)"""
    return max(manifest.codecs, key=lambda codec: (codec.n_tokens_trained, codec.id), default=None)


def backlog_tokens(manifest: Manifest) -> int:
    """Tokens in flat segments: what compaction has still to fold."""
    return sum(segment.n_tokens for segment in manifest.segments if segment.kind == "flat")


def flat_tokens_bytes(manifest: Manifest) -> float:
    """Bytes that a flat token comes to when it is quantised: a residual, and about eight more for codes, scalars and postings."""
    return (manifest.dim or 0) * manifest.config.nbits / 8 + 8


def _is_time_to_fold(flat: Sequence[SegmentRef], n_live: int, quantised: Sequence[SegmentRef], params: MaintenanceParams) -> bool:
    if not quantised and n_live < params.min_quantise_documents:
        return False
    return sum(segment.n_tokens for segment in flat) > params.max_flat_tokens or len(flat) > params.max_flat_segments


def _needs_training(manifest: Manifest, params: MaintenanceParams) -> bool:
    codec = newest_codec(manifest)
    n_tokens = sum(segment.n_tokens for segment in manifest.segments)
    return codec is None or codec.nbits != manifest.config.nbits or n_tokens > params.retrain_growth * codec.n_tokens_trained


def _leading(segments: Sequence[SegmentRef], params: MaintenanceParams, bytes_per_token: float) -> tuple[SegmentRef, ...]:
    """As many of the first segments as one quantised segment holds; at least one."""
    taken: list[SegmentRef] = []
    n_documents = size = 0.0
    for segment in segments:
        n_documents += segment.n_live
        size += segment.n_tokens * bytes_per_token
        if taken and (n_documents > params.max_segment_documents or size > params.max_segment_bytes):
            break
        taken.append(segment)
    return tuple(taken)


def _merge_step(manifest: Manifest, quantised: Sequence[SegmentRef], params: MaintenanceParams) -> Step | None:
    """Segments worth rewriting: first those with many tombstones, then those of old codecs, then `merge_factor` of about one size."""
    newest = newest_codec(manifest)
    for segment in quantised:
        if segment.n_documents - segment.n_live > params.max_tombstone_share * segment.n_documents:
            return Step("merge", (segment,))
    for segment in quantised:
        if newest is not None and segment.codec != newest.id and 4 * segment.n_tokens < newest.n_tokens_trained:
            return Step("merge", (segment,))
    tiers: dict[tuple[str, int], list[SegmentRef]] = {}
    for segment in sorted(quantised, key=lambda segment: segment.size_bytes):
        if 2 * segment.size_bytes < params.max_segment_bytes and 2 * segment.n_live < params.max_segment_documents:
            tiers.setdefault((segment.codec, _tier(segment.size_bytes, params.merge_factor)), []).append(segment)
    for members in tiers.values():
        if len(members) >= params.merge_factor:
            group = _leading(members, params, members[-1].size_bytes / max(members[-1].n_tokens, 1))
            if len(group) > 1:
                return Step("merge", group)
    return None


def _tier(size_bytes: int, factor: int) -> int:
    """Sizes within a factor of `factor` share a tier."""
    tier = 0
    while size_bytes >= factor:
        size_bytes //= factor
        tier += 1
    return tier
