"""IAM, as far as our templates use it: CloudFormation's references resolved, statements evaluated, an explicit Deny before any Allow.

Not here: permission boundaries, service control policies, KMS and the account's own settings, which a template cannot see.
Sources: docs.aws.amazon.com/IAM, "Policy evaluation logic" and "IAM JSON policy elements".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from cloudformation import read_template

LIBRARY = {"AWS::Partition": "aws", "AWS::Region": "r", "AWS::AccountId": "1", "AWS::StackName": "s", "AWS::URLSuffix": "amazonaws.com"}
ARNS = {
    "AWS::S3::Bucket": "arn:aws:s3:::{name}",
    "AWS::Serverless::Function": "arn:aws:lambda:r:1:function:{name}",
    "AWS::Serverless::StateMachine": "arn:aws:states:r:1:stateMachine:{name}",
    "AWS::Logs::LogGroup": "arn:aws:logs:r:1:log-group:{name}:*",
    "AWS::IAM::Role": "arn:aws:iam::1:role/{name}",
}


class Stack:
    """A template whose references are resolved with `parameters`; an Fn::If takes the branch that has more in it."""

    def __init__(self, path: Path, parameters: Mapping[str, str]) -> None:
        template = read_template(path)
        self.resources: dict[str, dict[str, Any]] = template["Resources"]
        defaults = {name: str(found.get("Default", name)) for name, found in template.get("Parameters", {}).items()}
        self.values = {**LIBRARY, **defaults, **parameters}
        self._statements: dict[str, list[dict[str, Any]]] = {}

    def arn(self, name: str) -> str:
        return ARNS.get(self.resources[name]["Type"], "arn:aws:other:::{name}").format(name=name)

    def resolved(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self.resolved(one) for one in value]
        if not isinstance(value, dict):
            return value
        if "Ref" in value:
            return self._named(value["Ref"])
        if "Fn::Sub" in value:
            return re.sub(r"\$\{([\w:.]+)\}", lambda found: self._named(found[1]), value["Fn::Sub"])
        if "Fn::GetAtt" in value:
            asked = value["Fn::GetAtt"]
            return self._named(asked if isinstance(asked, str) else ".".join(asked))
        if "Fn::If" in value:
            return self.resolved(value["Fn::If"][1])
        return {key: self.resolved(one) for key, one in value.items()}

    def _named(self, name: str) -> str:
        if name in self.values:
            return self.values[name]
        resource, _, attribute = name.partition(".")
        if resource not in self.resources:
            raise KeyError(name)  # a reference that this file cannot resolve must not pass for a harmless text
        return self.arn(resource) if attribute.endswith("Arn") or attribute == "Alias" else resource

    def of_type(self, kind: str) -> dict[str, dict[str, Any]]:
        return {name: resource.get("Properties", {}) for name, resource in self.resources.items() if resource["Type"] == kind}

    def statements(self, role: str) -> list[dict[str, Any]]:
        """Those of a role's own policies."""
        return self._known(role, self.resources[role]["Properties"].get("Policies", ()))

    def bucket_statements(self) -> list[dict[str, Any]]:
        return self._known("", self.of_type("AWS::S3::BucketPolicy").values())

    def _known(self, name: str, policies: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        if name not in self._statements:
            self._statements[name] = [one for policy in policies for one in self.resolved(policy["PolicyDocument"]["Statement"])]
        return self._statements[name]

    def may(self, role: str, action: str, resource: str, **context: str) -> bool:
        """Whether a role may; the bucket's policy is part of the answer. `context` has a request's condition keys, '_' for ':' and '__' for '-'."""
        keys = {key.replace("__", "-").replace("_", ":", 1): value for key, value in {"aws_SecureTransport": "true", **context}.items()}
        own = [one for one in self.statements(role) if applies(one, action, resource, keys)]
        of_bucket = [one for one in self.bucket_statements() if applies(one, action, resource, keys)]
        if any(one["Effect"] == "Deny" for one in own + of_bucket):
            return False
        return any(one["Effect"] == "Allow" for one in own + of_bucket)


def listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def matches(pattern: str, text: str, *, ignores_case: bool = False) -> bool:
    """IAM's wildcards: * any characters, slashes and colons too; ? one."""
    return _compiled(pattern, ignores_case).fullmatch(text) is not None


@cache
def _compiled(pattern: str, ignores_case: bool) -> re.Pattern[str]:
    expression = "".join(".*" if c == "*" else "." if c == "?" else re.escape(c) for c in pattern)
    return re.compile(expression, re.DOTALL | (re.IGNORECASE if ignores_case else 0))


def applies(statement: Mapping[str, Any], action: str, resource: str, keys: Mapping[str, str]) -> bool:
    """Whether a statement is about this request. Elements that our templates do not use are an error, not a guess."""
    unknown = set(statement) - {"Sid", "Effect", "Principal", "Action", "NotAction", "Resource", "NotResource", "Condition"}
    if unknown:
        raise ValueError(f"elements that are not evaluated: {unknown}")
    if "NotAction" in statement:
        acts = not any(matches(one, action, ignores_case=True) for one in listed(statement["NotAction"]))
    else:
        acts = any(matches(one, action, ignores_case=True) for one in listed(statement["Action"]))
    if "NotResource" in statement:
        covers = not any(matches(one, resource) for one in listed(statement["NotResource"]))
    else:
        covers = any(matches(one, resource) for one in listed(statement["Resource"]))
    return acts and covers and all(_holds(kind, tests, keys) for kind, tests in statement.get("Condition", {}).items())


def _holds(kind: str, tests: Mapping[str, Any], keys: Mapping[str, str]) -> bool:
    for key, wanted in tests.items():
        value = keys.get(key)
        if kind == "Null":
            found = (value is None) == (str(wanted).lower() == "true")
        elif value is None:
            found = False  # a positive operator fails for a key that the request does not have
        elif kind in ("StringEquals", "ArnEquals"):
            found = value in listed(wanted)
        elif kind in ("StringLike", "ArnLike"):
            found = any(matches(one, value) for one in listed(wanted))
        elif kind == "Bool":
            found = value == str(wanted).lower()
        else:
            raise ValueError(f"a condition that is not evaluated: {kind}")
        if not found:
            return False
    return True
