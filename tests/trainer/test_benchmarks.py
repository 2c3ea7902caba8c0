"""The benchmarks of an evaluation: what is measured, kept, shown and refused."""

from __future__ import annotations

import json
import os
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

from made_run import make_run
from own_tasks import TASKS, make_tasks, write_task

from trainer import evaluate, gate
from trainer.benchmarkspec import RUNS_CODE, SUITES, BenchmarksSpec
from trainer.errors import ForeseenError, LaunchError, SpecError
from trainer.evaluation import harness, measure, tasks
from trainer.evaluation.scores import limited, rows
from trainer.export import model_card
from trainer.report.run import read_run


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The folder with the rows of the own tasks, and their folder."""
    place = tmp_path_factory.mktemp("tasks")
    with pytest.MonkeyPatch.context() as patch:
        import datasets

        patch.setattr(datasets.config, "HF_DATASETS_CACHE", place / "cache")
        yield place, make_tasks(place)


ASKS = """
import os

def results(doc, made):
    return {"allowed": float(os.environ.get("HF_ALLOW_CODE_EVAL") == "1")}
"""


def index_with(monkeypatch: pytest.MonkeyPatch, manager: Any) -> None:
    for module in (tasks, harness):
        monkeypatch.setattr(module, "manager", manager)


@pytest.fixture
def own(place, monkeypatch):
    """A run with one checkpoint, and its benchmarks: only own tasks, as the index of all takes seconds."""
    from lm_eval.tasks import TaskManager

    index_with(monkeypatch, lambda folder: TaskManager(include_path=folder, include_defaults=False))

    def make(directory: Path, *tasks: Any, **more: Any) -> Any:
        evaluate = {"max_tokens": 50, "tasks": list(tasks), "task_files": str(place[1]), **more}
        return make_run(directory, evaluate=evaluate, tokens={"seq_len": 64})[0]

    return make


def test_an_evaluation_measures_keeps_and_shows_benchmarks(own, tmp_path, monkeypatch, caplog):
    kept = []

    class Kept(measure.Metrics):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            kept.append(self.registry)

        def close(self) -> None:
            super().close()
            events.append("closed")

    monkeypatch.setattr(measure, "Metrics", Kept)
    events, write = list[str](), gate.write
    monkeypatch.setattr(gate, "write", lambda *given: (events.append("written"), write(*given)))
    spec = own(tmp_path, {"task": "own_choice", "num_fewshot": 2}, {"task": "own_rolling", "limit": 3})
    result = evaluate.run(spec)
    assert events == ["written", "closed"], "metrics are served to the end"
    choice, rolling = (result["benchmarks"][name] for name in ("own_choice", "own_rolling"))
    assert (choice["num_fewshot"], choice["samples"], choice["version"]) == (2, 8, 1.5)
    assert (rolling["num_fewshot"], rolling["samples"]) == (0, 3)
    acc = choice["metrics"]["acc"]
    assert acc["stderr"] == pytest.approx((acc["value"] * (1 - acc["value"]) / 7) ** 0.5)
    assert rolling["metrics"]["bits_per_byte"]["value"] > 1
    assert (acc["higher_is_better"], rolling["metrics"]["bits_per_byte"]["higher_is_better"]) == (True, False)
    assert result["harness"]["version"] == version("lm-eval")
    labels = {"task": "own_choice", "metric": "acc"}
    assert kept[0].get_sample_value("yaongi_benchmark_score", labels) == acc["value"]
    page = (Path(spec.run_dir) / "report.html").read_text(encoding="utf-8")
    assert ">Benchmarks</h2>" in page and f"{acc['value']:.3f} ± {acc['stderr']:.3f}" in page
    said = "Only the first documents of tasks were used"
    assert said in page and said in model_card(read_run(spec.run_dir), manifest_of(result))
    run = read_numbers(spec)
    assert run["benchmark_own_choice_acc"] == acc["value"]

    # asked for one more, it measures only that one; for other examples, again
    measured = []
    monkeypatch.setattr(harness, "_measured", lambda spec, task, lm: measured.append(task.task) or {})
    more = ["own_writing", *(task.model_dump() for task in spec.evaluate.tasks)]
    again = evaluate.run(spec.updated({"evaluate": {"tasks": more}}))
    assert measured == ["own_writing"]
    assert again["benchmarks"] == result["benchmarks"]
    evaluate.run(spec.updated({"evaluate": {"tasks": ["own_choice"]}}))
    assert measured == ["own_writing", "own_choice"]


def test_a_limit_of_all_tasks_or_of_one_is_a_limit():
    assert limited({"settings": {"limit": 3}}) and limited({"settings": {"tasks": [{"task": "a"}, {"limit": 3}]}})
    assert not limited({"settings": {"tasks": [{"task": "a", "limit": None}]}}) and not limited({})


def manifest_of(evaluation: dict[str, Any]) -> dict[str, Any]:
    fields = {"name": "n", "parameters": 1, "step": 1, "code_version": "1", "data": {}}
    return fields | {"checkpoint_digest": evaluation["checkpoint_digest"]}


def read_numbers(spec: Any) -> dict[str, float]:
    evaluation = json.loads((Path(spec.run_dir) / "eval.json").read_text(encoding="utf-8"))
    return {row.name: row.value for row in rows(evaluation)}


def test_a_group_has_its_own_score_and_those_of_its_tasks(own, place, tmp_path):
    """Its score is the mean over all documents."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    lines = (place[0] / "rows.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    for name, kept in (("one", lines[:2]), ("two", lines[2:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(kept), encoding="utf-8")
        changes = [f"task: {name}", "tag: own_tag"]
        write_task(folder / f"{name}.yaml", TASKS["own_choice"], tmp_path / f"{name}.jsonl", changes)
    averaged = "aggregate_metric_list: [{metric: acc, weight_by_size: true}]"
    (folder / "group.yaml").write_text(f"group: own_group\ntask: [one, two]\n{averaged}\nmetadata: {{version: 3}}\n")
    spec = own(tmp_path, "own_group", "own_tag", task_files=str(folder))
    result = evaluate.run(spec)["benchmarks"]
    assert list(result) == ["own_group", "one", "two"]
    whole, inside = result["own_group"], result["own_group"]["subtasks"]
    assert inside == {name: result[name] for name in ("one", "two")}
    one, two = (inside[name]["metrics"]["acc"]["value"] for name in ("one", "two"))
    assert whole["metrics"]["acc"]["value"] == pytest.approx((2 * one + 6 * two) / 8)
    assert (whole["samples"], whole["version"], inside["one"]["samples"]) == (8, "3", 2)
    page = (Path(spec.run_dir) / "report.html").read_text(encoding="utf-8")
    assert "Tasks inside groups" in page and "<td>own_group/two</td>" in page


def test_a_task_that_fails_is_one_line_and_the_others_are_kept(own, place, tmp_path):
    folder = tmp_path / "tasks"
    folder.mkdir()
    write_task(folder / "choice.yaml", TASKS["own_choice"], place[0] / "rows.jsonl")
    broken = {
        "own_field": (["output_typ: multiple_choice"], "definition cannot be loaded"),
        "own_column": (["doc_to_text: '{{nothing.there}}'"], "definition cannot be loaded"),
        "own_row": (["doc_to_text: '{{[text][text|length // 250].upper()}}'"], "definition does not work"),
        "own_long": ([f"doc_to_choice: ['a', '{'강물 ' * 99}']", "doc_to_target: 0"], "at most 64; leave the task"),
    }
    for name, (changes, _) in broken.items():
        write_task(folder / f"{name}.yaml", TASKS["own_choice"], place[0] / "rows.jsonl", [f"task: {name}", *changes])
    for name, (_, said) in broken.items():
        spec = own(tmp_path / name, name, "own_choice", task_files=str(folder))
        with pytest.raises(ForeseenError, match=said) as caught:
            evaluate.run(spec)
        assert str(caught.value).startswith(f"benchmark {name}: ") and "\n" not in str(caught.value)
        stored = json.loads((Path(spec.run_dir) / harness.FILE).read_text(encoding="utf-8"))["tasks"]
        assert list(stored) == ["own_choice"]
        assert not (Path(spec.run_dir) / "eval.json").exists()


def test_programs_of_the_model_run_only_with_permission(own, place, tmp_path, monkeypatch):
    folder = tmp_path / "tasks"
    folder.mkdir()
    changes = [
        "task: own_code",
        "unsafe_code: true",
        "process_results: !function asks.results",
        "metric_list: [{metric: allowed, aggregation: mean, higher_is_better: true}]",
    ]
    write_task(folder / "own_code.yaml", TASKS["own_writing"], place[0] / "rows.jsonl", changes)
    (folder / "asks.py").write_text(ASKS)
    (folder / "group.yaml").write_text("group: own_codes\ntask: [own_code]\n")
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "0")
    for name in ("own_code", "own_codes"):
        with pytest.raises(SpecError, match="own_code runs programs that the model wrote"):
            evaluate.run(own(tmp_path / name, name, task_files=str(folder)))
    spec = own(tmp_path / "allowed", "own_codes", task_files=str(folder), allow_code_execution=True)
    assert evaluate.run(spec)["benchmarks"]["own_code"]["metrics"]["allowed"]["value"] == 1
    assert os.environ["HF_ALLOW_CODE_EVAL"] == "0"


def asked(**changes: Any) -> BenchmarksSpec:
    return BenchmarksSpec.model_validate(changes)


@pytest.fixture
def known(monkeypatch):
    """The folders of the harness that have the tasks of the suites; reading all of them takes seven seconds."""
    from lm_eval import tasks as theirs

    parts = "kmmlu/default haerae kobest hellaswag arc piqa winogrande super_glue mmlu/default gsm8k humaneval"
    folders = [Path(theirs.__file__).parent / part for part in parts.split()]
    manager = theirs.TaskManager(include_path=folders, include_defaults=False)
    index_with(monkeypatch, lambda folder: manager)


def test_what_cannot_be_run_is_refused_before_the_model_is_loaded(known, tmp_path, monkeypatch):
    names = {name for suite in SUITES.values() for name in (task.task for task in suite)}
    index = tasks.manager(None).task_index
    assert names <= set(index)
    assert {name for name in names if tasks.runs_code(name, index)} == RUNS_CODE
    tasks.refuse_unknown(asked(suites=list(SUITES), tasks=["mmlu_anatomy"]))
    cases = {
        "no task 'kmmluu'; did you mean 'kmmlu'": asked(tasks=["kmmluu"]),
        "no task 'q9'; `lm_eval ls tasks` lists them": asked(tasks=["q9"]),
        "humaneval_plus runs programs that the model wrote": asked(tasks=["humaneval_plus"]),
        "is not a folder": asked(tasks=["kmmlu"], task_files=str(tmp_path / "nowhere")),
    }
    broken = tmp_path / "own"
    broken.mkdir()
    (broken / "fine.yaml").write_text("task: fine\ndoc_to_text: !function utils.text\n")
    (broken / "half.yaml").write_text("task: [half\n")
    cases["half.yaml: not valid YAML (while parsing"] = asked(tasks=["half"], task_files=str(broken))
    for said, spec in cases.items():
        with pytest.raises(SpecError, match=re.escape(said)):
            tasks.refuse_unknown(spec)
    spec, _ = make_run(tmp_path, evaluate={"tasks": ["kmmluu"]})
    monkeypatch.setattr(evaluate, "load_trained", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(SpecError, match="kmmluu"):
        evaluate.run(spec)
    monkeypatch.setattr(tasks, "find_spec", lambda name: None)
    with pytest.raises(SpecError, match=re.escape("pip install 'yaongi[eval]'")):
        evaluate.run(spec)


def test_a_real_task_without_network_is_one_line(known, tmp_path, monkeypatch):
    """After the first failure, only the cache of datasets is looked at."""
    from huggingface_hub import constants
    from lm_eval.tasks import TaskManager

    load = TaskManager.load

    def unreachable(self: Any, names: list[str]) -> Any:
        if names == ["kmmlu"]:
            raise ConnectionError("no route")
        assert constants.HF_HUB_OFFLINE
        return load(self, names)

    monkeypatch.setattr(TaskManager, "load", unreachable)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    more = {"max_tokens": 50, "tasks": ["kmmlu", "piqa", {"task": "haerae", "limit": 1}]}
    spec, _ = make_run(tmp_path, evaluate=more)
    first = r"benchmark kmmlu: its dataset HAERAE-HUB/KMMLU cannot be read \(no route\)"
    with pytest.raises(LaunchError, match=first) as caught:
        evaluate.run(spec)
    said = str(caught.value)
    assert "HF_HOME" in said and said.endswith("(also failed: piqa, haerae)") and "\n" not in said
    assert constants.HF_HUB_OFFLINE is False


def test_other_files_of_own_tasks_are_another_measurement(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "own.yaml").write_text("task: own\n")
    digests = {tasks.files_digest(None), tasks.files_digest(str(tmp_path))}
    for text in ("서울", "부산"):  # of the same size
        (tmp_path / "data" / "rows.jsonl").write_text(text, encoding="utf-8")
        digests.add(tasks.files_digest(str(tmp_path)))
    assert len(digests) == 4


def test_suites_and_tasks_are_one_list():
    spec = asked(suites=["ko", "code-math"], tasks=["piqa", {"task": "kobest", "limit": 3}], limit=7)
    found = {task.task: (task.num_fewshot, task.limit) for task in spec.benchmarks}
    assert found == {"kmmlu": (5, 7), "kobest": (5, 3), "haerae": (0, 7), "gsm8k": (5, 7), "piqa": (None, 7)}
    assert spec.left_out == ["humaneval"]
    allowed = asked(suites=["code-math"], allow_code_execution=True)
    assert [task.task for task in allowed.benchmarks] == ["gsm8k", "humaneval"] and not allowed.left_out
    with pytest.raises(ValueError, match="humaneval runs programs that the model wrote"):
        asked(tasks=["humaneval"])


def test_paths_start_beside_the_job_file():
    judge = {"url": "http://j/v1", "model": "m", "questions": "q.jsonl", "prompts": "/all/templates.py"}
    spec = asked(task_files="tasks", judge=judge).beside("/jobs")
    assert spec.judge is not None
    assert (spec.task_files, spec.judge.questions) == ("/jobs/tasks", "/jobs/q.jsonl")
    assert spec.judge.prompts == "/all/templates.py"
    spec = asked(judge=judge | {"questions": "https://h/q.jsonl"}).beside("/jobs")
    assert spec.judge is not None and (spec.task_files, spec.judge.questions) == (None, "https://h/q.jsonl")


def test_the_docs_have_the_suites():
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    for name, suite in SUITES.items():
        listed = ", ".join(f"{task.task} {task.num_fewshot}" for task in suite)
        assert f"| `{name}` | {listed}" in page
