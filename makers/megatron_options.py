"""The options of a Megatron-LM release as data: `python makers/megatron_options.py arguments.py NAME > FILE`.

Reads megatron/training/arguments.py of that release without running it, and prints for each option its type, choices
and number of values. trainer/megatron/options-core_v0.12.3.json was made by it; our arguments are held against that.
"""

from __future__ import annotations

import ast
import json
import sys
from typing import Any


def _constants(node: ast.expr) -> list[Any] | None:
    """The constants in a list; None for anything else."""
    if not isinstance(node, ast.List) or not all(isinstance(each, ast.Constant) for each in node.elts):
        return None
    return [each.value for each in node.elts if isinstance(each, ast.Constant)]


def option(call: ast.Call) -> tuple[list[str], dict[str, Any]]:
    """The names of the option that a call of add_argument adds, and what it takes."""
    names = [each.value for each in call.args if isinstance(each, ast.Constant) and isinstance(each.value, str)]
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    action = given.get("action")
    if isinstance(action, ast.Constant) and str(action.value).startswith("store_"):
        return names, {"takes": "nothing"}
    kind = given.get("type")
    # A function of its own parses the text.
    found: dict[str, Any] = {"takes": kind.id if isinstance(kind, ast.Name) and kind.id in ("int", "float") else "str"}
    if "choices" in given and (choices := _constants(given["choices"])) is not None:
        found["choices"] = choices
    if "nargs" in given:
        found["values"] = ast.literal_eval(given["nargs"])
    return names, found


def options(source: str) -> dict[str, dict[str, Any]]:
    found = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument":
            names, what = option(node)
            found |= {name: what for name in names if name.startswith("--")}
    return dict(sorted(found.items()))


def main() -> None:
    file, release = sys.argv[1:]
    with open(file, encoding="utf-8") as stream:
        found = options(stream.read())
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(what)}" for name, what in found.items())
    print(f'{{\n "release": {json.dumps(release)},\n "options": {{\n{lines}\n }}\n}}')


if __name__ == "__main__":
    main()
