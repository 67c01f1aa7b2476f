"""Lambda without AWS: events of every kind made from recorded ones, and the function in AWS's own runtime emulator.

The emulator is infra/local/lambda_gateway.py's; tests that need it skip where its binary, or awslambdaric, is not installed.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

from infra.local.lambda_gateway import find_emulator

EVENTS = Path(__file__).resolve().parent / "events"
KINDS = ("rest_v1", "http_v2", "function_url", "alb_single", "alb_multi")


def make_event(
    kind: str,
    method: str,
    path: str,
    body: bytes | None = None,
    *,
    headers: dict[str, str] | None = None,
    query: list[tuple[str, str]] | None = None,
    as_base64: bool = False,
    stage: str = "",
) -> dict[str, Any]:
    """The recorded event of a kind with another request in it. `stage` is put in front of the path, as a named stage of an HTTP API is."""
    event: dict[str, Any] = json.loads((EVENTS / f"{kind}.json").read_text())
    query, path = query or [], stage + path
    if body is not None:
        event["body"] = base64.b64encode(body).decode() if as_base64 else body.decode()
        event["isBase64Encoded"] = as_base64
    many: dict[str, list[str]] = {}
    for name, value in query:
        many.setdefault(name, []).append(value)
    if kind in ("http_v2", "function_url"):
        event["rawPath"] = event["requestContext"]["http"]["path"] = path
        event["requestContext"]["http"]["method"] = method
        event["rawQueryString"] = urlencode(query)
        event["headers"] |= {name.lower(): value for name, value in (headers or {}).items()}
        return event
    event["httpMethod"], event["path"] = method, path
    single = {name: values[-1] for name, values in many.items()}
    if "headers" in event:
        event["headers"] |= headers or {}
        event["queryStringParameters"] = single or event.get("queryStringParameters")
    if "multiValueHeaders" in event:
        event["multiValueHeaders"] |= {name: [value] for name, value in (headers or {}).items()}
        event["multiValueQueryStringParameters"] = many or event.get("multiValueQueryStringParameters")
    return event


def answer_of(result: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
    """(status, headers in lower case, body) as the gateway would send them on."""
    headers = {name.lower(): value for name, value in (result.get("headers") or {}).items()}
    headers |= {name.lower(): values[-1] for name, values in (result.get("multiValueHeaders") or {}).items()}
    body = result.get("body") or ""
    return result["statusCode"], headers, base64.b64decode(body) if result.get("isBase64Encoded") else body.encode()


def needed_emulator() -> str:
    """Path of the emulator's binary; the calling test skips if something is missing."""
    binary = find_emulator()
    if binary is None:
        pytest.skip("no aws-lambda-rie: it comes with the package aws-sam-cli (or set TARTAN_RIE)")
    pytest.importorskip("awslambdaric", reason="no awslambdaric: the package of that name runs handlers in the emulator")
    return binary
