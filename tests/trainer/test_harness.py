"""Benchmarks through our interface of lm-evaluation-harness, against its own HFLM on the exported model."""

from __future__ import annotations

import importlib.util
import json
import random
import re
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval")
pytest.importorskip("transformers")

from made_run import make_run

from trainer import evaluate
from trainer.benchmarkspec import RUNS_CODE, SUITES, BenchmarksSpec
from trainer.data import tokenizer as tokenizers
from trainer.data.chattemplate import Asking
from trainer.errors import ForeseenError, LaunchError, SpecError
from trainer.evaluation import harness, measure
from trainer.evaluation.lm import HarnessModel
from trainer.evaluation.scores import rows
from trainer.hf.architectures import native
from trainer.hf.folder import write
from trainer.hf.weights import tensors
from trainer.model.hybrid import build_model
from trainer.modelspec import ModelSpec

VOCAB, LONGEST = 320, 64
WORDS = ["river", "stone", "다리", "moon", "강물", "light", "seven", "return", "바람", "12"]
MODEL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden": 32,
    "layers": ["ME", "*-", "M"],
    "mamba": {"num_heads": 4, "head_dim": 8, "d_state": 16, "num_groups": 2, "chunk_size": 16},
    "attention": {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16},
    "moe": {"num_experts": 4, "top_k": 2, "expert_width": 32},
    "mlp": {"width": 64},
}
COMMON = """
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
metadata: {version: 1.5}
"""
TASKS = {
    "own_choice": """
task: own_choice
output_type: multiple_choice
fewshot_split: test
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "own_rolling": """
task: own_rolling
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
    "own_writing": """
task: own_writing
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: [" moon", "12"], max_gen_toks: 24, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture(scope="module")
def hflm():
    """The harness's own class for transformers. It imports accelerate, which it needs only for several processes, so
    that package is replaced by the few names; tests/peers has it."""
    with pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec("accelerate") is None:
            stub, utils = ModuleType("accelerate"), ModuleType("accelerate.utils")
            for name in ("Accelerator", "InitProcessGroupKwargs", "find_executable_batch_size"):
                setattr(stub, name, None)
            utils.get_max_memory = None
            patch.setitem(sys.modules, "accelerate", stub)
            patch.setitem(sys.modules, "accelerate.utils", utils)
        from lm_eval.models.huggingface import HFLM

        yield HFLM


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Folders: tasks, and an export for transformers; also the same model and tokenizer."""
    place, rng = tmp_path_factory.mktemp("harness"), random.Random(1)
    texts = [" ".join(rng.choices(WORDS, k=rng.randrange(4, 40))) for _ in range(200)]
    (place / "tokenizer").mkdir()
    tokenizers.save(tokenizers.train(texts, VOCAB), place / "tokenizer")
    long = [" ".join(rng.choices(WORDS, k=60)) for _ in range(2)]  # more tokens than the model reads at once
    rows = [
        {
            "question": " ".join(text.split()[:9]),
            "choices": [" 강", *rng.sample(WORDS, 2)],
            "answer": i % 3,
            "text": text,
        }
        for i, text in enumerate([*texts[:6], *long])
    ]
    rows[0]["question"] = long[0]
    rows[1]["question"] = ""  # a continuation without a context
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (place / "tasks").mkdir()
    for name, task in TASKS.items():
        text = (task + COMMON).replace("FILE", str(place / "rows.jsonl"))
        (place / "tasks" / f"{name}.yaml").write_text(text, encoding="utf-8")
    spec = ModelSpec.model_validate(MODEL)
    model = build_model(spec, seed=1)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    architecture, _ = native(spec)
    assert architecture is not None
    named = tensors(architecture, spec, model.state_dict(), torch.float32)
    write(place / "export", architecture.config(spec, LONGEST), named, place / "tokenizer", dtype=torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        import datasets

        patch.setattr(datasets.config, "HF_DATASETS_CACHE", place / "cache")
        yield place, model.eval()


def evaluated(place: Path, lm: Any, names: list[str]) -> dict[str, Any]:
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(place / "tasks"), include_defaults=False)
    found = simple_evaluate(lm, tasks=names, task_manager=manager, num_fewshot=None, bootstrap_iters=10)
    assert found is not None
    return found


def test_scores_are_those_of_the_harness_on_the_export(place, hflm):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, model = place
    tokenizer = tokenizers.Tokenizer.load(folder / "tokenizer")
    ours = HarnessModel(model, tokenizer, folder / "tokenizer", max_length=LONGEST, batch_tokens=200)
    loaded = AutoModelForCausalLM.from_pretrained(folder / "export", dtype=torch.float32)
    theirs = hflm(loaded, tokenizer=AutoTokenizer.from_pretrained(folder / "export"), batch_size=4)
    assert theirs.max_length == LONGEST
    assert ours.prefix_token_id == theirs.prefix_token_id and ours.eot_token_id == theirs.eot_token_id
    a, b = (evaluated(folder, lm, list(TASKS)) for lm in (ours, theirs))
    for name in TASKS:
        numbers = [{k: v for k, v in x["results"][name].items() if isinstance(v, float)} for x in (a, b)]
        assert numbers[0] == pytest.approx(numbers[1], rel=1e-6) and numbers[0]
        for mine, other in zip(a["samples"][name], b["samples"][name], strict=True):
            assert mine["arguments"] == other["arguments"]
            if name == "own_writing":
                assert mine["resps"] == other["resps"]
            else:
                found, expected = (flat(sample["resps"]) for sample in (mine, other))
                assert found == pytest.approx(expected, rel=1e-6)
    written = [sample["resps"][0][0] for sample in a["samples"]["own_writing"]]
    assert len(set(written)) == 8 and any(len(text) > 20 for text in written)


def flat(responses: list[list[Any]]) -> list[float]:
    return [float(value) for each in responses for one in each for value in (one if isinstance(one, tuple) else [one])]


@pytest.fixture
def own(place, monkeypatch):
    """A run with one checkpoint, and its benchmarks: only own tasks, as the index of all takes seconds."""
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr(harness, "_manager", lambda folder: TaskManager(include_path=folder, include_defaults=False))

    def make(directory: Path, *tasks: Any, **more: Any) -> Any:
        evaluate = {"max_tokens": 50, "tasks": list(tasks), "task_files": str(place[0] / "tasks"), **more}
        return make_run(directory, evaluate=evaluate, tokens={"seq_len": 64})[0]

    return make


def test_an_evaluation_measures_keeps_and_shows_benchmarks(own, tmp_path, monkeypatch, caplog):
    kept = []

    class Kept(measure.Metrics):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            kept.append(self.registry)

    monkeypatch.setattr(measure, "Metrics", Kept)
    spec = own(tmp_path, {"task": "own_choice", "num_fewshot": 2}, {"task": "own_rolling", "limit": 3})
    result = evaluate.run(spec)
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


def read_numbers(spec: Any) -> dict[str, float]:
    evaluation = json.loads((Path(spec.run_dir) / "eval.json").read_text(encoding="utf-8"))
    return {row.name: row.value for row in rows(evaluation)}


def test_a_group_has_its_own_score_and_those_of_its_tasks(own, place, tmp_path):
    """Its score is the mean over all documents."""
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    rows = (place[0] / "rows.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    for name, kept in (("one", rows[:2]), ("two", rows[2:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(kept), encoding="utf-8")
        text = f"{TASKS['own_choice']}{COMMON}".replace("FILE", str(tmp_path / f"{name}.jsonl"))
        (tasks / f"{name}.yaml").write_text(text.replace("task: own_choice", f"task: {name}\ntag: own_tag"))
    averaged = "aggregate_metric_list: [{metric: acc, weight_by_size: true}]"
    (tasks / "group.yaml").write_text(f"group: own_group\ntask: [one, two]\n{averaged}\nmetadata: {{version: 3}}\n")
    result = evaluate.run(own(tmp_path, "own_group", "own_tag", task_files=str(tasks)))["benchmarks"]
    assert list(result) == ["own_group", "one", "two"]
    whole, inside = result["own_group"], result["own_group"]["subtasks"]
    assert inside == {name: result[name] for name in ("one", "two")}
    one, two = (inside[name]["metrics"]["acc"]["value"] for name in ("one", "two"))
    assert whole["metrics"]["acc"]["value"] == pytest.approx((2 * one + 6 * two) / 8)
    assert (whole["samples"], whole["version"], inside["one"]["samples"]) == (8, "3", 2)


def test_a_task_that_fails_is_one_line_and_the_others_are_kept(own, place, tmp_path):
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "choice.yaml").write_text((place[0] / "tasks" / "own_choice.yaml").read_text(encoding="utf-8"))
    broken = {
        "own_field": ("output_typ: multiple_choice", "definition cannot be loaded"),
        "own_column": ("doc_to_text: '{{nothing.there}}'", "definition cannot be loaded"),
        "own_row": ("doc_to_text: '{{[text][text|length // 250].upper()}}'", "definition does not work"),
        "own_long": ("doc_to_choice: ['a', '" + "강물 " * 99 + "']\ndoc_to_target: 0", "at most 64; leave the task"),
    }
    for name, (lines, _) in broken.items():
        text = f"{TASKS['own_choice']}{COMMON}".replace("FILE", str(place[0] / "rows.jsonl"))
        changed = {line.split(":")[0] for line in lines.splitlines()}
        same = [line for line in text.splitlines() if line.split(":")[0] not in changed]
        (tasks / f"{name}.yaml").write_text("\n".join([*same, lines]).replace("task: own_choice", f"task: {name}"))
    for name, (_, said) in broken.items():
        spec = own(tmp_path / name, name, "own_choice", task_files=str(tasks))
        with pytest.raises(ForeseenError, match=said) as caught:
            evaluate.run(spec)
        assert str(caught.value).startswith(f"benchmark {name}: ") and "\n" not in str(caught.value)
        stored = json.loads((Path(spec.run_dir) / harness.FILE).read_text(encoding="utf-8"))["tasks"]
        assert list(stored) == ["own_choice"]
        assert not (Path(spec.run_dir) / "eval.json").exists()


def asked(**changes: Any) -> BenchmarksSpec:
    return BenchmarksSpec.model_validate(changes)


@pytest.fixture
def known(monkeypatch):
    """The folders of the harness that have the tasks of the suites; reading all of them takes seven seconds."""
    from lm_eval import tasks

    parts = "kmmlu/default haerae kobest hellaswag arc piqa winogrande super_glue mmlu/default gsm8k humaneval"
    folders = [Path(tasks.__file__).parent / part for part in parts.split()]
    manager = tasks.TaskManager(include_path=folders, include_defaults=False)
    monkeypatch.setattr(harness, "_manager", lambda folder: manager)


def test_what_cannot_be_run_is_refused_before_the_model_is_loaded(known, tmp_path, monkeypatch):
    names = {name for suite in SUITES.values() for name in (task.task for task in suite)}
    index = harness._manager(None).task_index
    assert names <= set(index)
    assert {name for name in names if harness._runs_code(name, index)} == RUNS_CODE
    harness.refuse_unknown(asked(suites=list(SUITES), tasks=["mmlu_anatomy"]))
    cases = {
        "no task 'kmmluu'; did you mean 'kmmlu'": asked(tasks=["kmmluu"]),
        "no task 'q9'; `lm_eval ls tasks` lists them": asked(tasks=["q9"]),
        "humaneval_plus runs programs that the model wrote": asked(tasks=["humaneval_plus"]),
        "is not a folder": asked(tasks=["kmmlu"], task_files=str(tmp_path / "nowhere")),
    }
    for said, spec in cases.items():
        with pytest.raises(SpecError, match=re.escape(said)):
            harness.refuse_unknown(spec)
    spec, _ = make_run(tmp_path, evaluate={"tasks": ["kmmluu"]})
    monkeypatch.setattr(evaluate, "load_trained", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(SpecError, match="kmmluu"):
        evaluate.run(spec)
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    with pytest.raises(SpecError, match=re.escape("pip install 'yaongi[eval]'")):
        evaluate.run(spec)


def test_a_real_task_without_network_is_one_line(known, tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    more = {"max_tokens": 50, "tasks": ["piqa", "kmmlu", {"task": "haerae", "limit": 1}]}
    spec, _ = make_run(tmp_path, evaluate=more)
    with pytest.raises(LaunchError, match="benchmark piqa: its dataset baber/piqa cannot be read") as caught:
        evaluate.run(spec)
    said = str(caught.value)
    assert "HF_HOME" in said and said.endswith("(also failed: kmmlu, haerae)") and "\n" not in said


def test_suites_and_tasks_are_one_list():
    spec = asked(suites=["ko", "code-math"], tasks=["piqa", {"task": "kobest", "limit": 3}], limit=7)
    found = {task.task: (task.num_fewshot, task.limit) for task in spec.benchmarks}
    assert found == {"kmmlu": (5, 7), "kobest": (5, 3), "haerae": (0, 7), "gsm8k": (5, 7), "piqa": (None, 7)}
    assert spec.left_out == ["humaneval"]
    allowed = asked(suites=["code-math"], allow_code_execution=True)
    assert [task.task for task in allowed.benchmarks] == ["gsm8k", "humaneval"] and not allowed.left_out
    with pytest.raises(ValueError, match="humaneval runs programs that the model wrote"):
        asked(tasks=["humaneval"])


def test_draws_of_one_question_differ_and_repeat(place):
    from lm_eval.api.instance import Instance

    folder, model = place
    tokenizer = tokenizers.Tokenizer.load(folder / "tokenizer")
    options = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 8}
    requests = [Instance("generate_until", {}, ("river", options), n) for n in range(6)]
    lm = HarnessModel(model, tokenizer, folder / "tokenizer", max_length=LONGEST, batch_tokens=64)
    found = lm.generate_until(requests)
    assert len(set(found)) > 3
    assert lm.generate_until(requests[:2]) == found[:2]


def test_a_chat_is_written_as_the_exports_template_writes_it(place):
    from transformers import AutoTokenizer

    folder, model = place
    tokenizer = tokenizers.Tokenizer.load(folder / "tokenizer")
    asking = Asking(folder / "tokenizer")
    lm = HarnessModel(model, tokenizer, folder / "tokenizer", max_length=64, batch_tokens=64, asking=asking)
    theirs = AutoTokenizer.from_pretrained(folder / "export")
    chat = [
        {"role": "system", "content": "짧게 답해."},
        {"role": "user", "content": "river <|im_end|>?"},
        {"role": "assistant", "content": "<think>stone</think> 12"},
    ]
    for messages in (chat[:2], [*chat, chat[1]]):
        text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert lm.apply_chat_template(messages) == text
        assert lm.tok_encode(text) == theirs.encode(text) == asking.ids(messages)
    chat[2]["content"] = "stone 1"
    begun = theirs.apply_chat_template(chat, tokenize=False, continue_final_message=True)
    assert lm.apply_chat_template(chat, add_generation_prompt=False) == begun
