"""CloudFormation's YAML as plain data, for the tests of the templates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """YAML with the short forms spelt out: !Ref x becomes {"Ref": "x"}, others {"Fn::Name": ...}."""


def _short_form(loader: _Loader, suffix: str, node: yaml.Node) -> dict[str, Any]:
    name = suffix if suffix in ("Ref", "Condition") else f"Fn::{suffix}"
    if isinstance(node, yaml.ScalarNode):
        return {name: loader.construct_scalar(node)}
    if isinstance(node, yaml.SequenceNode):
        return {name: loader.construct_sequence(node, deep=True)}
    return {name: loader.construct_mapping(node, deep=True)}  # type: ignore[arg-type]


_Loader.add_multi_constructor("!", _short_form)


def read_template(path: Path) -> dict[str, Any]:
    """A template, its references not resolved."""
    found: dict[str, Any] = yaml.load(path.read_text(), _Loader)
    return found
