"""template.yaml: handlers importable, settings known, routes as the API has them, each role exactly what its functions' code needs, and what SAM says."""

from __future__ import annotations

import fnmatch
import importlib
import json
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cloudformation import read_template
from handler.routes.table import ENDPOINTS
from handler.settings import SETTINGS

ROOT = Path(__file__).resolve().parent.parent
BUCKET = "arn:aws:s3:::b"
VALUES = {
    "Bucket.Arn": BUCKET,
    "Prefix": "indices",
    "InputPrefix": "inputs",
    "AWS::StackName": "s",
    "AWS::Partition": "aws",
    "AWS::Region": "r",
}
VALUES |= {"AWS::AccountId": "1"}
WITH_TEXTS = {"encode", "rerank_with_encoding", "search_with_encoding", "search_filtered_with_encoding", "update_with_encoding"}


TEMPLATE = read_template(ROOT / "template.yaml")
RESOURCES: dict[str, Any] = TEMPLATE["Resources"]


def of_type(kind: str) -> dict[str, Any]:
    return {name: resource["Properties"] for name, resource in RESOURCES.items() if resource["Type"] == kind}


FUNCTIONS = of_type("AWS::Serverless::Function")
ROUTES = {route["RouteKey"]: route for route in of_type("AWS::ApiGatewayV2::Route").values()}


def resolved(value: Any) -> str:
    """An ARN with the template's values in it; what another resource gives stays as ${name}."""
    if isinstance(value, dict):
        value = "${" + value["Fn::GetAtt"] + "}" if "Fn::GetAtt" in value else value.get("Fn::Sub", "${" + str(value.get("Ref")) + "}")
    return re.sub(r"\$\{([\w:.]+)\}", lambda found: VALUES.get(found[1], found[0]), str(value))


def listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def statements(role: str) -> Iterator[dict[str, Any]]:
    for policy in RESOURCES[role]["Properties"]["Policies"]:
        yield from policy["PolicyDocument"]["Statement"]


def may(role: str, action: str, resource: str, prefix: str | None = None) -> bool:
    """Whether a role allows an action, as IAM matches: wildcards cross slashes."""
    for statement in statements(role):
        allowed = any(fnmatch.fnmatchcase(action, pattern) for pattern in listed(statement["Action"]))
        covered = any(fnmatch.fnmatchcase(resource, resolved(pattern)) for pattern in listed(statement["Resource"]))
        wanted = [resolved(one) for one in statement.get("Condition", {}).get("StringLike", {}).get("s3:prefix", ["*"])]
        if allowed and covered and (prefix is None or any(fnmatch.fnmatchcase(prefix, pattern) for pattern in wanted)):
            return True
    return False


# Functions


@pytest.mark.parametrize("name", FUNCTIONS)
def test_handlers_can_be_imported(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TARTAN_INDEX_DIR", "memory://")
    path = FUNCTIONS[name].get("Handler") or FUNCTIONS[name]["ImageConfig"]["Command"][0]
    module, _, attribute = path.rpartition(".")
    if module == "handler.lambda_tasks":  # lambda_http makes an event loop when imported; test_lambda.py imports it in a process of its own
        assert callable(getattr(importlib.import_module(module), attribute))
    else:
        assert (ROOT / (module.replace(".", "/") + ".py")).is_file()
        assert re.search(rf"^{attribute} = ", (ROOT / (module.replace(".", "/") + ".py")).read_text(), re.MULTILINE)


def test_every_variable_is_a_setting_or_a_librarys() -> None:
    known = {variable for setting in SETTINGS for variable in setting.variables}
    known |= {"OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "NUMEXPR_MAX_THREADS"}
    used = set(TEMPLATE["Globals"]["Function"]["Environment"]["Variables"])
    for function in FUNCTIONS.values():
        used |= set(function["Environment"]["Variables"])
    assert used <= known


def test_every_parameter_is_used_and_described() -> None:
    text = (ROOT / "template.yaml").read_text().partition("\nConditions:")[2] + (ROOT / "template.yaml").read_text().partition("\nRules:")[
        2
    ]
    for name in TEMPLATE["Parameters"]:
        assert re.search(rf"\b{name}\b", text), name
        assert any(name in group["Parameters"] for group in TEMPLATE["Metadata"]["AWS::CloudFormation::Interface"]["ParameterGroups"]), name


def test_functions_that_share_an_address_give_up_before_the_gateway_does() -> None:
    for name in ("SearchFunction", "WriterFunction", "EncoderFunction"):
        assert FUNCTIONS[name]["Timeout"] < 30
    for name in ("ShardFunction", "CoordinateFunction"):
        assert FUNCTIONS[name]["Timeout"] < 60  # the machine's own limit on a task


def test_zip_functions_have_the_requirements_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ours = set(project["dependencies"]) | set(project["optional-dependencies"]["aws"])
    wanted = {line for line in (ROOT / "infra/lambda/requirements.txt").read_text().splitlines() if line and not line.startswith("#")}
    assert wanted <= ours


# Routes


def test_routes_send_changes_to_the_writer_and_texts_to_the_encoder() -> None:
    for endpoint in ENDPOINTS:
        key = f"{endpoint.method} {endpoint.path}"
        if endpoint.name in WITH_TEXTS:
            assert "EncoderIntegration" in str(ROUTES[key]["Target"]), key
            assert ("WriterIntegration" if endpoint.is_change else "SearchIntegration") in str(ROUTES[key]["Target"]), key
        elif endpoint.is_change:
            assert ROUTES[key]["Target"] == {"Fn::Sub": "integrations/${WriterIntegration}"}, key
        else:
            assert key not in ROUTES
    assert ROUTES["$default"]["Target"] == {"Fn::Sub": "integrations/${SearchIntegration}"}
    known = {f"{endpoint.method} {endpoint.path}" for endpoint in ENDPOINTS} | {"$default"}
    assert set(ROUTES) <= known
    assert all(route["AuthorizationType"] == {"Fn::If": ["HasJwt", "JWT", "NONE"]} for route in ROUTES.values())


def test_upload_addresses_are_signed_and_committed_by_a_role_that_may_put_them_there() -> None:
    """An address is worth what the role may do that signed it."""
    for key in ("POST /indices/{name}/uploads", "POST /indices/{name}/uploads/{upload}/commit"):
        assert ROUTES[key]["Target"] == {"Fn::Sub": "integrations/${WriterIntegration}"}
    assert FUNCTIONS["WriterFunction"]["Role"] == {"Fn::GetAtt": "WriterRole.Arn"}
    assert [role for role in CAN if may(role, "s3:PutObject", UPLOAD)] == ["WriterRole", "MaintainRole"]


def test_every_function_that_answers_requests_may_put_a_large_answer_there() -> None:
    assert all(may(role, "s3:PutObject", ANSWER) for role in ("SearchRole", "WriterRole", "EncoderRole"))


def test_the_nested_monitoring_gets_the_namespace_of_the_functions_and_parameters_that_it_has() -> None:
    nested = RESOURCES["Monitoring"]["Properties"]
    own = read_template(ROOT / nested["Location"])
    assert nested["Parameters"]["Namespace"] == TEMPLATE["Globals"]["Function"]["Environment"]["Variables"]["TARTAN_EMF_NAMESPACE"]
    assert set(nested["Parameters"]) == set(own["Parameters"])
    assert "CAPABILITY_AUTO_EXPAND" in (ROOT / "infra/lambda.mk").read_text()


def test_early_reads_are_for_the_function_that_searches() -> None:
    assert FUNCTIONS["SearchFunction"]["Environment"]["Variables"]["TARTAN_WARM"] == {"Ref": "WarmIndices"}


# Roles: what each can and cannot do

SEGMENT, CURRENT, RECORD = f"{BUCKET}/indices/x/segments/01/data", f"{BUCKET}/indices/x/CURRENT", f"{BUCKET}/indices/x/builds/b/00000000"
ELSEWHERE, INPUT, ALIAS = f"{BUCKET}/other/x/CURRENT", f"{BUCKET}/inputs/p.jsonl", f"{BUCKET}/indices/_aliases/live"
ANSWER, PIN = f"{BUCKET}/indices/x/uploads/01/answer", f"{BUCKET}/indices/x/pins/p"
UPLOAD, CLAIM = f"{BUCKET}/indices/x/uploads/01/data", f"{BUCKET}/indices/x/uploads/01/claim"
CAN: dict[str, set[tuple[str, str]]] = {
    "SearchRole": {("s3:GetObject", SEGMENT), ("s3:GetObject", CURRENT), ("s3:GetObject", ALIAS), ("s3:PutObject", ANSWER)},
    "ShardRole": {("s3:GetObject", SEGMENT), ("s3:GetObject", CURRENT)},
    "CoordinateRole": {("s3:GetObject", SEGMENT), ("s3:GetObject", CURRENT)},
    "WriterRole": {
        ("s3:GetObject", CURRENT),
        ("s3:PutObject", CURRENT),
        ("s3:PutObject", SEGMENT),
        ("s3:DeleteObject", PIN),
        ("s3:PutObject", ALIAS),
        ("s3:PutObject", UPLOAD),  # whoever holds an address that it signed may do what it may
        ("s3:GetObject", UPLOAD),
        ("s3:PutObject", CLAIM),
        ("s3:DeleteObject", UPLOAD),
    },
    "EncoderRole": {
        ("s3:PutObject", ANSWER),
        ("s3:GetObject", SEGMENT),
        ("s3:PutObject", CURRENT),
        ("s3:PutObject", SEGMENT),
        ("s3:GetObject", f"{BUCKET}/models/m/model.onnx"),
    },
    "BuildRole": {
        ("s3:GetObject", INPUT),
        ("s3:PutObject", SEGMENT),
        ("s3:PutObject", CURRENT),
        ("s3:PutObject", RECORD),
        ("s3:DeleteObject", RECORD),
    },
    "MaintainRole": {("s3:PutObject", CURRENT), ("s3:PutObject", SEGMENT), ("s3:DeleteObject", SEGMENT), ("s3:GetObject", CURRENT)},
}
CANNOT: dict[str, set[tuple[str, str]]] = {
    "SearchRole": {
        ("s3:PutObject", CURRENT),
        ("s3:PutObject", SEGMENT),
        ("s3:DeleteObject", SEGMENT),
        ("s3:DeleteObject", ANSWER),
        ("s3:PutObject", UPLOAD),
        ("s3:PutObject", CLAIM),
        ("s3:GetObject", INPUT),
    },
    "ShardRole": {("s3:PutObject", CURRENT), ("s3:PutObject", ANSWER), ("s3:DeleteObject", SEGMENT), ("s3:GetObject", INPUT)},
    "CoordinateRole": {("s3:PutObject", CURRENT), ("s3:PutObject", ANSWER), ("s3:DeleteObject", SEGMENT)},
    "WriterRole": {("s3:GetObject", INPUT), ("s3:PutObject", ELSEWHERE)},
    "EncoderRole": {
        ("s3:PutObject", UPLOAD),
        ("s3:DeleteObject", SEGMENT),
        ("s3:PutObject", PIN),
        ("s3:PutObject", ALIAS),
        ("s3:GetObject", INPUT),
    },
    "BuildRole": {
        ("s3:DeleteObject", SEGMENT),
        ("s3:DeleteObject", CURRENT),
        ("s3:PutObject", INPUT),
        ("s3:PutObject", PIN),
        ("s3:DeleteObject", INPUT),
    },
    "MaintainRole": {("s3:GetObject", INPUT), ("s3:DeleteObject", ELSEWHERE)},
}
S3_ACTIONS = {"s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:ListBucket"}


@pytest.mark.parametrize("role", CAN)
def test_each_role_is_what_its_code_needs_and_no_more(role: str) -> None:
    assert {pair for pair in CAN[role] if not may(role, *pair)} == set()
    assert {pair for pair in CANNOT[role] if may(role, *pair)} == set()
    for action, resource in CAN[role]:
        assert not may(role, action, resource.replace(BUCKET, "arn:aws:s3:::another"))
    assert may(role, "s3:ListBucket", BUCKET, "indices/x/")
    assert not may(role, "s3:ListBucket", BUCKET, "private/")
    assert may(role, "s3:ListBucket", BUCKET, "inputs/") is (role == "BuildRole")
    used = {action for statement in statements(role) for action in listed(statement["Action"])}
    others = {"logs:CreateLogStream", "logs:PutLogEvents"} | ({"states:StartSyncExecution"} if role == "SearchRole" else set())
    assert used <= S3_ACTIONS | others
    assert not [statement for statement in statements(role) if "*" in listed(statement["Resource"])]


def test_every_function_has_a_role_and_a_log_of_its_own() -> None:
    roles = [function["Role"]["Fn::GetAtt"].removesuffix(".Arn") for function in FUNCTIONS.values()]
    assert sorted(roles) == sorted(CAN)
    logs = [function["LoggingConfig"]["LogGroup"]["Ref"] for function in FUNCTIONS.values()]
    assert len(set(logs)) == len(logs)
    assert all("RetentionInDays" in group for group in of_type("AWS::Logs::LogGroup").values())


def test_the_search_role_starts_its_machine_and_the_machine_calls_its_functions() -> None:
    assert may("SearchRole", "states:StartSyncExecution", "arn:aws:states:r:1:stateMachine:s-search")
    assert not may("SearchRole", "states:StartSyncExecution", "arn:aws:states:r:1:stateMachine:s-build")
    assert not may("SearchMachineRole", "lambda:InvokeFunction", "${BuildFunction.Arn}")
    assert may("SearchMachineRole", "lambda:InvokeFunction", "${ShardFunction.Arn}")
    assert may("BuildMachineRole", "states:StartExecution", "arn:aws:states:r:1:stateMachine:s-build")


# The bucket and the machines


def test_the_bucket_is_private_encrypted_versioned_and_tidied() -> None:
    bucket = RESOURCES["Bucket"]
    assert bucket["DeletionPolicy"] == bucket["UpdateReplacePolicy"] == "Retain"
    properties = bucket["Properties"]
    assert properties["VersioningConfiguration"] == {"Status": "Enabled"}
    assert all(properties["PublicAccessBlockConfiguration"].values())
    assert properties["BucketEncryption"]["ServerSideEncryptionConfiguration"]
    rules = {rule["Id"]: rule for rule in properties["LifecycleConfiguration"]["Rules"]}
    assert set(rules) == {"multipart-leftovers", "old-versions"}
    tls, conditional = RESOURCES["BucketPolicy"]["Properties"]["PolicyDocument"]["Statement"]
    assert (tls["Effect"], tls["Condition"]) == ("Deny", {"Bool": {"aws:SecureTransport": "false"}})
    assert (conditional["Effect"], conditional["Action"]) == ("Deny", "s3:PutObject")
    assert conditional["Condition"] == {"Null": {"s3:if-match": "true", "s3:if-none-match": "true"}}


def test_the_machines_get_every_function_that_they_name() -> None:
    for machine in of_type("AWS::Serverless::StateMachine").values():
        text = (ROOT / machine["DefinitionUri"]).read_text()
        assert set(re.findall(r"\$\{(\w+)\}", text)) == set(machine["DefinitionSubstitutions"])
        json.loads(text)


def test_snapstart_is_refused_with_what_it_cannot_have() -> None:
    asserted = json.dumps(TEMPLATE["Rules"]["SnapStartHasLimits"])
    assert "SearchEphemeralMB" in asserted
    assert "ProvisionedConcurrency" in asserted


def test_alarms_reach_somebody() -> None:
    alarms = of_type("AWS::CloudWatch::Alarm")
    assert len(alarms) >= 8
    manual = (ROOT / "docs/serverless.md").read_text()
    for name, alarm in alarms.items():
        assert alarm["AlarmActions"] == {"Fn::If": ["HasTopic", [{"Ref": "AlarmTopicArn"}], {"Ref": "AWS::NoValue"}]}
        assert name.removesuffix("Alarm") in manual, name


@pytest.mark.slow
@pytest.mark.parametrize("command", [["sam", "validate", "--lint"], ["cfn-lint", "template.yaml"]])
def test_the_validators_agree(command: list[str]) -> None:
    own = ROOT / "build/venv-sam/bin" / command[0]
    program = str(own) if own.exists() else shutil.which(command[0])
    if program is None:
        pytest.skip(f"{command[0]} is not installed (make sam-validate sets it up; package aws-sam-cli or cfn-lint)")
    environment = {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "SAM_CLI_TELEMETRY": "0", "AWS_DEFAULT_REGION": "eu-west-1"}
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
    checked = subprocess.run([program, *command[1:]], cwd=ROOT, env=environment | keys, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr
