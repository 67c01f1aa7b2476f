"""The files of infra/ say what the server does: settings, routes, packages, promises of the container. Nothing is started here."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from cloudformation import read_template
from handler.routes.endpoint import Endpoint
from handler.routes.table import ENDPOINTS
from handler.settings import SETTINGS, Settings

ROOT = Path(__file__).resolve().parent.parent
INFRA = ROOT / "infra"
INSIDE = [endpoint for endpoint in ENDPOINTS if endpoint.path.startswith("/internal/")]
"""Servers among themselves; balancers let nobody in."""
VARIABLES = {variable for setting in SETTINGS for variable in setting.variables}


@pytest.fixture(scope="module")
def stack() -> dict[str, Any]:
    return read_template(INFRA / "ecs.yaml")["Resources"]


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return yaml.safe_load((INFRA / "compose.yaml").read_text())["services"]


def path_of(endpoint: Endpoint) -> str:
    return re.sub(r"{\w+}", "some-name", endpoint.path)


# Settings


def test_every_variable_that_a_file_sets_is_a_setting(stack: dict[str, Any], compose: dict[str, Any]) -> None:
    used = {name for service in compose.values() for name in service.get("environment", {})}
    for task in tasks(stack):
        container = task["Properties"]["ContainerDefinitions"][0]
        used |= {variable["Name"] for variable in container["Environment"] + container["Secrets"]}
    for name in ("Dockerfile", "compose.yaml", "alive.py", "ecs.yaml", "nginx/http.conf", "nginx/servers.conf", "nginx/routes.conf"):
        used |= set(re.findall(r"\bTARTAN_[A-Z0-9_]+\b", (INFRA / name).read_text()))
    assert {name for name in used if name.startswith("TARTAN_")} - VARIABLES == set()


@pytest.mark.parametrize(("text", "areas"), [("", ("health", "docs")), (" ", ("health", "docs")), ("none", ()), ("metrics", ("metrics",))])
def test_areas_that_need_no_key_are_closed_by_the_word_none_and_left_alone_by_a_blank(text: str, areas: tuple[str, ...]) -> None:
    """A blank is what compose makes of a variable that nobody set; it must not open or close anything."""
    settings = Settings.from_environment({"TARTAN_OPEN_AREAS": text})
    assert settings.open_areas == areas
    assert Settings.from_environment(settings.to_environment()) == settings


@pytest.mark.parametrize("text", ["metric", "none,health"])
def test_an_area_that_there_is_not_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="TARTAN_OPEN_AREAS"):
        Settings.from_environment({"TARTAN_OPEN_AREAS": text})


# Who writes and who reads


def retried(path: str) -> bool:
    """Whether nginx may send a POST of this path to another replica after it was sent to one."""
    routes = (INFRA / "nginx" / "routes.conf").read_text()
    blocks = re.findall(r"location ~ (\S+) {\n(.*?)\n}", routes, re.DOTALL)
    return any(re.search(pattern, path) and "non_idempotent" in body for pattern, body in blocks)


@pytest.mark.parametrize("endpoint", [e for e in ENDPOINTS if e.method == "POST" and e not in INSIDE], ids=lambda endpoint: endpoint.name)
def test_nginx_repeats_posts_that_only_read_and_no_others(endpoint: Endpoint) -> None:
    works_on_the_one_asked = endpoint.name in ("warm", "recall")  # one fills a replica's memory, the other is long
    assert retried(path_of(endpoint)) == (not endpoint.is_change and not works_on_the_one_asked)


@pytest.mark.parametrize("endpoint", [e for e in ENDPOINTS if e not in INSIDE], ids=lambda endpoint: endpoint.name)
def test_the_load_balancer_sends_no_change_to_the_readers(endpoint: Endpoint, stack: dict[str, Any]) -> None:
    to_readers = False
    for name in ("GetsToReaders", "SearchesToReaders", "MetadataToReaders"):
        (condition,) = stack[name]["Properties"]["Conditions"]
        methods = condition.get("HttpRequestMethodConfig", {}).get("Values", [])
        patterns = condition.get("PathPatternConfig", {}).get("Values", [])
        matched = [re.fullmatch(re.escape(pattern).replace(r"\*", ".*"), path_of(endpoint)) for pattern in patterns]
        to_readers |= endpoint.method in methods or any(matched)
        assert len(methods) + len(patterns) <= 5  # the most a rule of an ALB takes
    assert not (to_readers and endpoint.is_change)
    assert to_readers or endpoint.is_change or endpoint.name in ("warm", "recall")


def test_balancers_let_nobody_in_where_servers_ask_each_other(stack: dict[str, Any]) -> None:
    assert "location ^~ /internal/ {" in (INFRA / "nginx" / "routes.conf").read_text()
    rule = stack["Inside"]["Properties"]
    assert rule["Conditions"][0]["PathPatternConfig"]["Values"] == ["/metrics", "/internal/*"]
    assert (rule["Priority"], rule["Actions"][0]["Type"]) == (5, "fixed-response")


# Fargate


def tasks(stack: dict[str, Any]) -> list[dict[str, Any]]:
    return [resource for resource in stack.values() if resource["Type"] == "AWS::ECS::TaskDefinition"]


def test_targets_are_checked_as_the_guide_says(stack: dict[str, Any]) -> None:
    groups = [resource["Properties"] for resource in stack.values() if resource["Type"].endswith("::TargetGroup")]
    assert len(groups) == 3
    for group in groups:
        assert group["HealthCheckPath"] == "/health"
        assert (group["HealthCheckIntervalSeconds"], group["HealthCheckTimeoutSeconds"]) == (30, 10)
        assert (group["HealthyThresholdCount"], group["UnhealthyThresholdCount"]) == (2, 3)


def test_tasks_write_nowhere_but_to_their_cache_and_readers_only_read(stack: dict[str, Any]) -> None:
    for task in tasks(stack):
        (container,) = task["Properties"]["ContainerDefinitions"]
        assert container["ReadonlyRootFilesystem"] is True
        assert container["User"] == "10001:10001"
        assert [mount["ContainerPath"] for mount in container["MountPoints"]] == ["/var/cache/tartan"]
        assert container["LinuxParameters"]["Capabilities"]["Drop"] == ["ALL"]
        assert [secret["Name"] for secret in container["Secrets"]] == ["TARTAN_API_KEYS"]
        environment = {variable["Name"]: variable["Value"] for variable in container["Environment"]}
        is_reader = task["Properties"]["TaskRoleArn"] == {"Fn::GetAtt": "ReaderRole.Arn"}
        assert environment.get("TARTAN_READ_ONLY", "false") == str(is_reader).lower()
    statements = stack["ReaderRole"]["Properties"]["Policies"][0]["PolicyDocument"]["Statement"]
    assert [statement["Action"] for statement in statements] == ["s3:GetObject", "s3:ListBucket"]


def test_a_deployment_that_fails_goes_back_by_itself(stack: dict[str, Any]) -> None:
    services = [resource["Properties"] for resource in stack.values() if resource["Type"] == "AWS::ECS::Service"]
    for service in services:
        assert service["DeploymentConfiguration"]["DeploymentCircuitBreaker"] == {"Enable": True, "Rollback": True}
        assert service["DeploymentConfiguration"]["MinimumHealthyPercent"] == 100
    policies = {name for name, resource in stack.items() if resource["Type"].endswith("::ScalingPolicy")}
    assert policies == {"ByCpu", "ByRequestsInFlight"}


def test_the_stack_has_no_aliases_which_cloudformation_refuses() -> None:
    events = yaml.parse((INFRA / "ecs.yaml").read_text())
    assert not [event for event in events if isinstance(event, yaml.AliasEvent)]


def test_policies_of_the_threat_model_are_those_of_the_stack(stack: dict[str, Any]) -> None:
    text = (ROOT / "docs/threat-model.md").read_text()
    reader, writer, bucket = (json.loads(block) for block in re.findall(r"```json\n(.*?)```", text, re.DOTALL))
    for name, policies in (("ReaderRole", [reader]), ("WriterRole", [reader, writer])):
        statements = stack[name]["Properties"]["Policies"][0]["PolicyDocument"]["Statement"]
        assert actions(statements) == actions([statement for policy in policies for statement in policy["Statement"]])
    assert {statement["Effect"] for statement in bucket["Statement"]} == {"Deny"}


def actions(statements: list[dict[str, Any]]) -> set[str]:
    found = [statement["Action"] for statement in statements]
    return {action for listed in found for action in ([listed] if isinstance(listed, str) else listed)}


# Compose


def test_replicas_of_the_compose_file_are_confined_and_one_of_them_writes(compose: dict[str, Any]) -> None:
    roles = []
    for name in "abc":
        service = compose[name]
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["volumes"] == [f"cache-{name}:/var/cache/tartan"]
        assert service["deploy"]["resources"]["limits"]["memory"]
        assert service["healthcheck"]["test"][0] == "CMD"
        roles.append(re.sub(r"\${\w+:-(\w+)}", r"\1", service["environment"]["TARTAN_READ_ONLY"]))
    assert roles == ["false", "true", "true"]
    servers = (INFRA / "nginx" / "servers.conf").read_text()
    assert set(re.findall(r"server (\w+):8080", servers)) == set("abc")


# The image


def test_the_image_needs_no_shell_and_no_root() -> None:
    final = (INFRA / "Dockerfile").read_text().rpartition("\nFROM ")[2]
    assert "USER 10001:10001" in final
    assert re.findall(r"^(?:ENTRYPOINT|CMD|VOLUME) .*$", final, re.MULTILINE) == [
        "VOLUME /var/cache/tartan",
        'ENTRYPOINT ["/opt/tartan/bin/python", "-m", "handler.cli"]',
        'CMD ["serve"]',
    ]
    assert 'CMD ["/opt/tartan/bin/python", "/opt/tartan/alive.py"]' in final  # the health check


def locked(name: str) -> dict[str, list[str]]:
    """Package -> its pinned versions, of a lock file whose every entry has hashes."""
    found: dict[str, list[str]] = {}
    text = (INFRA / name).read_text().replace("\\\n", " ")
    for line in filter(str.strip, text.splitlines()):
        entry = re.match(r"([A-Za-z0-9_.-]+)==(\S+)(?: ;[^-]*)?\s.*--hash=sha256:[0-9a-f]{64}", line)
        assert entry, line[:100]
        found.setdefault(entry[1].lower().replace("_", "-"), []).append(entry[2])
    return found


def test_the_lock_has_every_dependency_at_a_version_that_will_do_and_names_no_host() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    packages = locked("requirements.lock")
    for wanted in project["dependencies"] + project["optional-dependencies"]["encoder"] + project["optional-dependencies"]["aws"]:
        name, least = re.match(r"([A-Za-z0-9_-]+)(?:\[.*\])?>=([\d.]+)", wanted).groups()  # type: ignore[union-attr]
        versions = packages[name.lower().replace("_", "-")]
        assert all(_numbers(version) >= _numbers(least) for version in versions), wanted
    assert "setuptools" in locked("build.lock")
    extra = locked("lambda-encoder.lock")
    assert "awslambdaric" in extra
    assert {name for name in extra if name in packages and extra[name] != packages[name]} == set()  # they share an interpreter
    for lock in ("requirements.lock", "build.lock", "lambda-encoder.lock"):
        assert not re.search(r"https?://|index-url|find-links", (INFRA / lock).read_text())


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))
