"""Metrics for CloudWatch, embedded in the request's log line: on Lambda nobody scrapes, and a call to CloudWatch would cost more than a search.

CloudWatch reads lines that carry `_aws` and makes metrics of the fields it names (the embedded metric format); the rest of the line stays
searchable. So one line serves both, no request is made, and prometheus_client is not imported. app.py adds these fields when
TARTAN_EMF_NAMESPACE is set; workers without HTTP print `Emf.line(...)`.

    service, endpoint   ms, count, errors (5xx), refused (4xx)
    service             rounds, requests, bytes, candidates, usd, conflicts, corrupt, unavailable, cold_segments, {stage}_ms
    service, index      documents, tokens_stored, bytes_stored, segments, tombstones, flat_tokens, age_s; when new, else once a minute

A metric is paid for by name and combination of labels, not by line; so `index` is bounded (MAX_INDICES, then "other").
Source: docs.aws.amazon.com/AmazonCloudWatch, Embedded Metric Format Specification.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import msgspec

from engine.format.manifest import Manifest
from handler.index_facts import IndexFacts
from handler.logs import RequestRecord

MAX_INDICES = 20
"""Seven metrics each, at 0.30 dollars a month: about 40 dollars for twenty."""
OTHER_INDEX = "other"
REPEAT_S = 60.0
"""CloudWatch's finest usual period: more often would not be seen."""
_UNITS = {"ms": "Milliseconds", "bytes": "Bytes", "bytes_stored": "Bytes", "age_s": "Seconds", "usd": "None"}
_OF_SERVICE = ("rounds", "requests", "bytes", "candidates", "usd", "conflicts", "cold_segments")


class Emf:
    """Embedded metrics of one process under one CloudWatch namespace."""

    def __init__(self, namespace: str, *, service: str = "tartan") -> None:
        self._namespace, self._service = namespace, service
        self._shown: dict[str, tuple[float, float]] = {}

    def is_news(self, index: str, manifest: Manifest) -> bool:
        """Whether the figures of an index are due: a generation not shown yet, or a minute has gone. Says yes once."""
        created_s, at_s = self._shown.get(index, (0.0, -REPEAT_S))
        now_s = time.monotonic()
        if manifest.created_s <= created_s and now_s < at_s + REPEAT_S:
            return False
        if len(self._shown) > 100 * MAX_INDICES:
            self._shown.clear()
        self._shown[index] = (manifest.created_s, now_s)
        return True

    def fields(self, endpoint: str, record: RequestRecord, took_s: float) -> dict[str, Any]:
        """What to add to the request's log line, which carries `ms` and the record's facts already."""
        values: dict[str, float] = {"ms": round(took_s * 1000, 3), "count": 1}
        values |= {"errors": int(record.status >= 500), "refused": int(400 <= record.status < 500)}
        groups = [(["service", "endpoint"], dict(values))]
        known = {**record.facts, "usd": record.usd}
        work: dict[str, float] = {name: known[name] for name in _OF_SERVICE if known.get(name)}
        work |= {f"{stage}_ms": round(ms, 3) for stage, ms in record.stages_ms.items()}
        work |= {"corrupt": int(record.error_code == "CORRUPT_DATA"), "unavailable": int(record.error_code == "SERVICE_UNAVAILABLE")}
        groups.append((["service"], work))
        labels = {"service": self._service, "endpoint": endpoint}
        if record.news is not None and record.index is not None:
            labels["index_label"] = self._index_label(record.index)
            groups.append((["service", "index_label"], _index_values(record.news)))
        return self._document(groups, labels)

    def line(self, values: Mapping[str, float], **labels: str) -> str:
        """A line of its own, for a worker that answers no HTTP: values under the service and the given labels. Print it."""
        every = {"service": self._service, **labels}
        return msgspec.json.encode(self._document([(list(every), dict(values))], every)).decode()

    def _document(self, groups: list[tuple[list[str], dict[str, float]]], labels: dict[str, str]) -> dict[str, Any]:
        directives = [
            {
                "Namespace": self._namespace,
                "Dimensions": [dimensions],
                "Metrics": [{"Name": name, "Unit": _unit(name)} for name in values],
            }
            for dimensions, values in groups
        ]
        merged: dict[str, Any] = dict(labels)
        for _, values in groups:
            merged |= values
        return {**merged, "_aws": {"Timestamp": round(time.time() * 1000), "CloudWatchMetrics": directives}}

    def _index_label(self, index: str) -> str:
        """The first names that come are shown; `_shown` keeps their order."""
        position = next((at for at, name in enumerate(self._shown) if name == index), MAX_INDICES)
        return index if position < MAX_INDICES else OTHER_INDEX


def _index_values(facts: IndexFacts) -> dict[str, float]:
    return {
        "documents": facts.n_documents,
        "tokens_stored": facts.n_tokens,
        "bytes_stored": facts.size_bytes,
        "segments": facts.n_segments,
        "tombstones": facts.n_tombstones,
        "flat_tokens": facts.flat_tokens,
        "age_s": round(max(0.0, time.time() - facts.created_s), 3),
    }


def _unit(name: str) -> str:
    return "Milliseconds" if name.endswith("_ms") else _UNITS.get(name, "Count")
