"""`yaongi lint` as a command: exit codes, formats, what it explains."""

import io
import json
import sys

import pytest

from manifests.lint.registry import RULES
from manifests.render import job_objects
from manifests.spec import job_from
from manifests.yamltext import to_manifest
from pipelines import cli


@pytest.fixture
def lint(monkeypatch, capsys, tmp_path):
    """Runs `yaongi lint` in an empty folder with a text on stdin; returns exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: str, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["yaongi", "lint", *arguments])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        output = capsys.readouterr()
        return code, output.out, output.err

    return run


CLEAN = to_manifest(job_objects(job_from({"preset": "tiny"}))[-1:])
WARNED = CLEAN.replace("automountServiceAccountToken: false", "automountServiceAccountToken: true")
BROKEN = CLEAN.replace("cleanPodPolicy: Running", "cleanPodPolicy: None")


def test_a_clean_manifest_is_told_so(lint):
    assert lint("-", stdin=CLEAN) == (0, "1 job checked: clean\n", "")


def test_errors_end_with_1_and_say_where_why_and_how_to_mend(lint, tmp_path):
    (tmp_path / "job.yaml").write_text(BROKEN)
    code, out, _ = lint("job.yaml")
    line = BROKEN.splitlines().index("    cleanPodPolicy: None") + 1
    assert code == 1
    assert out.startswith(f"job.yaml:{line}: error clean-pod-policy: cleanPodPolicy None, 2 pods (PyTorchJob/")
    assert "    why: " in out and "    fix: Write runPolicy.cleanPodPolicy: Running.\n" in out
    assert out.endswith("1 job checked: 1 error, 0 warnings\n")


def test_warnings_alone_end_with_0(lint):
    code, out, _ = lint("-", stdin=WARNED)
    assert code == 0
    assert "warning service-account-token" in out and "0 errors, 1 warning" in out


def test_several_files_are_one_input_and_the_reason_is_given_once(lint, tmp_path):
    for name in ("a.yaml", "b.yaml"):
        (tmp_path / name).write_text(BROKEN)
    code, out, _ = lint("a.yaml", "b.yaml")
    assert code == 1
    assert out.count("error clean-pod-policy") == 2 and out.count("why: ") == 1


def test_json_has_what_the_text_says(lint):
    code, out, _ = lint("-", "--format", "json", stdin=BROKEN)
    told = json.loads(out)
    assert code == 1
    assert (told["objects"], told["jobs"], told["errors"]) == (1, 1, 1)
    (finding,) = told["findings"]
    assert finding["rule"] == "clean-pod-policy" and finding["severity"] == "error"
    assert finding["source"] == "-" and finding["path"] == "spec.runPolicy.cleanPodPolicy"
    assert finding["why"] == RULES["clean-pod-policy"].why


def test_other_kinds_alone_are_told(lint):
    code, out, _ = lint("-", stdin="apiVersion: v1\nkind: ConfigMap\nmetadata: {name: a}\n")
    assert (code, out) == (0, "no PyTorchJob, TrainJob or training runtime among 1 objects\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["absent.yaml"], "absent.yaml: cannot be read (No such file or directory)"),
        (["."], ".: is a folder; name the files in it, ./*.yaml"),
        ([], "no FILE to check; name manifests, or - for stdin"),
        (["-"], "-:1: not a Kubernetes object (apiVersion and kind are missing)"),
        (["-", "--trainer-version", "3"], "--trainer-version 3 is not one of 2.0, 2.1, 2.2, 2.3"),
        (["--explain", "no-rendezvouz"], "there is no rule 'no-rendezvouz'; did you mean 'no-rendezvous'?"),
    ],
)
def test_what_cannot_be_checked_ends_with_2_and_one_line(lint, arguments, said):
    assert lint(*arguments, stdin="a: 1\n") == (2, "", f"error: {said}\n")


def test_bytes_are_no_manifest(lint, tmp_path):
    (tmp_path / "image.png").write_bytes(b"\x89PNG\r\n")
    code, _, error = lint("image.png")
    assert code == 2 and "is not UTF-8 text" in error


def test_rules_are_listed_and_explained(lint):
    code, listed, _ = lint("--rules")
    assert code == 0
    assert all(f" {rule}\n" in listed for rule in RULES)
    code, one, _ = lint("--explain", "rdzv-conf-empty")
    rule = RULES["rdzv-conf-empty"]
    assert (code, one) == (0, f"error rdzv-conf-empty\n    why: {rule.why}\n    fix: {rule.fix}\n")
