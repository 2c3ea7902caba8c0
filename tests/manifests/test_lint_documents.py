"""How the linter reads a text: lines, numbers, keys and texts like the cluster; one line for what is not a manifest."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from lint_manifests import ELASTIC, rules_of

from manifests.lint.check import lint
from manifests.lint.documents import Unreadable, read
from manifests.yamltext import to_manifest


def test_a_finding_has_the_line_of_its_value():
    (finding,) = [f for f in lint({"dir/elastic.yaml": ELASTIC}).findings if f.rule == "image-tag"]
    assert (finding.source, finding.line) == ("dir/elastic.yaml", 19)
    assert ELASTIC.splitlines()[finding.line - 1].strip() == "image: example/imagenet:latest"
    assert finding.path == "spec.pytorchReplicaSpecs.Worker.template.spec.containers[0].image"
    assert finding.object == "PyTorchJob/elastic"


def test_lines_are_right_in_later_documents_and_in_lists():
    inside = textwrap.indent(ELASTIC, "  ").replace("  apiVersion", "- apiVersion", 1)
    wrapped = f"# first\n---\napiVersion: v1\nkind: List\nitems:\n{inside}"
    result = lint({"list": wrapped})
    (finding,) = [f for f in result.findings if f.rule == "image-tag"]
    assert wrapped.splitlines()[finding.line - 1].strip() == "image: example/imagenet:latest"
    assert finding.path.startswith("spec.pytorchReplicaSpecs"), "the path is within the object"
    assert rules_of(result) == rules_of(lint({"elastic": ELASTIC}))


def test_json_is_yaml():
    assert rules_of(lint({"x": json.dumps(yaml.safe_load(ELASTIC))})) == rules_of(lint({"x": ELASTIC}))


def test_a_key_that_is_written_twice_is_found_at_the_one_that_counts():
    twice = ELASTIC.replace("    maxReplicas: 3\n", "    maxReplicas: 3\n    minReplicas: 2\n")
    (finding,) = [f for f in lint({"x": twice}).findings if f.rule == "duplicate-key"]
    assert (finding.path, finding.line) == ("spec.elasticPolicy.minReplicas", 9)
    merged = ELASTIC.replace("spec:\n", "spec: &a\n  x: {y: {<<: {b: 1}, b: 2}}\n", 1)
    assert "duplicate-key" not in rules_of(lint({"x": merged})), "a merge may be overridden"


def test_numbers_are_read_as_the_cluster_reads_them():
    """The results of kubectl 1.34 were observed; PyYAML alone differs in half of them."""
    denied = [
        "yes",
        "y",
        "Off",
        "0x10",
        "0o17",
        "017",
        "0b11",
        "1e3",
        "1_000",
        "1.",
        ".5",
        "1.5_0",
        "+1",
        "-08",
        "0123456789",
    ]
    accepted = ["2020-01-01", "1:20", "~", '"8"', "8x", "nope", "1.2.3"]
    for value in denied + accepted:
        env = f"            env: [{{name: A, value: {value}}}]\n            image"
        found = rules_of(lint({"x": ELASTIC.replace("            image", env)}))
        assert ("not-a-string" in found) == (value in denied), value


@given(
    st.from_regex(r"[-+]?[0-9a-f_.]{1,12}", fullmatch=True) | st.sampled_from(["y", "No", "12e456789012", "0129", ""])
)
def test_what_we_write_as_a_text_is_one_for_the_cluster(value):
    """Digests are such texts; PyYAML's own dumper does not quote some of them."""
    (document,) = read(to_manifest([{"apiVersion": "v1", "kind": "ConfigMap", "data": {"a": value}}]), "x")
    assert document.value["data"] == {"a": value}


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ("a: [1\n", "x.yaml:2: not readable as YAML"),
        ("kind: {{ .Values.kind }}\n", "it is a template: render it first"),
        ("spec: {}\n", "x.yaml:1: not a Kubernetes object"),
        ("---\n- a\n", "x.yaml:2: not a Kubernetes object"),
        ("kind: A\napiVersion: v1\nmetadata: {name: !!python/object:os.system x}\n", "not readable as YAML"),
        ("[" * 500, "not readable as YAML"),
        ("kind: A\napiVersion: v1\nn: " + "1" * 5000, "not readable as YAML"),
    ],
)
def test_what_is_no_manifest_is_told_in_one_line(broken, said):
    with pytest.raises(Unreadable) as error:
        lint({"x.yaml": broken})
    assert said in str(error.value) and "\n" not in str(error.value)


def test_aliases_of_aliases_take_no_time():
    """Nine levels of nine: 387 million values when written out."""
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
    bomb = "apiVersion: kubeflow.org/v1\nkind: PyTorchJob\nmetadata: {name: a}\nspec:\n  " + "\n  ".join(levels)
    assert "unknown-field" in rules_of(lint({"x": bomb}))


@pytest.mark.parametrize("level", ["[", "{a: ", "- "])
def test_levels_without_end_are_refused(level: str):
    with pytest.raises(Unreadable, match="recursion"):
        lint({"x": level * 200_000})


def test_without_libyaml_all_is_read_too():
    program = """
import sys
sys.modules["yaml.cyaml"] = None
from manifests.lint.documents import read
print([(d.value["kind"], d.line(("spec",))) for d in read("apiVersion: v1\\nkind: Pod\\nspec: {a: 012}", "x")])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "[('Pod', 3)]\n", done.stderr
