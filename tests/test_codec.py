"""The codec: twins, round trips, edge shapes, determinism, and a floor under its quality."""

from __future__ import annotations

from typing import Literal

import msgspec
import numpy as np
import pytest

from engine.codec import bitpack, kmeans
from engine.codec.order import topical_order
from engine.codec.residual import Codec, Encoded, decode, decode_rotated, encode, quantise_residuals, quantiser, rotation, train
from engine.codec.shaping import Rounder, round_shaped
from engine.errors import InvalidRequest
from reference_codec import decode_slowly, nearest_slowly, pack_slowly, round_shaped_slowly, unpack_slowly

NBITS = (1, 2, 4, 8)


def unit_rows(rows: np.ndarray) -> np.ndarray:
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12), np.float32)


def clustered(n_tokens: int, dim: int = 64, n_topics: int = 50, seed: int = 0) -> np.ndarray:
    """Unit rows around `n_topics` directions; three quarters of a row's energy is its topic's."""
    rng = np.random.default_rng(seed)
    topics = unit_rows(rng.standard_normal((n_topics, dim)))
    noise = unit_rows(rng.standard_normal((n_tokens, dim)) * np.linspace(2, 0.5, dim))
    return unit_rows(np.sqrt(0.75) * topics[rng.integers(0, n_topics, n_tokens)] + 0.5 * noise)


def mean_cosine(codec: Codec, tokens: np.ndarray) -> float:
    return float(np.einsum("ij,ij->i", decode(codec, encode(codec, tokens)), tokens).mean())


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return clustered(20_000)


@pytest.fixture(scope="module")
def codecs(tokens: np.ndarray) -> dict[int, Codec]:
    return {nbits: train(tokens[:4000], len(tokens), nbits, n_clusters=256) for nbits in NBITS}


@pytest.mark.parametrize("nbits", NBITS)
@pytest.mark.parametrize("dim", [1, 3, 8, 33, 96, 100, 128])
def test_packing_is_its_slow_twin_and_comes_back(dim: int, nbits: int) -> None:
    buckets = np.random.default_rng(dim).integers(0, 1 << nbits, (5, dim), dtype=np.uint8)
    rows = bitpack.pack(buckets, nbits)
    assert rows.shape == (5, bitpack.row_bytes(dim, nbits))
    assert rows.shape[1] % bitpack.ROW_ALIGNMENT == 0
    np.testing.assert_array_equal(rows, pack_slowly(buckets, nbits))
    np.testing.assert_array_equal(bitpack.unpack(rows, dim, nbits), buckets)
    np.testing.assert_array_equal(unpack_slowly(rows, dim, nbits), buckets)


def test_bit_fields_of_a_row_are_runs_of_dimensions() -> None:
    buckets = np.arange(16, dtype=np.uint8)[None]
    row = bitpack.pack(buckets, 4)[0]
    assert (row & 15).tolist() == list(range(8))
    assert (row >> 4).tolist() == list(range(8, 16))


def test_packing_no_tokens_gives_no_rows() -> None:
    assert bitpack.pack(np.empty((0, 100), np.uint8), 2).shape == (0, 28)
    assert bitpack.unpack(np.empty((0, 28), np.uint8), 100, 2).shape == (0, 100)


def test_rows_of_another_width_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="width"):
        bitpack.unpack(np.zeros((2, 60), np.uint8), 128, 4)


@pytest.mark.parametrize("nbits", [0, 3, 16])
def test_other_numbers_of_bits_are_refused(nbits: int) -> None:
    with pytest.raises(InvalidRequest):
        bitpack.row_bytes(128, nbits)
    with pytest.raises(InvalidRequest):
        quantiser(nbits, "lloyd")


@pytest.mark.parametrize("dim", [1, 2, 64, 100])
def test_rotation_is_orthogonal_and_follows_from_the_seed(dim: int) -> None:
    turn = rotation(dim, 7)
    np.testing.assert_allclose(turn @ turn.T, np.eye(dim), atol=1e-5)
    np.testing.assert_array_equal(turn, rotation(dim, 7))
    assert dim == 1 or not np.allclose(turn, rotation(dim, 8))


def test_lloyd_max_levels_are_those_of_the_literature() -> None:
    np.testing.assert_allclose(quantiser(1, "lloyd")[1], [-0.7979, 0.7979], atol=1e-4)
    np.testing.assert_allclose(quantiser(2, "lloyd")[1], [-1.5104, -0.4528, 0.4528, 1.5104], atol=1e-4)
    np.testing.assert_allclose(quantiser(4, "lloyd")[1][8:], [0.1284, 0.3881, 0.6568, 0.9424, 1.2562, 1.6181, 2.0690, 2.7326], atol=1e-3)


@pytest.mark.parametrize("kind", ["lloyd", "uniform"])
@pytest.mark.parametrize("nbits", NBITS)
def test_quantiser_minimises_the_error_of_a_gaussian_and_is_symmetric(nbits: int, kind: Literal["lloyd", "uniform"]) -> None:
    cutoffs, levels = quantiser(nbits, kind)
    assert len(levels) == 1 << nbits == len(cutoffs) + 1
    assert (np.diff(levels) > 0).all()
    np.testing.assert_allclose(levels, -levels[::-1], atol=1e-5)
    np.testing.assert_allclose(cutoffs, (levels[1:] + levels[:-1]) / 2, atol=1e-5)
    values = np.random.default_rng(1).standard_normal(200_000)
    error = ((values - levels[np.searchsorted(cutoffs, values)]) ** 2).mean()
    # Max 1960, table I and II; 8 bits by theory: (sqrt(3) pi / 2) / 4^8 for Lloyd-Max.
    expected = {"lloyd": {1: 0.3634, 2: 0.1175, 4: 0.00950, 8: 4.15e-5}, "uniform": {1: 0.3634, 2: 0.1188, 4: 0.01154, 8: 1.0e-4}}
    assert error < expected[kind][nbits] * 1.03


@pytest.mark.parametrize("kind", ["lloyd", "uniform"])
@pytest.mark.parametrize("dim", [1, 5, 16, 40])
def test_shaped_rounding_is_its_slow_twin(dim: int, kind: Literal["lloyd", "uniform"]) -> None:
    rng = np.random.default_rng(dim)
    cutoffs, levels = quantiser(4, kind)
    wanted = rng.standard_normal((dim, 6)).astype(np.float32)
    feedback = np.triu(rng.standard_normal((dim, dim)) * 0.2, 1).astype(np.float32) + np.eye(dim, dtype=np.float32)
    expected = round_shaped_slowly(wanted, feedback, levels)
    errors = wanted.copy()
    buckets = round_shaped(errors, feedback, Rounder(cutoffs, levels))
    np.testing.assert_array_equal(buckets, expected)
    np.testing.assert_allclose(errors, wanted - levels[buckets], atol=1e-5)


@pytest.mark.parametrize("nbits", [2, 4, 8])
def test_rounding_to_lloyd_max_levels_is_a_search_among_the_cutoffs(nbits: int) -> None:
    cutoffs, levels = quantiser(nbits, "lloyd")
    rng = np.random.default_rng(nbits)
    near = np.concatenate([np.nextafter(cutoffs, np.float32(side)) for side in (-9, 9)])
    values = np.concatenate([cutoffs, near, rng.standard_normal(20_000) * 2, [-1e9, 1e9, 0]]).astype(np.float32)
    buckets = np.empty(len(values), np.uint8)
    rounded = Rounder(cutoffs, levels)(values.copy(), buckets)
    np.testing.assert_array_equal(buckets, np.searchsorted(cutoffs, values))
    np.testing.assert_array_equal(rounded, levels[buckets])


def test_shaped_rounding_without_feedback_is_rounding_to_the_nearest_level() -> None:
    cutoffs, levels = quantiser(2, "uniform")
    wanted = np.random.default_rng(2).standard_normal((24, 100)).astype(np.float32)
    buckets = round_shaped(wanted.copy(), np.eye(24, dtype=np.float32), Rounder(cutoffs, levels))
    np.testing.assert_array_equal(buckets, np.searchsorted(cutoffs, wanted))


def test_shaping_trades_angle_for_error_that_neighbours_do_not_see(tokens: np.ndarray) -> None:
    shaped = train(tokens[:4000], len(tokens), 2, n_clusters=64)
    plain = msgspec.structs.replace(shaped, residual_moment=None)
    test = tokens[4000:12_000] @ shaped.rotation
    moment = shaped.residual_moment
    assert moment is not None
    assert train(tokens[:500], 500, 4, n_clusters=8).residual_moment is None

    def seen_error(codec: Codec) -> float:
        error = decode_rotated(codec, encode(codec, tokens[4000:12_000])) - test
        return float(np.einsum("ij,ij->i", error @ moment, error).mean())

    assert seen_error(shaped) < 0.9 * seen_error(plain)


@pytest.mark.parametrize("nbits", NBITS)
def test_decode_is_its_slow_twin(codecs: dict[int, Codec], tokens: np.ndarray, nbits: int) -> None:
    encoded = encode(codecs[nbits], tokens[:50])
    np.testing.assert_allclose(decode(codecs[nbits], encoded), decode_slowly(codecs[nbits], encoded), atol=1e-5)


@pytest.mark.parametrize(("nbits", "floor"), [(1, 0.945), (2, 0.98), (4, 0.998), (8, 0.9999)])
def test_decoded_tokens_point_where_the_originals_do(codecs: dict[int, Codec], tokens: np.ndarray, nbits: int, floor: float) -> None:
    decoded = decode(codecs[nbits], encode(codecs[nbits], tokens[10_000:]))
    np.testing.assert_allclose(np.linalg.norm(decoded, axis=1), 1, atol=0.05)
    assert mean_cosine(codecs[nbits], tokens[10_000:]) > floor


@pytest.mark.parametrize("nbits", [2, 4])
def test_lloyd_max_levels_work_too(tokens: np.ndarray, nbits: int) -> None:
    codec = train(tokens[:2000], len(tokens), nbits, n_clusters=64, levels="lloyd")
    assert not codec.rounder.is_uniform
    assert mean_cosine(codec, tokens[:2000]) > {2: 0.98, 4: 0.998}[nbits]


def test_uniform_levels_are_equally_spaced_so_that_a_search_can_decode_by_arithmetic(codecs: dict[int, Codec]) -> None:
    for nbits, codec in codecs.items():
        assert codec.rounder.is_uniform == (nbits != 4)


def test_scalar_bytes_lose_next_to_nothing(codecs: dict[int, Codec], tokens: np.ndarray) -> None:
    codec, test = codecs[4], tokens[5000:7000]
    rotated = test @ codec.rotation
    codes, _ = kmeans.assign(rotated, codec.cells)
    buckets, inv, scale = quantise_residuals(codec, rotated, codes)
    exact = inv[:, None] * codec.centroids[codes] + scale[:, None] * codec.levels[buckets]
    error_exact = ((exact - rotated) ** 2).sum(1).mean()
    error = ((decode_rotated(codec, encode(codec, test)) - rotated) ** 2).sum(1).mean()
    assert error < 1.03 * error_exact


def test_training_is_the_same_for_the_same_seed_and_any_number_of_threads(tokens: np.ndarray) -> None:
    first, second = (train(tokens[:3000], 3000, 4, seed=5, n_clusters=128, n_threads=n) for n in (1, 2))
    for name in ("rotation", "coarse", "cell_offsets", "centroids_i8", "centroid_scales", "inv_table", "scale_table"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name), err_msg=name)
    other = train(tokens[:3000], 3000, 4, seed=6, n_clusters=128)
    assert not np.array_equal(first.centroids_i8, other.centroids_i8)


def test_encoding_is_the_same_on_any_number_of_threads(codecs: dict[int, Codec], tokens: np.ndarray) -> None:
    one, two = (encode(codecs[4], tokens, n_threads=n) for n in (1, 2))
    for name in ("codes", "scalars", "residuals"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))


def test_encoding_hardly_depends_on_how_tokens_are_cut_into_calls(codecs: dict[int, Codec], tokens: np.ndarray) -> None:
    whole = encode(codecs[4], tokens[:3000])
    cut = [encode(codecs[4], tokens[start : start + 750]) for start in range(0, 3000, 750)]
    # BLAS adds in another order for other shapes: a number on an edge may fall to the other side.
    assert (np.concatenate([part.codes for part in cut]) == whole.codes).mean() > 0.999
    decoded = np.concatenate([decode(codecs[4], part) for part in cut])
    assert (np.abs(decoded - decode(codecs[4], whole)).max(1) < 1e-5).mean() > 0.99


def test_float16_tokens_encode_like_their_float32_copies(codecs: dict[int, Codec], tokens: np.ndarray) -> None:
    half = tokens[:1000].astype(np.float16)
    from_half, from_single = encode(codecs[4], half), encode(codecs[4], half.astype(np.float32))
    np.testing.assert_array_equal(from_half.codes, from_single.codes)
    np.testing.assert_array_equal(from_half.residuals, from_single.residuals)
    assert train(half, 1000, 4, n_clusters=16).rotation.dtype == np.float32


@pytest.mark.parametrize("nbits", NBITS)
def test_zero_tokens_stay_zero_and_spoil_no_other(codecs: dict[int, Codec], tokens: np.ndarray, nbits: int) -> None:
    mixed = tokens[:6].copy()
    mixed[[1, 4]] = 0
    decoded = decode(codecs[nbits], encode(codecs[nbits], mixed))
    assert np.isfinite(decoded).all()
    assert not decoded[[1, 4]].any()
    np.testing.assert_allclose(np.linalg.norm(decoded[[0, 2, 3, 5]], axis=1), 1, atol=0.02)


def test_no_tokens_encode_to_nothing(codecs: dict[int, Codec]) -> None:
    encoded = encode(codecs[4], np.empty((0, 64), np.float32))
    assert len(encoded) == 0
    assert encoded.scalars.shape == (0, 2)
    assert decode(codecs[4], encoded).shape == (0, 64)


def test_tokens_of_another_dimension_are_refused(codecs: dict[int, Codec]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        encode(codecs[4], np.zeros((3, 65), np.float32))
    assert caught.value.code == "dimension-mismatch"


def test_a_codec_needs_a_sample() -> None:
    with pytest.raises(InvalidRequest):
        train(np.empty((0, 64), np.float32), 100)


@pytest.mark.parametrize("nbits", NBITS)
@pytest.mark.parametrize("dim", [1, 2, 3, 7, 96, 100])
def test_any_dimension_and_few_tokens_make_a_sound_codec(dim: int, nbits: int) -> None:
    tokens = unit_rows(np.random.default_rng(dim).standard_normal((40, dim)))
    codec = train(tokens, 40, nbits, n_clusters=8)
    encoded = encode(codec, tokens)
    assert encoded.residuals.shape == (40, bitpack.row_bytes(dim, nbits))
    assert encoded.residuals.dtype == encoded.scalars.dtype == np.uint8
    decoded = decode(codec, encoded)
    assert np.isfinite(decoded).all()
    assert (decoded * tokens).sum(1).mean() > 0.75


@pytest.mark.parametrize("nbits", NBITS)
def test_one_token_makes_a_codec_that_gives_it_back(nbits: int) -> None:
    token = unit_rows(np.random.default_rng(3).standard_normal((1, 32)))
    codec = train(token, 1, nbits)
    assert codec.n_centroids == 1
    np.testing.assert_allclose(decode(codec, encode(codec, token)), token, atol=0.02)


@pytest.mark.parametrize("sample", [np.zeros((50, 16), np.float32), np.tile(unit_rows(np.ones((1, 16))), (50, 1))], ids=["zero", "equal"])
def test_a_sample_without_variety_makes_a_sound_codec(sample: np.ndarray) -> None:
    codec = train(sample, 50, 4)
    np.testing.assert_allclose(decode(codec, encode(codec, sample)), sample, atol=0.02)
    strangers = unit_rows(np.random.default_rng(0).standard_normal((20, 16)))
    decoded = decode(codec, encode(codec, strangers))
    assert np.isfinite(decoded).all()


def test_tokens_unlike_the_sample_are_still_encoded_well(codecs: dict[int, Codec]) -> None:
    strangers = unit_rows(np.random.default_rng(9).standard_normal((500, 64)))
    assert mean_cosine(codecs[4], strangers) > 0.985


def test_cells_partition_the_codes_and_hold_their_own_centroids(codecs: dict[int, Codec]) -> None:
    codec = codecs[4]
    assert codec.cell_offsets[0] == 0
    assert codec.cell_offsets[-1] == codec.n_centroids
    assert (np.diff(codec.cell_offsets) >= 0).all()
    n_cells = len(codec.coarse)
    assert n_cells & (n_cells - 1) == 0
    cell_of_code = np.repeat(np.arange(n_cells), np.diff(codec.cell_offsets))
    # The stored int8 centroids may tip over to a neighbouring cell; nearly none do.
    assert (nearest_slowly(codec.centroids, codec.coarse) == cell_of_code).mean() > 0.97


def test_neighbouring_cells_are_more_alike_than_others(codecs: dict[int, Codec]) -> None:
    similarity = codecs[4].coarse @ codecs[4].coarse.T
    others = similarity[~np.eye(len(similarity), dtype=bool)].mean()
    assert np.diag(similarity, 1).mean() > others + 0.05


def test_two_level_assignment_is_brute_force_when_every_cell_is_searched(codecs: dict[int, Codec], tokens: np.ndarray) -> None:
    rotated = tokens[:300] @ codecs[4].rotation
    codes, fits = kmeans.assign(rotated, codecs[4].cells, n_cells_searched=10_000)
    assert codes.dtype == np.uint16
    best = np.einsum("ij,ij->i", rotated, codecs[4].centroids[nearest_slowly(rotated, codecs[4].centroids)])
    np.testing.assert_allclose(fits, best, atol=1e-5)
    np.testing.assert_allclose(np.einsum("ij,ij->i", rotated, codecs[4].centroids[codes]), best, atol=1e-5)


def test_two_level_assignment_is_nearly_brute_force(tokens: np.ndarray) -> None:
    cells = kmeans.train_cells(tokens, 1024, seed=1, iterations=2)
    codes, _ = kmeans.assign(tokens[:5000], cells)
    brute = (tokens[:5000] @ cells.centroids.T).argmax(1)
    assert (codes == brute).mean() > 0.95


def test_empty_cells_are_never_searched() -> None:
    cells = kmeans.Cells(np.eye(4, dtype=np.float32), np.array([0, 0, 2, 2, 2]), np.eye(4, dtype=np.float32)[:2])
    codes, fits = kmeans.assign(np.eye(4, dtype=np.float32), cells, n_cells_searched=1)
    assert codes.tolist() == [0, 1, 0, 0]
    assert fits.tolist() == [1, 1, 0, 0]


def test_more_centroids_than_tokens_are_not_made() -> None:
    cells = kmeans.train_cells(clustered(37), 4096, seed=0)
    assert cells.centroids.shape == (37, 64)


def test_duplicates_in_a_sample_leave_no_centroid_without_direction() -> None:
    sample = np.repeat(clustered(5), 40, axis=0)
    cells = kmeans.train_cells(sample, 64, seed=0)
    np.testing.assert_allclose(np.linalg.norm(cells.centroids, axis=1), 1, atol=1e-5)
    _, fits = kmeans.assign(sample, cells)
    np.testing.assert_allclose(fits, 1, atol=1e-5)


@pytest.mark.parametrize(("n_tokens", "expected"), [(0, 1), (1, 16), (100, 128), (827_906, 8_192), (10**9, 32_768)])
def test_number_of_centroids_grows_with_the_root_of_the_tokens(n_tokens: int, expected: int) -> None:
    assert kmeans.n_centroids(n_tokens) == expected
    assert kmeans.n_sample_tokens(n_tokens) <= n_tokens


def test_cells_hold_at_most_about_128_centroids() -> None:
    assert [kmeans.cells_for(k) for k in (1, 3, 4, 1024, 8192, 16_384, 32_768, 65_536)] == [1, 1, 2, 32, 64, 128, 256, 512]


@pytest.mark.parametrize("n_documents", [0, 1, 2, 3, 31, 1000])
def test_topical_order_is_a_permutation_and_always_the_same(n_documents: int) -> None:
    vectors = clustered(max(n_documents, 1))[:n_documents]
    order = topical_order(vectors)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(n_documents))
    np.testing.assert_array_equal(order, topical_order(vectors))


def test_topical_order_takes_equal_and_zero_documents() -> None:
    for vectors in (np.zeros((100, 8), np.float32), np.ones((100, 8), np.float32)):
        assert sorted(topical_order(vectors).tolist()) == list(range(100))


def test_topical_order_brings_the_documents_of_a_topic_together() -> None:
    rng = np.random.default_rng(0)
    topics = rng.integers(0, 40, 2000)
    vectors = unit_rows(unit_rows(rng.standard_normal((40, 64)))[topics] + 0.3 * unit_rows(rng.standard_normal((2000, 64))))
    ordered = topics[topical_order(vectors)]
    # 40 topics in 2,000 documents change 39 times at best and about 1,950 times in random order.
    assert np.count_nonzero(np.diff(ordered)) < 100


def test_maxsim_over_decoded_tokens_finds_the_documents_that_it_finds_over_the_originals() -> None:
    tokens, n_documents = clustered(20_000, n_topics=200, seed=4), 1000
    codec_of = {nbits: train(tokens[::2], len(tokens), nbits, n_clusters=512) for nbits in (1, 2, 4)}
    offsets = np.arange(0, 20_000, 20)
    queries = clustered(20 * 8, n_topics=200, seed=5)
    rng = np.random.default_rng(6)
    # Each query is eight tokens of one document, blurred.
    for query in range(20):
        source = tokens[rng.integers(0, n_documents) * 20 :][:8]
        queries[query * 8 : query * 8 + 8] = unit_rows(source + 0.5 * queries[query * 8 : query * 8 + 8])

    def best(documents: np.ndarray) -> list[set[int]]:
        scores = np.maximum.reduceat(queries @ documents.T, offsets, axis=1).reshape(20, 8, n_documents).sum(1)
        return [set(row.tolist()) for row in np.argsort(-scores, axis=1, kind="stable")[:, :10]]

    truth = best(tokens)
    for nbits, floor in ((1, 0.6), (2, 0.8), (4, 0.93)):
        found = best(decode(codec_of[nbits], encode(codec_of[nbits], tokens)))
        recall = np.mean([len(a & b) / 10 for a, b in zip(found, truth, strict=True)])
        assert recall > floor, (nbits, recall)


def test_encoded_counts_its_tokens() -> None:
    encoded = Encoded(np.zeros(3, np.uint16), np.zeros((3, 2), np.uint8), np.zeros((3, 4), np.uint8))
    assert len(encoded) == 3
