"""Rules, dashboard, runbook and manual against what the server really says; and all alarms once for real, against a Prometheus that scrapes servers.

The quick tests read files. The slow one (`make monitoring`) starts two servers and Prometheus, provokes every alarm of alerts.yml and asks every
panel of the dashboard for data. promtool and prometheus come from Debian's package prometheus.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import yaml

from conftest import s3_options
from engine.config import MaintenanceParams
from engine.index.reader import Reader
from engine.store.objects import StoreOptions, open_store
from handler.emf import Emf
from handler.logs import RequestRecord
from handler.metrics import Metrics
from serving import Served, all_serving, free_port

ROOT = Path(__file__).resolve().parent.parent
INFRA = ROOT / "infra"
ALERTS = INFRA / "prometheus/alerts.yml"
MANUAL = ROOT / "docs/monitoring.md"
_SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_count", "_sum"), "summary": ("_count", "_sum"), "gauge": ("",)}


def rules() -> list[dict[str, Any]]:
    return yaml.safe_load(ALERTS.read_text())["groups"][0]["rules"]


def panels() -> list[dict[str, Any]]:
    return [panel for panel in json.loads((INFRA / "grafana/tartan.json").read_text())["panels"] if panel["type"] != "row"]


def registry() -> dict[str, tuple[str, str]]:
    """Of every metric, by the name in the exposition (counters with _total): (type, labels)."""
    metrics = Metrics(release="r")
    found = {}
    for collector in set(metrics.registry._collector_to_names):
        kind, name = collector._type, collector._name
        found[name + ("_total" if kind == "counter" else "")] = (kind, ", ".join(collector._labelnames))
    return found


def series() -> set[str]:
    """Names that a query may use."""
    return {name.removesuffix("_total") + suffix for name, (kind, _) in registry().items() for suffix in _SUFFIXES[kind]}


def promtool(*arguments: str) -> None:
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed (Debian package prometheus)")
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, cwd=INFRA / "prometheus")
    assert done.returncode == 0, done.stdout + done.stderr


# Files


def test_scrape_configuration_and_rules_are_valid() -> None:
    promtool("check", "config", "prometheus.yml")
    promtool("check", "rules", "alerts.yml")


def test_each_alarm_fires_when_it_should_and_not_otherwise() -> None:
    promtool("test", "rules", "alerts.test.yml")
    cases = yaml.safe_load((INFRA / "prometheus/alerts.test.yml").read_text())["tests"]
    names = [case["name"] for case in cases]
    assert sorted(names) == sorted(f"{rule['alert']} {how}" for rule in rules() for how in ("fires", "stays quiet"))


def test_queries_name_only_metrics_that_there_are() -> None:
    known = series() | {"up"}
    texts = [rule["expr"] for rule in rules()] + [target["expr"] for panel in panels() for target in panel["targets"]]
    for text in texts:
        used = set(re.findall(r"\b((?:tartan|next_plaid|process)_[a-z_]+)\b", text)) - {"next_plaid"}
        assert used <= known, used - known
    assert len(texts) > 60


def test_each_alarm_has_a_section_in_the_runbook_that_its_annotation_names() -> None:
    runbook = (INFRA / "README.md").read_text()
    sections = dict(re.findall(r"^### (Tartan\w+)\n(.*?)(?=^##|\Z)", runbook, re.MULTILINE | re.DOTALL))
    assert sorted(sections) == sorted(rule["alert"] for rule in rules())
    for rule in rules():
        assert rule["annotations"]["runbook"] == f"infra/README.md#{rule['alert'].lower()}"
        assert rule["labels"]["severity"] in ("warning", "critical")
        for heading in ("**Cause.**", "**See.**", "**Do.**", "**Tried.**"):
            assert heading in sections[rule["alert"]], (rule["alert"], heading)


def test_the_manual_lists_every_metric_with_its_type_and_labels() -> None:
    rows = re.findall(r"^\| `([a-z_]+)` \| (\w+) \| ([a-z_, ]*)\|", MANUAL.read_text(), re.MULTILINE)
    assert {name: (kind, labels.strip()) for name, kind, labels in rows} == registry()


def test_the_manual_lists_every_embedded_metric() -> None:
    text = MANUAL.read_text() + (INFRA / "cloudwatch/monitoring.yaml").read_text()
    record = RequestRecord(
        "r",
        "POST",
        status=200,
        facts={"rounds": 1, "requests": 1, "bytes": 1, "candidates": 1, "conflicts": 1, "cold_segments": 1},
        usd=1.0,
    )
    line = Emf("Tartan").fields("search", record, 0.1)
    for directive in line["_aws"]["CloudWatchMetrics"]:
        for metric in directive["Metrics"]:
            assert re.search(rf"\b{metric['Name']}\b", text), metric


def test_the_dashboard_is_well_formed() -> None:
    dashboard = json.loads((INFRA / "grafana/tartan.json").read_text())
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in dashboard["panels"]]
    assert len(set(places)) == len(places)
    assert all(panel["targets"] and panel["title"] for panel in panels())
    assert {variable["name"] for variable in dashboard["templating"]["list"]} == {"datasource", "instance", "index"}


def test_the_alarms_of_the_cloudwatch_stack_bear_the_names_of_the_runbook() -> None:
    path = INFRA / "cloudwatch/monitoring.yaml"
    alarms = re.findall(r"^  (\w+):\n    Type: AWS::CloudWatch::Alarm", path.read_text(), re.MULTILINE)
    assert alarms
    assert set(alarms) <= {rule["alert"] for rule in rules()}
    body = re.search(r"DashboardBody: !Sub \|\n(.*?)\n\n", path.read_text(), re.DOTALL)
    assert body is not None
    assert len(json.loads(body[1])["widgets"]) > 10


@pytest.mark.slow
def test_the_cloudwatch_stack_passes_cfn_lint() -> None:
    if shutil.which("cfn-lint") is None:
        pytest.skip("cfn-lint is not installed (PyPI package cfn-lint)")
    done = subprocess.run(["cfn-lint", str(INFRA / "cloudwatch/monitoring.yaml")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# For real

_LOWERED = {
    "TartanSlowSearches": ("> 0.5", "> 0.0001"),
    "TartanMemory": ("> 0.8", "> 0.001"),
    "TartanCpu": ("> 0.8", "> 0.0001"),
    "TartanCommitConflicts": ("> 1", "> 0"),
    "TartanEncoderQueue": ("> 512", "> 0"),
    "TartanLowRecall": ("< 0.9", "< 1.1"),
}
"""What cannot be provoked on a machine that others use is provoked at a lower threshold: the query and its labels are the same."""
DIM = 4
TOKENS_TO_FOLD = MaintenanceParams().max_flat_tokens + 2
TO_QUANTISE = MaintenanceParams().min_quantise_documents
BUCKET = "tartan"


def impatient_rules() -> dict[str, Any]:
    """alerts.yml with windows of seconds and no waiting."""
    document = yaml.safe_load(ALERTS.read_text())
    for rule in document["groups"][0]["rules"]:
        rule.pop("for", None)
        if rule["alert"] in _LOWERED:
            given, lowered = _LOWERED[rule["alert"]]
            assert given in rule["expr"]
            rule["expr"] = rule["expr"].replace(given, lowered)
        rule["expr"] = re.sub(r"\[(5m|10m|30m|1h)\]", "[30s]", rule["expr"])
    return document


class Prometheus:
    """A Prometheus of its own that scrapes `targets` every second."""

    def __init__(self, folder: Path, targets: list[str]) -> None:
        folder.mkdir()
        (folder / "alerts.yml").write_text(yaml.safe_dump(impatient_rules()))
        jobs = [{"job_name": "tartan", "static_configs": [{"targets": targets}]}]
        timing = {"scrape_interval": "1s", "evaluation_interval": "1s", "scrape_timeout": "1s"}
        (folder / "prometheus.yml").write_text(yaml.safe_dump({"global": timing, "rule_files": ["alerts.yml"], "scrape_configs": jobs}))
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        command = ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
        command += [f"--web.listen-address=127.0.0.1:{port}", "--log.level=error"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def get(self, path: str, **parameters: str) -> Any:
        with contextlib.suppress(httpx.HTTPError, ValueError):  # it is starting
            answer = httpx.get(f"{self.url}/api/v1/{path}", params=parameters, timeout=10).json()
            assert answer["status"] == "success", answer
            return answer["data"]
        return None

    def firing(self) -> set[str]:
        found = self.get("alerts") or {"alerts": []}
        return {alert["labels"]["alertname"] for alert in found["alerts"] if alert["state"] == "firing"}

    def values(self, query: str) -> list[float]:
        found = self.get("query", query=query) or {"result": []}
        return [float(row["value"][1]) for row in found["result"]]

    def end(self) -> None:
        self.process.terminate()
        self.process.wait(20)


def until(is_done: Callable[[], bool], timeout_s: float, what: str | Callable[[], str]) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_done():
        assert time.monotonic() < deadline, what if isinstance(what, str) else what()
        time.sleep(0.5)


class Traffic(threading.Thread):
    """Requests of all kinds, again and again, until stopped: good ones to both servers, bad ones to the sick one."""

    def __init__(self, sick: Served, sound: Served, sick_store: str) -> None:
        super().__init__(daemon=True)
        self._sick, self._sound, self._sick_store = sick, sound, sick_store
        self._is_over = threading.Event()
        self.n_rounds = 0

    def run(self) -> None:
        with httpx.Client(timeout=120) as client:
            while not self._is_over.wait(0.2):
                with contextlib.suppress(httpx.HTTPError):
                    self._round(client)
                self.n_rounds += 1

    def _round(self, client: httpx.Client) -> None:
        query = {"queries": [{"embeddings": np.random.default_rng(self.n_rounds).standard_normal((2, DIM)).tolist()}]}
        for url in (self._sick.url, self._sound.url):
            client.post(f"{url}/indices/x/search", json=query)
            client.post(f"{url}/indices/x/search_with_encoding", json={"queries": ["weft"]})
            add(client, url, "x", 1, 3)
        client.request("DELETE", f"{self._sound.url}/indices/x/documents", json={"condition": "n = ?", "parameters": [0]})
        client.get(f"{self._sick.url}/indices/bad")
        asyncio.run(self._commit_behind_its_back())
        add(client, self._sick.url, "x", 1, 3)
        if self.n_rounds % 4 == 0:
            add(client, self._sound.url, "folded", 2, TOKENS_TO_FOLD // 2)

    async def _commit_behind_its_back(self) -> None:
        writer = Reader(open_store(self._sick_store, StoreOptions(fsync=False))).writer("x")
        await writer.add(np.ones((1, DIM), np.float32), np.array([0, 1]), fields=[{"n": 1}])

    def stop(self) -> None:
        self._is_over.set()
        if self.is_alive():
            self.join(60)


def add(client: httpx.Client, url: str, index: str, n: int, n_tokens: int) -> None:
    packed = base64.b64encode(np.random.default_rng(n).standard_normal((n_tokens, DIM)).astype("<f4").tobytes()).decode()
    documents = [{"embeddings_b64": packed, "shape": [n_tokens, DIM]}] * n
    answer = client.post(f"{url}/indices/{index}/update", json={"documents": documents, "metadata": [{"n": i} for i in range(n)]})
    assert answer.status_code in (202, 409, 503), answer.text


def prepare(sick: Served, sound: Served, sick_store: Path) -> None:
    """What stands before Prometheus looks: an index that is full, one with a backlog, one that is damaged, one that is folded now and then."""
    with httpx.Client(timeout=60) as client:
        for url in (sick.url, sound.url):
            assert client.post(f"{url}/indices", json={"name": "x", "config": {"nbits": 4}}).status_code == 200
            add(client, url, "x", 300, 100)
        client.post(f"{sick.url}/indices", json={"name": "full", "config": {"max_documents": 10}})
        add(client, sick.url, "full", 10, 3)
        client.post(f"{sick.url}/indices", json={"name": "late", "config": {"nbits": 4}})
        add(client, sick.url, "late", 1100, 100)
        client.post(f"{sick.url}/indices", json={"name": "bad", "config": {"nbits": 4}})
        client.post(f"{sound.url}/indices", json={"name": "folded", "config": {"nbits": 4}})
        add(client, sound.url, "folded", TO_QUANTISE, 1 + TOKENS_TO_FOLD // TO_QUANTISE)
    current = sick_store / "bad/CURRENT"
    current.write_bytes(current.read_bytes()[:-3] + b"!!!")


def tear(sound: Served, bucket: Bucket) -> None:
    """An index whose next compaction meets a segment that somebody else has overwritten."""
    with httpx.Client(timeout=60) as client:
        client.post(f"{sound.url}/indices", json={"name": "torn", "config": {"nbits": 4}})
        add(client, sound.url, "torn", TO_QUANTISE - 1, 1 + TOKENS_TO_FOLD // TO_QUANTISE)
        asyncio.run(_overwrite_the_segment(bucket))
        add(client, sound.url, "torn", 1, 200)


async def _overwrite_the_segment(bucket: Bucket) -> None:
    store = open_store(f"s3://{BUCKET}/sound", s3_options(bucket))
    (segment,) = [listed.name async for listed in store.list("torn/segments/") if listed.name.endswith("/data")]
    await store.delete([segment])
    await store.put_if_absent(segment, b"not what was written" * 1000)


class Bucket:
    """infra/local/s3.py: an S3 server in a process of its own, which can be killed."""

    def __init__(self) -> None:
        self._process = subprocess.Popen([sys.executable, str(INFRA / "local/s3.py")], stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        with self._process.stdout as said:
            self.url = said.readline().strip()
        keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1"}
        self.environment = {**keys, "TARTAN_S3_ENDPOINT": self.url}

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(20)


@contextlib.contextmanager
def encoding(server: Served) -> Iterator[None]:
    """Keep the encoder busy, with texts waiting."""
    stop = threading.Event()
    body = {"texts": ["a plain weave of many threads " * 200] * 32, "input_type": "document"}

    def post() -> None:
        while not stop.is_set():
            with contextlib.suppress(httpx.HTTPError):
                httpx.post(f"{server.url}/encode", json=body, timeout=60)

    threads = [threading.Thread(target=post, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    yield
    stop.set()
    for thread in threads:
        thread.join(60)


@pytest.mark.slow
def test_every_alarm_fires_and_every_panel_shows_something(tmp_path: Path) -> None:
    if shutil.which("prometheus") is None:
        pytest.skip("prometheus is not installed (Debian package prometheus)")
    sick_store = tmp_path / "sick"
    common = {"recall_sample": 1.0, "model": "hashing", "log_level": "off", "maintenance_interval_s": 1.0}
    sick = {"index_dir": str(sick_store), "memory_bytes": 1 << 20, "max_index_age_s": 1.0, "max_batch_texts": 8, **common}
    sound = {"index_dir": f"s3://{BUCKET}/sound", "compact": True, "cache_dir": str(tmp_path / "cache"), **common}
    wanted = {rule["alert"] for rule in rules()}
    at_the_end = ["TartanMaintenanceFails", "TartanStoreUnreachable"]
    fired: set[str] = set()

    def have_fired(*names: str) -> bool:
        fired.update(prometheus.firing())
        return fired.issuperset(names)

    with contextlib.ExitStack() as stack:
        bucket = Bucket()
        stack.callback(bucket.kill)
        one, other = stack.enter_context(all_serving(sick, sound, environment=bucket.environment))
        prepare(one, other, sick_store)
        targets = [server.url.removeprefix("http://") for server in (one, other)]
        prometheus = Prometheus(tmp_path / "prometheus", [*targets, f"127.0.0.1:{free_port()}"])
        stack.callback(prometheus.end)
        traffic = Traffic(one, other, str(sick_store))
        stack.callback(traffic.stop)
        until(lambda: len(prometheus.values('up{job="tartan"}')) == 3, 30, "prometheus scrapes")
        traffic.start()
        early = wanted - set(at_the_end)
        with encoding(one):
            until(lambda: have_fired(*early), 120, lambda: f"{early - fired} did not fire")
        assert fired.isdisjoint(at_the_end)
        check_panels(prometheus)
        traffic.stop()
        tear(other, bucket)
        until(lambda: have_fired(at_the_end[0]), 60, "a segment that cannot be read fails maintenance")
        assert at_the_end[1] not in fired
        bucket.kill()
        until(lambda: ask(other) and have_fired(at_the_end[1]), 120, "a store that is gone")


def ask(server: Served) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        httpx.get(f"{server.url}/indices/x", timeout=30)
    return True


def check_panels(prometheus: Prometheus) -> None:
    """Every query of the dashboard, with its variables filled in, has data; where it divides, not only by zero."""

    def is_answered(query: str) -> bool:
        return bool(np.isfinite(prometheus.values(query)).any())

    queries = {}
    for panel in panels():
        for target in panel["targets"]:
            query = (
                target["expr"].replace("$instance", ".*").replace("$index", ".*").replace("$__rate_interval", "30s").replace("[1h]", "[5m]")
            )
            queries[f"{panel['title']}: {query}"] = query
    silent = dict(queries)

    def all_answered() -> bool:
        for name in [name for name, query in silent.items() if is_answered(query)]:
            del silent[name]
        return not silent

    until(all_answered, 60, lambda: "\n".join(silent))
