"""Tasks of lm-evaluation-harness with local data, one for each kind of request."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

WORDS = ["river", "stone", "다리", "moon", "강물", "light", "seven", "return", "바람", "12"]
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


def sentences(number: int) -> list[str]:
    rng = random.Random(1)
    return [" ".join(rng.choices(WORDS, k=rng.randrange(4, 40))) for _ in range(number)]


def make_tasks(place: Path) -> Path:
    """Eight rows, and a folder with the tasks, which it returns. Two rows have more tokens than the models of the
    tests read at once, and one continues nothing."""
    rng = random.Random(2)
    texts = [*sentences(6), *(" ".join(rng.choices(WORDS, k=60)) for _ in range(2))]
    rows = [
        {
            "question": " ".join(text.split()[:9]),
            "choices": [" 강", *rng.sample(WORDS, 2)],
            "answer": i % 3,
            "text": text,
        }
        for i, text in enumerate(texts)
    ]
    rows[0]["question"], rows[1]["question"] = texts[-1], ""
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (place / "tasks").mkdir()
    for name, task in TASKS.items():
        write_task(place / "tasks" / f"{name}.yaml", task, place / "rows.jsonl")
    return place / "tasks"


def write_task(file: Path, task: str, rows: Path, changes: Sequence[str] = ()) -> None:
    """A task of TASKS with changed or added lines."""
    changed = {line.split(":")[0] for line in changes}
    lines = [line for line in (task + COMMON).splitlines() if line.split(":")[0] not in changed]
    file.write_text("\n".join([*lines, *changes]).replace("FILE", str(rows)) + "\n", encoding="utf-8")
