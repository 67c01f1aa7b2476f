"""What each role of template.yaml and infra/ecs.yaml can do to each kind of object, and that it can do nothing else anywhere.

test_template.py holds that every role has what its code needs; here the whole matrix of roles and object kinds is written down, and
everything around it (the bucket itself, other services, other prefixes, who may take a role) is denied.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.format import names
from security.policies import Stack, applies, listed, matches

ROOT = Path(__file__).resolve().parents[2]
SAM = Stack(ROOT / "template.yaml", {"Prefix": "indices", "InputPrefix": "inputs"})
ECS = Stack(ROOT / "infra/ecs.yaml", {"Bucket": "Bucket", "Prefix": "indices", "ApiKeysSecretArn": "arn:aws:secretsmanager:r:1:secret:keys"})
BUCKET = "arn:aws:s3:::Bucket"
ID = "01KATR0000000000000000000A"
KINDS = {
    "current": names.current("x"),
    "manifest": names.manifest("x", ID, 3),
    "codec": names.codec("x", ID),
    "segment": names.segment("x", ID),
    "metadata": names.metadata("x", ID),
    "tombstones": names.tombstones("x", ID),
    "patch": names.patch("x", ID),
    "pin": names.pin("x", "p"),
    "branch": names.branch("x", "y"),
    "sweep": names.sweep("x", ID),
    "build": names.build("x", "b", 0),
    "upload": names.upload("x", ID, "data"),
    "claim": names.upload("x", ID, "claim"),
    "receipt": names.upload("x", ID, "receipt"),
    "answer": names.download("x", ID),
    "alias": names.alias("live"),
    "record": names.record("backups", "x", ID),
}
"""One object of each kind, below the prefix of the indices."""
ALL = frozenset(KINDS)
_COMMIT = frozenset(("current", "manifest", "segment", "metadata", "tombstones"))
WRITES: dict[str, frozenset[str]] = {
    "SearchRole": frozenset(("answer",)),
    "ShardRole": frozenset(),
    "CoordinateRole": frozenset(),
    "WriterRole": ALL,
    "EncoderRole": _COMMIT | {"answer"},
    "BuildRole": _COMMIT | {"codec", "build"},
    "MaintainRole": ALL,
    "ECS ReaderRole": frozenset(),
    "ECS WriterRole": ALL,
}
DELETES: dict[str, frozenset[str]] = {
    **dict.fromkeys(("SearchRole", "ShardRole", "CoordinateRole", "EncoderRole", "ECS ReaderRole"), frozenset()),
    **dict.fromkeys(("WriterRole", "MaintainRole", "ECS WriterRole"), ALL - {"current"}),
    "BuildRole": frozenset(("build",)),
}
ROLES = sorted(WRITES)
BESIDE = {
    "inputs": f"{BUCKET}/inputs/p.jsonl",
    "models": f"{BUCKET}/models/m/model.onnx",
    "another prefix": f"{BUCKET}/other/x/CURRENT",
    "a prefix that begins alike": f"{BUCKET}/indices-2/x/CURRENT",
    "the root": f"{BUCKET}/CURRENT",
    "another bucket": "arn:aws:s3:::another/indices/x/CURRENT",
    "a bucket that begins alike": "arn:aws:s3:::Bucket-2/indices/x/CURRENT",
}
READS_BESIDE = {"BuildRole": {"inputs"}, "EncoderRole": {"models"}}
NEVER_ON_OBJECTS = (
    "s3:DeleteObjectVersion", "s3:GetObjectVersion", "s3:RestoreObject", "s3:PutObjectAcl", "s3:GetObjectAcl", "s3:PutObjectRetention", "s3:BypassGovernanceRetention",
    "s3:PutObjectLegalHold", "s3:PutObjectTagging", "s3:ReplicateObject", "s3:ObjectOwnerOverrideToBucketOwner", "s3:AbortMultipartUpload",
)  # fmt: skip
NEVER_ON_THE_BUCKET = (
    "s3:PutBucketPolicy", "s3:DeleteBucketPolicy", "s3:GetBucketPolicy", "s3:PutBucketAcl", "s3:PutBucketVersioning", "s3:PutLifecycleConfiguration", "s3:DeleteBucket",
    "s3:PutBucketPublicAccessBlock", "s3:PutEncryptionConfiguration", "s3:PutBucketNotification", "s3:PutReplicationConfiguration", "s3:PutBucketLogging",
    "s3:ListBucketVersions", "s3:PutBucketCORS", "s3:PutBucketWebsite",
)  # fmt: skip
NEVER_ANYWHERE = (
    "iam:PassRole", "iam:CreateAccessKey", "iam:AttachRolePolicy", "iam:PutRolePolicy", "sts:AssumeRole", "kms:Decrypt", "secretsmanager:GetSecretValue", "ssm:GetParameter",
    "lambda:UpdateFunctionCode", "lambda:UpdateFunctionConfiguration", "lambda:AddPermission", "lambda:CreateFunction", "states:UpdateStateMachine", "states:DeleteStateMachine",
    "ec2:RunInstances", "s3:ListAllMyBuckets", "s3:CreateBucket", "logs:DeleteLogGroup", "logs:PutRetentionPolicy", "logs:GetLogEvents", "logs:FilterLogEvents",
    "cloudformation:UpdateStack", "ecs:RunTask", "ecs:ExecuteCommand", "ecr:PutImage",
)  # fmt: skip
STARS = {
    ("SearchMachineRole", "logs:CreateLogDelivery"),
    ("SearchMachineRole", "logs:GetLogDelivery"),
    ("SearchMachineRole", "logs:UpdateLogDelivery"),
    ("SearchMachineRole", "logs:DeleteLogDelivery"),
    ("SearchMachineRole", "logs:ListLogDeliveries"),
    ("SearchMachineRole", "logs:PutResourcePolicy"),
    ("SearchMachineRole", "logs:DescribeResourcePolicies"),
    ("SearchMachineRole", "logs:DescribeLogGroups"),
}
"""(role, action) allowed on every resource: what Step Functions asks for to write an Express machine's log."""
MANAGED = {"AWSXRayDaemonWriteAccess", "service-role/AmazonECSTaskExecutionRolePolicy", "service-role/AWSLambdaBasicExecutionRole"}
"""AWS's own policies that a role may carry: none of them reads or writes data."""


def stack_of(role: str) -> tuple[Stack, str]:
    return (ECS, role.removeprefix("ECS ")) if role.startswith("ECS ") else (SAM, role)


def test_every_role_is_in_the_table() -> None:
    with_data = {role for role in SAM.of_type("AWS::IAM::Role") if "Machine" not in role}
    assert with_data | {f"ECS {role}" for role in ECS.of_type("AWS::IAM::Role") if role != "ExecutionRole"} == set(WRITES) == set(DELETES)


def test_every_kind_of_object_is_in_the_table() -> None:
    """A function of names.py that spells another kind of object is put into KINDS, and someone decides which roles may write it."""
    import inspect

    spellers = {name for name, function in inspect.getmembers(names, inspect.isfunction) if not name.startswith(("is_", "_", "fresh_"))}
    of_folders = {"manifests", "segments", "pins", "branches", "sweeps", "builds", "uploads", "aliases", "records", "of_index", "generation_of"}
    assert spellers - of_folders == ALL - {"claim", "receipt", "answer"} | {"download"}


@pytest.mark.parametrize("role", ROLES)
def test_a_role_reads_writes_and_deletes_the_kinds_of_objects_that_it_should(role: str) -> None:
    stack, name = stack_of(role)
    for kind, path in KINDS.items():
        resource = f"{BUCKET}/indices/{path}"
        assert stack.may(name, "s3:GetObject", resource), kind
        assert stack.may(name, "s3:PutObject", resource, s3_if__match='"etag"') is (kind in WRITES[role]), kind
        assert stack.may(name, "s3:PutObject", resource, s3_if__none__match="*") is (kind in WRITES[role]), kind
        assert stack.may(name, "s3:PutObject", resource) is (kind in WRITES[role] - {"current"}), "CURRENT moves by compare-and-swap only"
        assert stack.may(name, "s3:DeleteObject", resource) is (kind in DELETES[role]), kind
        for action in ("s3:GetObject", "s3:PutObject", "s3:DeleteObject"):
            assert not stack.may(name, action, f"arn:aws:s3:::another/indices/{path}")


@pytest.mark.parametrize("role", ROLES)
def test_a_role_reaches_nothing_beside_its_prefix(role: str) -> None:
    stack, name = stack_of(role)
    for what, resource in BESIDE.items():
        assert stack.may(name, "s3:GetObject", resource) is (what in READS_BESIDE.get(role, ())), what
        assert not stack.may(name, "s3:PutObject", resource), what
        assert not stack.may(name, "s3:DeleteObject", resource), what
    lists = {"BuildRole": "inputs/", "EncoderRole": "models/"}
    assert stack.may(name, "s3:ListBucket", BUCKET, s3_prefix="indices/x/")
    for prefix in ("", "other/", "indices-2/", "inputs/", "models/"):
        assert stack.may(name, "s3:ListBucket", BUCKET, s3_prefix=prefix) is (prefix == lists.get(role)), prefix
    assert not stack.may(name, "s3:ListBucket", BUCKET)  # without a prefix it would be the whole bucket
    assert not stack.may(name, "s3:ListBucket", "arn:aws:s3:::another", s3_prefix="indices/x/")


@pytest.mark.parametrize("role", [*ROLES, "SearchMachineRole", "BuildMachineRole", "ECS ExecutionRole"])
def test_a_role_cannot_touch_old_versions_the_bucket_itself_or_other_services(role: str) -> None:
    stack, name = stack_of(role)
    for kind, path in KINDS.items():
        for action in NEVER_ON_OBJECTS:
            assert not stack.may(name, action, f"{BUCKET}/indices/{path}"), (action, kind)
    for action in NEVER_ON_THE_BUCKET:
        assert not stack.may(name, action, BUCKET), action
    places = {"*", BUCKET, f"{BUCKET}/*", "arn:aws:kms:r:1:key/k", "arn:aws:secretsmanager:r:1:secret:another", *map(stack.arn, stack.resources)}
    for action in NEVER_ANYWHERE:
        assert not [place for place in places if stack.may(name, action, place)], action


def test_without_tls_nobody_does_anything() -> None:
    for role in ("SearchRole", "WriterRole", "MaintainRole"):
        resource = f"{BUCKET}/indices/{KINDS['current']}"
        assert SAM.may(role, "s3:GetObject", resource)
        assert not SAM.may(role, "s3:GetObject", resource, aws_SecureTransport="false")


def test_the_table_says_what_the_roles_are_for() -> None:
    """The search side cannot change what is found, the encoder and the build cannot destroy, the writer cannot leave its prefix."""
    data = ALL - {"answer"}
    for role in ("SearchRole", "ShardRole", "CoordinateRole", "ECS ReaderRole"):
        assert not WRITES[role] & data
        assert not DELETES[role]
    for role in ("EncoderRole", "BuildRole"):
        assert not DELETES[role] & (ALL - {"build"})
        assert not WRITES[role] & {"alias", "pin", "patch", "record", "sweep"}


# Wildcards, and who may be what


def all_statements() -> list[tuple[str, dict[str, Any]]]:
    found = []
    for stack in (SAM, ECS):
        for role in stack.of_type("AWS::IAM::Role"):
            found += [(role, statement) for statement in stack.statements(role)]
    return found


def test_no_statement_allows_all_actions_and_only_named_ones_all_resources() -> None:
    for role, statement in all_statements():
        assert statement["Effect"] == "Allow" or listed(statement["Resource"])[0].endswith("/CURRENT"), "the only thing that is denied by name"
        assert not {"NotAction", "NotResource", "Principal"} & set(statement)
        for action in listed(statement["Action"]):
            assert "*" not in action and "?" not in action, (role, action)
            for resource in listed(statement["Resource"]):
                if resource == "*":
                    assert (role, action) in STARS
                else:
                    assert resource.startswith("arn:aws:") and not resource.startswith("arn:aws:s3:::*"), (role, resource)
                    assert resource.count(":") >= 5 and "*" not in resource.split(":", 5)[2], (role, resource)
    used = {(role, action) for role, statement in all_statements() for action in listed(statement["Action"]) if "*" in listed(statement["Resource"])}
    assert used == STARS  # the list has nothing that is not needed


def test_only_aws_services_take_the_roles_and_managed_policies_are_known() -> None:
    for stack in (SAM, ECS):
        for role, properties in stack.of_type("AWS::IAM::Role").items():
            for statement in properties["AssumeRolePolicyDocument"]["Statement"]:
                assert statement["Action"] == "sts:AssumeRole"
                assert list(statement["Principal"]) == ["Service"], role
                assert statement["Principal"]["Service"] in ("lambda.amazonaws.com", "states.amazonaws.com", "ecs-tasks.amazonaws.com"), role
            for managed in stack.resolved(properties.get("ManagedPolicyArns", [])):
                assert managed.partition(":policy/")[2] in MANAGED, (role, managed)


def test_functions_are_called_by_our_gateway_and_machines_only() -> None:
    for name, permission in SAM.of_type("AWS::Lambda::Permission").items():
        assert permission["Principal"] in ("apigateway.amazonaws.com", "events.amazonaws.com", "scheduler.amazonaws.com"), name
        assert "SourceArn" in permission, name
    for name, function in SAM.of_type("AWS::Serverless::Function").items():
        assert "FunctionUrlConfig" not in function, name
        assert "Policies" not in function, f"{name}: the role in the template is all that it has"
    assert not SAM.of_type("AWS::Lambda::Url")


def test_a_machine_calls_its_own_functions_and_itself() -> None:
    functions = {name: SAM.arn(name) for name in SAM.of_type("AWS::Serverless::Function")}
    called = {role: {name for name, arn in functions.items() if SAM.may(role, "lambda:InvokeFunction", arn)} for role in SAM.of_type("AWS::IAM::Role")}
    assert {role: found for role, found in called.items() if found} == {
        "SearchMachineRole": {"ShardFunction", "CoordinateFunction"},
        "BuildMachineRole": {"BuildFunction"},
    }
    machine = "arn:aws:states:r:1:stateMachine:s-{}".format
    for role in SAM.of_type("AWS::IAM::Role"):
        starts = {(action, kind) for action in ("states:StartExecution", "states:StartSyncExecution") for kind in ("search", "build", "other") if SAM.may(role, action, machine(kind))}
        expected = {"SearchRole": {("states:StartSyncExecution", "search")}, "BuildMachineRole": {("states:StartExecution", "build")}}
        assert starts == expected.get(role, set()), role


def test_a_function_writes_its_own_log_and_no_other() -> None:
    logs = {name: SAM.arn(name).replace("*", "log-stream:x") for name in SAM.of_type("AWS::Logs::LogGroup")}
    for role in ROLES:
        if not role.startswith("ECS "):
            own = role.removesuffix("Role") + "Log"
            assert {name for name, arn in logs.items() if SAM.may(role, "logs:PutLogEvents", arn)} == {own}


def test_a_task_starts_with_one_secret_and_no_more() -> None:
    assert ECS.may("ExecutionRole", "secretsmanager:GetSecretValue", "arn:aws:secretsmanager:r:1:secret:keys")
    for role in ("ReaderRole", "WriterRole"):
        assert not ECS.may(role, "secretsmanager:GetSecretValue", "arn:aws:secretsmanager:r:1:secret:keys")
    for action in ("s3:GetObject", "s3:PutObject"):
        assert not ECS.may("ExecutionRole", action, f"{BUCKET}/indices/x/CURRENT")


# The evaluator


@pytest.mark.parametrize(
    ("pattern", "text", "expected"),
    [
        ("s3:Get*", "s3:GetObject", True),
        ("s3:Get?bject", "s3:GetObject", True),
        ("arn:aws:s3:::b/*/CURRENT", "arn:aws:s3:::b/x/y/CURRENT", True),
        ("arn:aws:s3:::b/*", "arn:aws:s3:::b", False),
        ("arn:aws:s3:::b/[x]", "arn:aws:s3:::b/x", False),
        ("arn:aws:s3:::b", "arn:aws:s3:::B", False),
    ],
)
def test_wildcards_are_iams_and_not_a_shells(pattern: str, text: str, expected: bool) -> None:
    assert matches(pattern, text) is expected


def test_statements_are_evaluated_as_iam_does() -> None:
    allow = {"Effect": "Allow", "Action": ["s3:get*"], "Resource": "arn:aws:s3:::b/*"}
    assert applies(allow, "s3:GetObject", "arn:aws:s3:::b/x", {})
    assert not applies(allow, "s3:PutObject", "arn:aws:s3:::b/x", {})
    assert applies({**allow, "Action": None, "NotAction": "s3:Put*"}, "s3:GetObject", "arn:aws:s3:::b/x", {})
    conditioned = {**allow, "Condition": {"StringLike": {"s3:prefix": ["a/*"]}, "Bool": {"aws:SecureTransport": "true"}}}
    assert applies(conditioned, "s3:GetObject", "arn:aws:s3:::b/x", {"s3:prefix": "a/b", "aws:SecureTransport": "true"})
    assert not applies(conditioned, "s3:GetObject", "arn:aws:s3:::b/x", {"s3:prefix": "a/b", "aws:SecureTransport": "false"})
    assert not applies(conditioned, "s3:GetObject", "arn:aws:s3:::b/x", {"aws:SecureTransport": "true"})
    assert applies({**allow, "Condition": {"Null": {"s3:if-match": "true"}}}, "s3:GetObject", "arn:aws:s3:::b/x", {})
    with pytest.raises(ValueError, match="not evaluated"):
        applies({**allow, "Condition": {"IpAddress": {"aws:SourceIp": "10.0.0.0/8"}}}, "s3:GetObject", "arn:aws:s3:::b/x", {"aws:SourceIp": "1"})
    with pytest.raises(KeyError):
        SAM.resolved({"Fn::Sub": "${Nothing.Arn}"})
