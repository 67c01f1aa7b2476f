"""Texts to vectors, and reranking of what a client brings along; and how other routes encode."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Sequence
from typing import Any

import numpy as np

from engine.errors import EngineError, Unavailable
from engine.scoring.brute_force import maxsim
from handler import tracing
from handler.problems import Problem, bad_request, model_not_loaded, shown
from handler.routes.endpoint import Call, Endpoint, Reply
from handler.wire.answers import Encoded, Reranked, RerankLine
from handler.wire.matrices import check_dimensions, document_arrays, joined, query_matrix
from handler.wire.requests import EncodeRequest, RerankRequest, RerankTextsRequest, Vectors


async def encode_queries(call: Call, texts: Sequence[str]) -> list[np.ndarray]:
    """float32 (Q, D) of each text. Problem MODEL_NOT_LOADED, MODEL_ERROR, or 503 while too many wait."""
    return _pieces(await _encode(call, "query", texts, None))


async def encode_documents(call: Call, texts: Sequence[str], pool_factor: int | None) -> tuple[np.ndarray, np.ndarray]:
    """(tokens float32 (T, D), offsets int64 (n + 1,)). Problems as above."""
    return await _encode(call, "document", texts, pool_factor)


async def _encode(call: Call, input_type: str, texts: Sequence[str], pool_factor: int | None) -> tuple[np.ndarray, np.ndarray]:
    if not call.runtime.has_model:
        raise model_not_loaded()
    call.record.facts["texts"] = call.record.facts.get("texts", 0) + len(texts)
    try:
        encoder = await call.runtime.encoder()
        with tracing.stage("encode"):
            if input_type == "query":
                tokens, offsets = await encoder.encode_queries(texts)
            else:
                tokens, offsets = await encoder.encode_documents(texts, pool_factor)
    except (Unavailable, asyncio.CancelledError):
        raise
    except EngineError as error:
        call.runtime.log.error("encoder failed", code=error.code, error=str(error))
        raise Problem("MODEL_ERROR", f"the encoder failed: {shown(error)}") from error
    return tokens, offsets


def _pieces(encoded: tuple[np.ndarray, np.ndarray]) -> list[np.ndarray]:
    tokens, offsets = encoded
    return [tokens[start:end] for start, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)]


async def encode(call: Call) -> Reply:
    body: EncodeRequest = call.body
    if not body.texts:
        raise bad_request("texts is empty")
    if body.input_type == "query":
        matrices = await encode_queries(call, body.texts)
    else:
        matrices = _pieces(await encode_documents(call, body.texts, body.pool_factor))
    if call.headers.get("x-embeddings-format", "").strip().lower() == "base64":
        texts = [base64.b64encode(np.ascontiguousarray(matrix, "<f4").data).decode() for matrix in matrices]
        shapes = [(int(matrix.shape[0]), int(matrix.shape[1])) for matrix in matrices]
        return Reply(Encoded(len(matrices), embeddings_b64=texts, shapes=shapes))
    return Reply(Encoded(len(matrices), embeddings=[matrix.tolist() for matrix in matrices]))


async def rerank(call: Call) -> Reply:
    body: RerankRequest = call.body
    if not body.documents:
        raise bad_request("documents is empty")
    query_item = Vectors(embeddings=body.query, embeddings_b64=body.query_b64, shape=body.query_shape)

    def read() -> tuple[np.ndarray, list[np.ndarray]]:
        return query_matrix(query_item, "query"), document_arrays(body.documents)

    query, documents = await call.compute(read)
    check_dimensions(documents, query.shape[1])
    return await _ranked(call, query, *joined(documents))


async def rerank_texts(call: Call) -> Reply:
    body: RerankTextsRequest = call.body
    if not body.query:
        raise bad_request("query is empty")
    if not body.documents:
        raise bad_request("documents is empty")
    query = (await encode_queries(call, [body.query]))[0]
    return await _ranked(call, query, *await encode_documents(call, body.documents, body.pool_factor))


async def _ranked(call: Call, query: np.ndarray, tokens: np.ndarray, offsets: np.ndarray) -> Reply:
    """Exact MaxSim of plain dot products; score falling, equal scores in the order of the request."""

    def score() -> np.ndarray:
        with np.errstate(over="ignore", invalid="ignore"):
            return np.asarray(maxsim(query, np.ascontiguousarray(tokens, np.float32), offsets))

    scores = await asyncio.get_running_loop().run_in_executor(call.runtime.executor, score)
    if not np.isfinite(scores).all():
        raise bad_request("a score is not finite: the vectors are too large")
    order = np.argsort(-scores, kind="stable")
    lines = [RerankLine(index, score) for index, score in zip(order.tolist(), scores[order].tolist(), strict=True)]
    return Reply(Reranked(lines, len(lines)))


_RERANKED = {"results": [{"index": 1, "score": 1.9}, {"index": 0, "score": 0.7}], "num_documents": 2}
_COMMON: dict[str, Any] = {"method": "POST", "tag": "encoding", "scope": "search", "group": "encoding"}

ENDPOINTS = (
    Endpoint(
        path="/encode",
        name="encode",
        handle=encode,
        summary="Encode texts to token vectors",
        body=EncodeRequest,
        answer=Encoded,
        request_example={"texts": ["plain weave"], "input_type": "query"},
        answer_example={"embeddings": [[[0.1, 0.2], [0.3, 0.4]]], "num_texts": 1},
        errors=("MODEL_NOT_LOADED", "MODEL_ERROR"),
        description="With the header `X-Embeddings-Format: base64` the answer holds embeddings_b64 and shapes instead of embeddings.",
        **_COMMON,
    ),
    Endpoint(
        path="/rerank",
        name="rerank",
        handle=rerank,
        summary="Score documents given as vectors against a query",
        body=RerankRequest,
        answer=Reranked,
        request_example={"query": [[1.0, 0.0]], "documents": [{"embeddings": [[0.7, 0.7]]}, {"embeddings": [[1.0, 0.0]]}]},
        answer_example=_RERANKED,
        errors=("DIMENSION_MISMATCH",),
        **_COMMON,
    ),
    Endpoint(
        path="/rerank_with_encoding",
        name="rerank_with_encoding",
        handle=rerank_texts,
        summary="Score texts against a query text",
        body=RerankTextsRequest,
        answer=Reranked,
        request_example={"query": "plain weave", "documents": ["twill", "tabby"]},
        answer_example=_RERANKED,
        errors=("MODEL_NOT_LOADED", "MODEL_ERROR"),
        **_COMMON,
    ),
)
