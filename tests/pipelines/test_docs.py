"""What READMEs, docs and runbooks name exists: files, verbs and their options, make targets, fields of a job."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
from pydantic import BaseModel
from typer.main import get_command

import pipelines
from manifests.spec import JobSpec, JobTrainSpec
from pipelines.cli import app

ROOT = Path(pipelines.__file__).parents[1]
PAGES = sorted([*ROOT.glob("README*.md"), *ROOT.glob("charts/*/README.md"), *ROOT.glob("docs/**/*.md")])
NOTES = ROOT / "charts" / "yaongi" / "templates" / "NOTES.txt"

every_page = pytest.mark.parametrize("page", [*PAGES, NOTES], ids=lambda page: str(page.relative_to(ROOT)))


def shown(page: Path) -> list[str]:
    """Code of a page: spans, and each line of a block that is indented or fenced, without its comment."""
    found, fenced = [], False
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            found.append(re.sub(r"(^|\s)#.*", "", line))
        else:
            found += re.findall(r"`([^`]+)`", line)
    return found


def commands(page: Path) -> list[list[str]]:
    """Words of each `yaongi …` of a page's code, up to a pipe."""
    return [match[1].split() for code in shown(page) for match in re.finditer(r"\byaongi ([a-z][^|)]*)", code)]


def verb(words: list[str]) -> Any:
    """The Typer command that the words begin with; None if there is none."""
    found: Any = get_command(app)
    for word in words:
        if not hasattr(found, "commands"):
            break
        found = found.commands.get(word)
    return found


def options(command: Any) -> set[str]:
    return {name for parameter in command.params for name in parameter.opts + parameter.secondary_opts} | {"--help"}


def test_there_are_pages_with_commands() -> None:
    assert len(PAGES) > 20 and sum(len(commands(page)) for page in PAGES) > 50


@every_page
def test_linked_files_exist(page: Path) -> None:
    targets = re.findall(r"\]\(([^)\s#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    files = [target for target in targets if not re.match(r"[a-z]+:", target)]
    assert [file for file in files if not (page.parent / file).exists()] == []


def anchors(page: Path) -> list[str]:
    """GitHub's anchor of each heading: lower case, without punctuation, - for a space."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


@every_page
def test_linked_headings_exist(page: Path) -> None:
    targets = re.findall(r"\]\(([^)\s#:]*)#([^)\s]+)\)", page.read_text(encoding="utf-8"))
    there = {file: anchors(page.parent / file if file else page) for file, _ in targets}
    assert [anchor for file, anchor in targets if anchor not in there[file]] == []


def test_the_index_of_decisions_has_each_once_with_a_status() -> None:
    page = ROOT / "docs" / "decisions.md"
    text = page.read_text(encoding="utf-8")
    entries = re.findall(r"^- \[(.+?)\]\(#(\S+)\): (in force|superseded by|negative result|measurement)", text, re.M)
    titles = [title for title in re.findall(r"^## (.+)$", text, re.M) if title != "Index"]
    assert sorted(title for title, *_ in entries) == sorted(titles)
    assert sorted(anchor for _, anchor, _ in entries) == sorted(set(anchors(page)) - {"decisions", "index"})


@every_page
def test_verbs_and_their_options_exist(page: Path) -> None:
    for words in commands(page):
        if words[0] == "charts/yaongi":  # helm install yaongi charts/yaongi
            continue
        found = verb(words)
        assert found is not None, f"yaongi {' '.join(words)}"
        named = {re.split("[=,]", word)[0] for word in words if re.match("--?[a-z]", word)}
        assert named <= options(found), f"yaongi {' '.join(words)}"


@pytest.mark.parametrize("page", ["README.md", "README.ko.md"])
def test_options_in_the_table_of_commands_are_those_of_its_verbs(page: str) -> None:
    rows = re.findall(r"^\| (`yaongi .*?`) \| (.*) \|$", (ROOT / page).read_text(encoding="utf-8"), re.M)
    assert len(rows) >= 14
    for names, text in rows:
        verbs = [verb(words.split()) for words in re.findall(r"`yaongi ([^`]*)`", names)]
        known = set().union(*(options(found) for found in verbs if found))
        assert None not in verbs and set(re.findall(r"`(--?[a-z][a-z0-9-]*)", text)) <= known, names


@every_page
def test_make_targets_programs_and_manifests_exist(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for code in shown(page):
        for target in re.findall(r"\bmake ([a-z][a-z0-9-]*)", code):
            assert re.search(rf"^{target}:", makefile, re.M), code
        for module in re.findall(r"python -m ([a-z_.]+)", code):
            file = ROOT / module.replace(".", "/")
            assert file.with_suffix(".py").exists() or (file / "__main__.py").exists(), code
        for path in re.findall(
            r"(?<![\w/.])(?:benchmarks|makers|manifests|pipelines|components|charts|docs|tests)/[\w./-]+", code
        ):
            assert (ROOT / path).exists() or path.endswith("/"), code


def inside(kind: Any, name: str) -> list[Any]:
    """Types of a field within a type; within a table with free keys every name is one."""
    if get_origin(kind) is dict:
        return [get_args(kind)[1]]
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return [kind.model_fields[name].annotation] if name in kind.model_fields else []
    return [found for option in get_args(kind) for found in inside(option, name)]


def is_field(path: str) -> bool:
    kinds: list[Any] = [JobSpec]
    for name in path.split("."):
        kinds = [found for kind in kinds for found in inside(kind, name)]
    return bool(kinds)


def test_what_a_field_is() -> None:
    assert is_field("train.optimizer.spike_guard.sigmas") and is_field("data.sources.ko.weight")
    assert is_field("data.sources.ko.origin.revision") and is_field("train.model.mtp.depth")
    assert not is_field("train.optimiser") and not is_field("train.steps.more") and not is_field("data.sources.ko.wait")


@pytest.mark.parametrize(
    "page", [page for page in PAGES if "charts" not in page.parts], ids=lambda page: str(page.relative_to(ROOT))
)
def test_fields_of_a_job_exist(page: Path) -> None:
    # Those of `train` too: without their prefix they are none. `name` and `engine` have no fields.
    sections = "|".join((JobSpec.model_fields.keys() | JobTrainSpec.model_fields.keys()) - {"name", "engine"})
    for code in shown(page):
        for path in re.findall(rf"(?<![\w./*-])((?:{sections})\.[a-z_0-9.]+)(?![\w*])", code):
            is_file = path.rpartition(".")[2] in ("md", "py", "png", "yaml", "json", "jsonl", "onnx", "data")
            assert is_file or is_field(path.rstrip(".")), f"{path} in {code}"
