"""The OpenAPI 3.1 document, made from the table of endpoints and the structures of wire/; so it cannot fall behind them."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

import msgspec

from engine.config import INDEX_NAME
from handler.problems import STATUSES
from handler.routes.endpoint import JSON, Endpoint
from handler.runtime import release
from handler.wire.answers import ErrorBody

_REF = "#/components/schemas/{name}"
_REASONS = {
    200: "The answer",
    202: "Committed: durable, and seen by every search that starts later",
    400: "The request can never work",
    401: "No valid API key",
    403: "The API key does not reach this, or the server only reads",
    404: "Not there",
    405: "The path exists, the method does not",
    408: "The time limit passed",
    409: "Somebody else was first",
    413: "Too large",
    415: "Not JSON",
    422: "JSON of the wrong shape",
    429: "Too many requests of one client",
    500: "The server or the stored data failed",
    503: "Busy, draining, or the store does not answer: wait and repeat",
}
_MESSAGES = {
    "INDEX_NOT_FOUND": "papers",
    "METADATA_NOT_FOUND": "papers",
    "INDEX_ALREADY_EXISTS": "papers",
    "DIMENSION_MISMATCH": "dimension mismatch: expected 128, found 96 (item 0)",
    "UNAUTHORIZED": "an API key is needed: send it as 'Authorization: Bearer' or 'X-API-Key'",
    "UNPROCESSABLE": "the body does not fit: Expected `int`, got `str` - at `$.params.top_k`",
}
_RETRY_AFTER = {"Retry-After": {"description": "Seconds to wait", "schema": {"type": "integer"}}}
_REQUEST_ID = {"X-Request-ID": {"description": "The request's id: the client's own, or a new one", "schema": {"type": "string"}}}
_PARAMETERS = {
    "name": "name of the index, or an alias",
    "pin": "name of the pin",
    "alias": "name of the alias",
    "upload": "id of an upload",
    "file": "file name",
}
_OPEN_AREAS = ("probe",)


@lru_cache(maxsize=1)
def document_bytes() -> bytes:
    return msgspec.json.encode(document())


def document() -> dict[str, Any]:
    """The whole document as builtins."""
    from handler.routes.table import ENDPOINTS

    schemas, components = _schemas(ENDPOINTS)
    paths: dict[str, dict[str, Any]] = {}
    for endpoint in ENDPOINTS:
        paths.setdefault(endpoint.path, {})[endpoint.method.lower()] = _operation(endpoint, schemas)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Tartan",
            "version": release(),
            "description": "Multi-vector (late-interaction) search on object storage, with NextPlaid's HTTP API. "
            "Every error body is {code, message}; statuses 200 and 202 are the only successes. "
            "A request about an index with the header X-Tartan-Answer: download (or auto: only if it is large) gets its answer by way of the store, "
            "as {download_url, size_bytes, content_type, expires_at}; S3 only.",
            "license": {"name": "Apache License 2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "./.."}],
        "security": [{}, {"bearer": []}, {"header": []}],
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer", "description": "an API key, where access control is on"},
                "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
            },
        },
    }


def _schemas(endpoints: tuple[Endpoint, ...]) -> tuple[dict[Any, Any], dict[str, Any]]:
    """(schema of each type, named components)."""
    types: list[Any] = [ErrorBody]
    for endpoint in endpoints:
        types += [kind for kind in (endpoint.body, endpoint.answer) if kind is not None and not _is_media_type(kind) and kind not in types]
    schemas, components = msgspec.json.schema_components(types, ref_template=_REF)
    schemas, components = _plain(list(schemas)), _plain(components)
    return {id(kind): schema for kind, schema in zip(types, schemas, strict=True)}, components


def _plain(node: Any) -> Any:
    """The same schema without prefixItems, which schemathesis 4.32 and older tools trip over: a pair is a list of two of either kind."""
    if isinstance(node, list):
        return [_plain(item) for item in node]
    if not isinstance(node, dict):
        return node
    plain = {key: _plain(value) for key, value in node.items()}
    if (kinds := plain.pop("prefixItems", None)) is not None:
        plain["items"] = kinds[0] if all(kind == kinds[0] for kind in kinds) else {"anyOf": kinds}
    return plain


def _is_media_type(answer: Any) -> bool:
    return isinstance(answer, str)


def _operation(endpoint: Endpoint, schemas: dict[Any, Any]) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": endpoint.name,
        "summary": endpoint.summary,
        "tags": [endpoint.tag],
        "responses": _responses(endpoint, schemas),
    }
    scope = f"Scope: {endpoint.scope}." if endpoint.scope else ""
    if text := " ".join(part for part in (endpoint.description, scope) if part):
        operation["description"] = text
    if parameters := _parameters(endpoint):
        operation["parameters"] = parameters
    if endpoint.body is not None:
        content: dict[str, Any] = {"schema": schemas[id(endpoint.body)]}
        if endpoint.request_example is not None:
            content["example"] = endpoint.request_example
        operation["requestBody"] = {"required": not endpoint.is_body_optional, "content": {JSON: content}}
    return operation


def _parameters(endpoint: Endpoint) -> list[dict[str, Any]]:
    parameters: list[dict[str, Any]] = []
    for name in re.findall(r"{(\w+)}", endpoint.path):
        schema = {"type": "string", "pattern": f"^{INDEX_NAME.pattern}$"}
        parameters.append({"name": name, "in": "path", "required": True, "description": _PARAMETERS[name], "schema": schema})
    if endpoint.name == "encode":
        form = {"type": "string", "enum": ["base64"]}
        parameters.append({"name": "X-Embeddings-Format", "in": "header", "required": False, "schema": form})
    if endpoint.name == "export":
        parameters.append({"name": "vectors", "in": "query", "required": False, "schema": {"type": "boolean", "default": True}})
    return parameters


def _responses(endpoint: Endpoint, schemas: dict[Any, Any]) -> dict[str, Any]:
    responses: dict[str, Any] = {str(endpoint.status): _success(endpoint, schemas)}
    by_status: dict[int, list[str]] = {}
    for code in error_codes(endpoint):
        by_status.setdefault(STATUSES[code], []).append(code)
    for status, codes in sorted(by_status.items()):
        examples = {code: {"value": _example(code)} for code in codes}
        responses[str(status)] = {
            "description": _REASONS[status],
            "headers": _REQUEST_ID | (_RETRY_AFTER if status in (429, 503) else {}),
            "content": {JSON: {"schema": schemas[id(ErrorBody)], "examples": examples}},
        }
    return responses


def _example(code: str) -> dict[str, Any]:
    body: dict[str, Any] = {"code": code, "message": _MESSAGES.get(code, _REASONS[STATUSES[code]].lower())}
    return body | ({"retry_after_seconds": 2} if code == "RATE_LIMITED" else {})


def _success(endpoint: Endpoint, schemas: dict[Any, Any]) -> dict[str, Any]:
    if _is_media_type(endpoint.answer):
        content: dict[str, Any] = {endpoint.answer: {"schema": {}}}
    else:
        content = {JSON: {"schema": schemas[id(endpoint.answer)]}}
    if endpoint.answer_example is not None:
        next(iter(content.values()))["example"] = endpoint.answer_example
    return {"description": _REASONS[endpoint.status], "headers": _REQUEST_ID, "content": content}


def error_codes(endpoint: Endpoint) -> list[str]:
    """Every code that an answer of this endpoint may carry."""
    codes = ["TIMEOUT", "INTERNAL_ERROR", "SERVICE_UNAVAILABLE", *endpoint.errors]
    if endpoint.area not in _OPEN_AREAS:
        codes += ["UNAUTHORIZED", "FORBIDDEN"]
    if endpoint.is_change:
        codes.append("READ_ONLY")
    if endpoint.group is not None:
        codes += ["CORRUPT_DATA", "UNSUPPORTED_FORMAT"]
    if endpoint.body is not None:
        codes += ["BAD_REQUEST", "PAYLOAD_TOO_LARGE", "UNSUPPORTED_MEDIA_TYPE", "UNPROCESSABLE"]
    if endpoint.is_rate_limited:
        codes.append("RATE_LIMITED")
    return sorted(set(codes), key=lambda code: (STATUSES[code], code))
