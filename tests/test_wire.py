"""The wire: strict structures, vectors in both forms, and the one translation of NextPlaid's parameters."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import pytest

from engine.config import MAX_QUERY_TOKENS
from engine.errors import InvalidRequest
from handler.problems import STATUSES, Problem, problem_of
from handler.wire.bodies import encode, read_body
from handler.wire.matrices import matrix, query_matrices
from handler.wire.requests import (
    CreateConfig,
    CreateRequest,
    EncodeRequest,
    FilteredSearchRequest,
    MetadataUpdateRequest,
    Params,
    SearchRequest,
    UpdateRequest,
    Vectors,
)
from handler.wire.translation import index_config, metadata_rows, parse_time, search_params


def packed(values: Any, dtype: str = "<f4") -> str:
    return base64.b64encode(np.ascontiguousarray(values, dtype).tobytes()).decode()


def read(**fields: Any) -> Vectors:
    """As if it had come over the wire."""
    return read_body(encode(fields), Vectors)


def refused(code: str, item: Vectors) -> str:
    with pytest.raises(Problem) as caught:
        matrix(item, "document 0")
    assert caught.value.code == code
    return caught.value.message


def test_both_forms_of_a_matrix_give_the_same_values() -> None:
    values = np.random.default_rng(1).standard_normal((7, 5)).astype(np.float32)
    from_lists = matrix(Vectors(embeddings=values.tolist()), "x")
    from_base64 = matrix(read(embeddings_b64=packed(values), shape=(7, 5)), "x")
    assert np.array_equal(from_lists, values)
    assert np.array_equal(from_base64, values)


def test_half_precision_is_an_extension_of_the_base64_form() -> None:
    values = np.random.default_rng(2).standard_normal((3, 4)).astype(np.float16)
    item = read_body(encode({"embeddings_b64": packed(values, "<f2"), "shape": [3, 4], "dtype": "float16"}), Vectors)
    assert np.array_equal(matrix(item, "x"), values)


def test_base64_with_shape_wins_and_without_shape_falls_back_to_the_lists() -> None:
    both = read(embeddings=[[9.0]], embeddings_b64=packed([[1.0, 2.0]]), shape=(1, 2))
    assert matrix(both, "x").tolist() == [[1.0, 2.0]]
    no_shape = read(embeddings=[[9.0]], embeddings_b64=packed([[1.0, 2.0]]))
    assert matrix(no_shape, "x").tolist() == [[9.0]]


@pytest.mark.parametrize(
    "item",
    [
        Vectors(),
        Vectors(embeddings=[]),
        Vectors(embeddings=[[]]),
        Vectors(embeddings=[[1.0, 2.0], [3.0]]),
        Vectors(embeddings=[[1e300]]),
        read(embeddings_b64="AAAA"),
        read(embeddings_b64="AAAA", shape=(1, 1)),
        read(embeddings_b64="!!!!!!!!", shape=(1, 1)),
        read(embeddings_b64="éééééééé", shape=(1, 1)),
        read(embeddings_b64=packed([[1.0]]).replace("=", "A"), shape=(1, 1)),
        read(embeddings_b64="", shape=(0, 4)),
        read(embeddings_b64="", shape=(4, 0)),
        read(embeddings_b64=packed([[np.nan]]), shape=(1, 1)),
        read(embeddings_b64=packed([[np.inf, 1.0]]), shape=(1, 2)),
        read(embeddings_b64=packed([[np.inf, -np.inf]]), shape=(1, 2)),
        read(embeddings_b64="AAAA", shape=(2**62, 2)),
        read(embeddings_b64="AAAA", shape=(70_000, 1)),
        read(embeddings_b64="AAAA", shape=(1, 10**6)),
    ],
)
def test_a_matrix_that_is_none_is_a_bad_request(item: Vectors) -> None:
    assert refused("BAD_REQUEST", item).startswith("document 0")


def test_text_that_is_no_base64_is_ignored_where_it_is_not_used_and_leaves_its_neighbours_alone() -> None:
    good, bad = {"embeddings_b64": packed([[1.0]]), "shape": [1, 1]}, {"embeddings_b64": "A AA"}
    body = {"queries": [good, {**bad, "embeddings": [[9.0]]}, {**bad, "shape": [1, 1]}], "params": {"top_k": 3}, "max_age_s": 1}
    request = read_body(encode(body), SearchRequest)
    assert (request.params.top_k, request.max_age_s) == (3, 1.0)
    assert request.queries is not None
    assert [matrix(item, "x").tolist() for item in request.queries[:2]] == [[[1.0]], [[9.0]]]
    assert "base64" in refused("BAD_REQUEST", request.queries[2])
    with pytest.raises(Problem) as caught:
        read_body(encode({"queries": [bad], "params": {"top_k": "3"}}), SearchRequest)
    assert caught.value.code == "UNPROCESSABLE"


def test_large_finite_values_whose_sum_overflows_are_not_refused() -> None:
    values = np.full((1, 8), 3e38, np.float32)
    assert np.array_equal(matrix(read(embeddings_b64=packed(values), shape=(1, 8)), "x"), values)


def test_queries_have_a_bound_of_their_own() -> None:
    rows = [[0.0]] * (MAX_QUERY_TOKENS + 1)
    with pytest.raises(Problem):
        query_matrices([Vectors(embeddings=rows)])


@pytest.mark.parametrize(
    ("kind", "body", "status"),
    [
        (SearchRequest, b'{"params": {"top_k": "3"}}', 422),
        (SearchRequest, b'{"params": {"top_k": 3.0}}', 422),
        (SearchRequest, b'{"params": {"top_k": -1}}', 422),
        (SearchRequest, b'{"params": {"top_k": 18446744073709551616}}', 422),
        (SearchRequest, b'{"params": null}', 422),
        (SearchRequest, b'{"subset": [1.5]}', 422),
        (SearchRequest, b'{"queries": [{"embeddings": [["1"]]}]}', 422),
        (FilteredSearchRequest, b'{"queries": []}', 422),
        (CreateRequest, b'{"name": "a", "config": null}', 422),
        (CreateRequest, b"{}", 422),
        (CreateRequest, b"[]", 422),
        (UpdateRequest, b'{"documents": [], "metadata": null}', 422),
        (UpdateRequest, b'{"documents": [{"embeddings_b64": "", "shape": [1]}]}', 422),
        (EncodeRequest, b'{"texts": ["a"], "input_type": "Query"}', 422),
        (CreateRequest, b'{"name": "a"', 400),
        (CreateRequest, b"", 400),
        (CreateRequest, b'{"name": "\xff"}', 400),
        (SearchRequest, b'{"alpha": NaN}', 400),
        (MetadataUpdateRequest, b'{"condition": "a", "updates": ' + b"[" * 100_000, 400),
    ],
)
def test_bodies_are_read_strictly(kind: type, body: bytes, status: int) -> None:
    with pytest.raises(Problem) as caught:
        read_body(body, kind)
    assert caught.value.status == status


def test_unknown_keys_and_null_options_are_no_error() -> None:
    body = read_body(b'{"queries": null, "subset": null, "nonsense": 1, "params": {"top_k": null, "x": 2}}', SearchRequest)
    assert body.queries is None
    assert body.params.top_k is None


def test_n_full_scores_is_translated_once_and_keeps_the_peers_meaning() -> None:
    params = search_params(Params(), 10**6)
    assert (params.k, params.n_probe, params.n_candidates, params.n_rerank) == (10, 8, 4096, 1024)
    assert params.centroid_score_threshold is None
    few = search_params(Params(top_k=100, n_full_scores=200, n_ivf_probe=0), 10**6)
    assert (few.k, few.n_probe, few.n_candidates, few.n_rerank) == (100, 1, 200, 100)
    assert search_params(Params(top_k=100, n_full_scores=50), 10**6).k == 50
    assert search_params(Params(top_k=2**62, n_full_scores=2**62), 7).k == 7
    assert search_params(Params(top_k=0), 7).k == 0


def test_metadata_that_was_read_before_can_be_sent_again() -> None:
    assert metadata_rows([{"_subset_": 3, "a": 1}], 1) == [{"a": 1}]
    for rows in ([1], [None], [[]], [{}, {}]):
        with pytest.raises(Problem):
            metadata_rows(rows, 1)


def test_times_need_a_zone() -> None:
    assert parse_time("2026-11-23T08:00:00Z") == parse_time("2026-11-23T09:00:00+01:00")
    for text in ("2026-11-23T08:00:00", "yesterday", ""):
        with pytest.raises(Problem):
            parse_time(text)


def test_a_programming_mistake_tells_the_client_nothing() -> None:
    problem = problem_of(KeyError("secret"))
    assert (problem.status, problem.code) == (500, "INTERNAL_ERROR")
    assert "secret" not in problem.body().decode()


def test_error_bodies_are_objects_with_code_and_message() -> None:
    for code in STATUSES:
        body = read_body(Problem(code, "words").body(), dict[str, Any])
        assert body["code"] == code
        assert isinstance(body["message"], str)
        assert set(body) == {"code", "message"} | ({"retry_after_seconds"} if code == "RATE_LIMITED" else set())


def test_index_configuration_is_checked_when_it_is_declared() -> None:
    assert index_config(CreateConfig(), 999).start_from_scratch == 999
    assert index_config(CreateConfig(start_from_scratch=5), 999).start_from_scratch == 5
    for config in (CreateConfig(nbits=3), CreateConfig(max_documents=0), CreateConfig(fts_tokenizer="porter")):
        with pytest.raises(InvalidRequest):
            index_config(config, 999)
