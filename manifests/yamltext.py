"""Objects as readable YAML: multi-line strings as blocks, lists of numbers on one line, no aliases.

Strings that Go's YAML (in kubectl and Helm) would read as a number or boolean are quoted. PyYAML alone would not quote
`0123456789` or a digest such as `12e456789012`, and the API server rejects them where it expects a string.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

GO_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9_]*|0[xX][0-9a-fA-F_]+|0[oO]?[0-7_]+|0b[01_]+)")
GO_FLOAT = re.compile(
    r"[-+]?(\.[0-9_]+|[0-9][0-9_]*(\.[0-9_]*)?([eE][-+]?[0-9]+)?)|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
)
GO_BOOLEAN = re.compile(r"y|Y|yes|Yes|YES|n|N|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF")


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: object) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    ambiguous = any(pattern.fullmatch(text) for pattern in (GO_INTEGER, GO_FLOAT, GO_BOOLEAN))
    style = "|" if "\n" in text else "'" if ambiguous else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


def _list(dumper: yaml.SafeDumper, items: list[object]) -> yaml.SequenceNode:
    numbers = bool(items) and all(isinstance(item, int) for item in items)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=numbers)


_Dumper.add_representer(str, _text)
_Dumper.add_representer(list, _list)


def to_yaml(value: Any) -> str:
    """One document."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def to_manifest(objects: list[Any]) -> str:
    """One document per object."""
    return yaml.dump_all(objects, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
