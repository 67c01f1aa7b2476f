"""Checks of a running server, from outside, over HTTP."""

from __future__ import annotations

import asyncio
import json
import re
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

from engine.index.commit import Head
from handler.doctor.examination import Case, Findings
from handler.runtime import release

TIMEOUT_S = 10.0
MAX_SKEW_S = 5.0
_SCRAPES = re.compile(r'^tartan_requests_total\{[^}]*endpoint="metrics"[^}]*\} ([0-9.e+]+)$', re.MULTILINE)


@dataclass(frozen=True)
class Reply:
    """status 0 means that nobody answered; then `text` says why."""

    status: int
    text: str
    headers: Mapping[str, str]


async def _get(case: Case, path: str, *, with_key: bool = True) -> Reply:
    return await asyncio.to_thread(_get_now, f"{(case.url or '').rstrip('/')}{path}", case.key if with_key else None)


def _get_now(url: str, key: str | None) -> Reply:
    request = urllib.request.Request(url, headers={"X-API-Key": key} if key else {})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=TIMEOUT_S) as answer:
            return Reply(answer.status, answer.read().decode(errors="replace"), dict(answer.headers.items()))
    except urllib.error.HTTPError as error:
        with error:
            return Reply(error.code, error.read().decode(errors="replace"), dict(error.headers.items()))
    except (OSError, ssl.SSLError) as error:
        return Reply(0, str(getattr(error, "reason", error)), {})


async def health(case: Case, findings: Findings, heads: dict[str, Head]) -> None:
    check = "health route"
    if case.url is None:
        return findings.skipped(check, "--url names a server")
    began_s = time.time()
    reply = await _get(case, "/health")
    if reply.status != 200:
        said = reply.text if not reply.status else f"/health answers {reply.status}"
        return findings.failed(check, said[:200], "is it draining, starting, or unable to reach its store? look at its log")
    ready = await _get(case, "/readyz")
    findings.judged(check, ready.status == 200, f"/health 200, /readyz {ready.status}", "it is still warming up: ask again")
    found = json.loads(reply.text)
    same = found.get("version") == release()
    findings.judged("release", same, f"the server runs {found.get('version')}, this is {release()}", "roll the update out to every replica")
    there = _seconds_of(reply.headers)
    if there is not None:
        skew_s = max(began_s - (there + 1.0), there - time.time(), 0.0)
        findings.judged("server's clock", skew_s <= MAX_SKEW_S, f"{skew_s:.0f} s off ours", "run chrony or systemd-timesyncd on both")


def _seconds_of(headers: Mapping[str, str]) -> float | None:
    """Unix seconds of the Date header."""
    text = next((value for name, value in headers.items() if name.lower() == "date"), None)
    return None if text is None else parsedate_to_datetime(text).timestamp()


async def metrics(case: Case, findings: Findings, heads: dict[str, Head]) -> None:
    check = "metrics scraped"
    if case.url is None:
        return findings.skipped(check, "--url names a server")
    reply = await _get(case, "/metrics")
    if reply.status != 200 or "next_plaid_request_duration_seconds" not in reply.text:
        return findings.failed(
            check, f"/metrics answers {reply.status or reply.text}", "TARTAN_METRICS=true, and metrics in TARTAN_OPEN_AREAS or a key"
        )
    n = sum(float(value) for value in _SCRAPES.findall(reply.text))
    findings.judged(check, n >= 1, f"{n:.0f} times before now", "point Prometheus at it: infra/prometheus")


async def access(case: Case, findings: Findings, heads: dict[str, Head]) -> None:
    check = "access"
    if case.url is None:
        return findings.skipped(check, "--url names a server")
    parts = urlsplit(case.url)
    is_loopback = parts.hostname in ("127.0.0.1", "localhost", "::1")
    reply = await _get(case, "/indices", with_key=False)
    is_closed = reply.status in (401, 403)
    said = f"without a key /indices answers {reply.status}"
    findings.judged(check, is_closed, said, "configure API keys, or authentication in front", otherwise="warn" if is_loopback else "fail")
    if is_loopback:
        return findings.skipped("TLS", "loopback needs none")
    findings.judged("TLS", parts.scheme == "https", parts.scheme, "end TLS at the balancer, or TARTAN_TLS_CERT", otherwise="fail")


CHECKS = (("health route", health), ("metrics scraped", metrics), ("access", access))
