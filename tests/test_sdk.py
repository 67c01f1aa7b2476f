"""NextPlaid's own clients, unmodified, against a running server: SDK (sync and async) and command line, on a directory and on S3."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from next_plaid_client import AsyncNextPlaidClient, NextPlaidClient
from next_plaid_client.cli import cli
from next_plaid_client.exceptions import IndexExistsError, IndexNotFoundError, NextPlaidError, ValidationError
from next_plaid_client.models import IndexConfig, SearchParams

from conftest import BUCKET
from s3_server import S3Server
from serving import Served, s3_environment, serving

TEXTS = ["the warp holds the weft", "sheep graze on the hill", "looms of oak and iron"]
DIM = 16


@pytest.fixture(scope="module", params=["directory", "s3"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, s3: S3Server) -> Iterator[Served]:
    if request.param == "directory":
        where, environment = str(tmp_path_factory.mktemp("indices")), {}
    else:
        where = f"s3://{BUCKET}/sdk"
        environment = s3_environment(s3)
    with serving(environment, index_dir=where, model="hashing") as running:
        yield running


@pytest.fixture
def client(server: Served) -> Iterator[NextPlaidClient]:
    with NextPlaidClient(server.url) as client:
        for name in ("sdk", "texts"):
            client.delete_index(name)
        yield client


@pytest.fixture
async def aclient(server: Served) -> AsyncIterator[AsyncNextPlaidClient]:
    async with AsyncNextPlaidClient(server.url) as client:
        for name in ("sdk", "texts"):
            await client.delete_index(name)
        yield client


def matrices(n: int) -> list[list[list[float]]]:
    return np.random.default_rng(n).standard_normal((n, 4, DIM)).tolist()


def rows(n: int) -> list[dict[str, Any]]:
    return [{"title": f"word{i}", "year": 2000 + i} for i in range(n)]


def test_sync_client_does_everything_with_vectors(client: NextPlaidClient) -> None:
    vectors = matrices(6)
    assert "declared" in client.create_index("sdk", IndexConfig(nbits=4, max_documents=100))["message"]
    with pytest.raises(IndexExistsError):
        client.create_index("sdk")
    with pytest.raises(IndexNotFoundError):
        client.get_index("sdk")
    status = client.add("sdk", [{"embeddings": matrix} for matrix in vectors], rows(6))
    assert "queued" in status.lower() or "update" in status.lower()
    info = client.get_index("sdk")
    assert (info.num_documents, info.dimension, info.has_metadata, info.metadata_count, info.max_documents) == (6, DIM, True, 6, 100)
    assert client.list_indices() == ["sdk"]
    health = client.health()
    assert (health.status, [index.name for index in health.indices]) == ("healthy", ["sdk"])
    result = client.search("sdk", [vectors[3]], SearchParams(top_k=2))
    assert result.results[0].document_ids[0] == 3
    assert result.results[0].metadata is not None
    assert result.results[0].metadata[0] == {"_subset_": 3, "title": "word3", "year": 2003}
    assert client.search("sdk", [vectors[3]], subset=[1, 2]).results[0].document_ids[0] in (1, 2)
    found = client.search("sdk", [vectors[3]], filter_condition="year < ?", filter_parameters=[2002])
    assert sorted(found.results[0].document_ids) == [0, 1]
    assert client.keyword_search("sdk", ["word5"]).results[0].document_ids == [5]
    with pytest.raises(ValidationError) as caught:
        client.search("sdk", [[[1.0, 2.0]]])
    assert caught.value.code == "DIMENSION_MISMATCH"


def test_sync_client_reads_and_changes_metadata(client: NextPlaidClient) -> None:
    client.create_index("sdk")
    client.add("sdk", [{"embeddings": matrix} for matrix in matrices(4)], rows(4))
    assert client.get_metadata("sdk").count == 4
    assert client.get_metadata_count("sdk") == {"count": 4, "has_metadata": True}
    assert client.check_metadata("sdk", [1, 9]).missing_ids == [9]
    assert client.query_metadata("sdk", "year > ?", [2001])["document_ids"] == [2, 3]
    assert [row["title"] for row in client.get_metadata_by_ids("sdk", [2, 0]).metadata] == ["word2", "word0"]
    assert client.update_metadata("sdk", "year = ?", {"title": "changed"}, [2000])["updated"] == 1
    assert "No documents match" in client.delete("sdk", "year = ?", [1900])
    assert "queued" in client.delete("sdk", "year = ?", [2001])
    assert client.get_index("sdk").num_documents == 3
    assert client.update_index_config("sdk", max_documents=2)["config"]["max_documents"] == 2
    assert client.delete_index("sdk") == {"deleted": True, "name": "sdk"}
    with pytest.raises(NextPlaidError) as caught:
        client.add("sdk", [{"embeddings": matrices(1)[0]}], [{}])
    assert caught.value.code == "INDEX_NOT_DECLARED"


def test_sync_client_encodes_searches_and_reranks_texts(client: NextPlaidClient) -> None:
    client.create_index("texts")
    client.add("texts", TEXTS)
    assert client.search("texts", ["sheep on a hill"]).results[0].document_ids[0] == 1
    client.delete_index("texts")
    client.create_index("texts")
    client.add("texts", TEXTS, [{"n": i, "body": text} for i, text in enumerate(TEXTS)])
    filtered = client.search("texts", ["sheep on a hill"], filter_condition="n <> ?", filter_parameters=[1])
    assert sorted(filtered.results[0].document_ids) == [0, 2]
    hybrid = client.search("texts", ["sheep on a hill"], text_query=["oak"], alpha=0.5)
    assert set(hybrid.results[0].document_ids[:2]) == {1, 2}
    encoded = client.encode(["warp"], input_type="query")
    assert encoded.num_texts == 1
    assert client.rerank("oak looms", TEXTS).results[0].index == 2
    query = encoded.embeddings[0]
    assert client.rerank(query, [{"embeddings": query}, {"embeddings": [[-value for value in row] for row in query]}]).results[0].index == 0


async def test_async_client_does_the_same(aclient: AsyncNextPlaidClient) -> None:
    vectors = matrices(5)
    await aclient.create_index("sdk", IndexConfig(fts_tokenizer="trigram"))
    await aclient.add("sdk", [{"embeddings": matrix} for matrix in vectors], rows(5))
    assert (await aclient.get_index("sdk")).num_documents == 5
    assert await aclient.list_indices() == ["sdk"]
    assert (await aclient.health()).status == "healthy"
    assert (await aclient.search("sdk", [vectors[2]])).results[0].document_ids[0] == 2
    assert (await aclient.keyword_search("sdk", ["ord4"])).results[0].document_ids == [4]
    assert (await aclient.get_metadata("sdk")).count == 5
    assert (await aclient.get_metadata_count("sdk"))["count"] == 5
    assert (await aclient.check_metadata("sdk", [0, 7])).existing_ids == [0]
    assert (await aclient.query_metadata("sdk", "year = ?", [2004]))["document_ids"] == [4]
    assert (await aclient.get_metadata_by_ids("sdk", [4])).count == 1
    assert (await aclient.update_metadata("sdk", "1=1", {"title": "x"}))["updated"] == 5
    assert "queued" in await aclient.delete("sdk", "1=1")
    assert (await aclient.get_index("sdk")).num_documents == 0
    assert (await aclient.update_index_config("sdk", None))["config"]["max_documents"] is None
    encoded = await aclient.encode(["warp and weft"], input_type="document", pool_factor=2)
    assert encoded.num_texts == 1
    assert (await aclient.rerank("oak", TEXTS)).num_documents == 3
    with pytest.raises(IndexNotFoundError):
        await aclient.get_index("nowhere")
    assert (await aclient.delete_index("sdk"))["deleted"] is True


def test_command_line_speaks_to_the_server(server: Served, client: NextPlaidClient, tmp_path: Path) -> None:
    runner = CliRunner()

    def run(*arguments: str, fails: bool = False, stdin: str | None = None) -> str:
        outcome = runner.invoke(cli, ["--url", server.url, "--json", *arguments], input=stdin)
        assert (outcome.exit_code != 0) is fails, (arguments, outcome.output, outcome.exception)
        return outcome.output

    def answer(*arguments: str, stdin: str | None = None) -> Any:
        return json.loads(run(*arguments, stdin=stdin))

    assert answer("health")["status"] == "healthy"
    assert "declared" in run("index", "create", "texts", "--nbits", "2", "--fts-tokenizer", "unicode61")
    assert "INDEX_ALREADY_EXISTS" in run("index", "create", "texts", fails=True)
    assert "update" in run("document", "add", "texts", "--text", TEXTS[0], "--text", TEXTS[1])
    described = tmp_path / "rows.json"
    described.write_text(json.dumps([{"year": 2001, "tag": "oak"}]))
    run("document", "add", "texts", "--text", TEXTS[2], "--metadata-file", str(described), "--pool-factor", "2")
    assert answer("index", "list") == ["texts"]
    assert answer("index", "get", "texts")["num_documents"] == 3
    assert answer("index", "config", "texts", "--max-documents", "50")["config"]["max_documents"] == 50
    assert answer("index", "config", "texts", "--max-documents", "0")["config"]["max_documents"] is None
    assert answer("search", "texts", "sheep on a hill", "-k", "1")["results"][0]["document_ids"] == [1]
    assert answer("search", "texts", "sheep", "--filter", "year = ?", "--filter-param", "2001")["results"][0]["document_ids"] == [2]
    assert answer("search", "texts", "sheep", "--subset", "0")["results"][0]["document_ids"] == [0]
    assert answer("search", "texts", "--text-query", "oak")["results"][0]["document_ids"] == [2]
    fused = answer("search", "texts", "sheep on a hill", "--text-query", "oak", "--alpha", "0.5", "--fusion", "rrf")
    assert set(fused["results"][0]["document_ids"][:2]) == {1, 2}
    assert answer("metadata", "list", "texts")["count"] == 3
    assert answer("metadata", "count", "texts")["count"] == 3
    assert answer("metadata", "check", "texts", "-i", "0", "-i", "9")["missing_ids"] == [9]
    assert answer("metadata", "query", "texts", "-c", "tag = ?", "-p", "oak")["document_ids"] == [2]
    assert answer("metadata", "get", "texts", "-i", "2")["metadata"][0]["year"] == 2001
    assert answer("metadata", "update", "texts", "-c", "year = ?", "-p", "2001", "--set", '{"tag": "elm"}', "--yes")["updated"] == 1
    assert "queued" in run("document", "delete", "texts", "-c", "tag = ?", "-p", "elm", "--yes")
    assert answer("index", "get", "texts")["num_documents"] == 2
    assert answer("encode", "warp", "--input-type", "query")["num_texts"] == 1
    assert answer("rerank", "-q", "oak looms", *[part for text in TEXTS for part in ("-d", text)])["num_documents"] == 3
    assert "BAD_REQUEST" in run("metadata", "query", "texts", "-c", "tag = 'oak'", fails=True)
    run("index", "delete", "texts", "--yes")
    assert "INDEX_NOT_FOUND" in run("index", "get", "texts", fails=True)
