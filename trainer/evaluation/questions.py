"""The questions of LogicKor, and the instructions of its judge.

LogicKor (github.com/instructkr/LogicKor) is published without a licence, so neither its questions nor its instructions
are part of this program: the questions are read from its questions.jsonl. The instructions below are our own words for
the same task; those of its templates.py are read from there if the job names it. That file is parsed, not run.
"""

from __future__ import annotations

import ast
import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

from trainer.benchmarkspec import JudgeSpec
from trainer.errors import DataError, LaunchError, in_words
from trainer.evaluation.judge import pool
from trainer.files import unreadable

TURNS = ("single_turn", "multi_turn")
TEMPLATE = "JUDGE_TEMPLATE"
_COMMON = """당신은 한국어 대화를 심사하는 채점자입니다. {what}

채점할 때는 다음을 살핍니다.
- 질문이 요구한 것을 빠짐없이, 정확하게 다루었는가.
- 빠졌거나 틀렸거나 부족한 점은 무엇인가.
- 답변이 길거나 짧다는 사실 자체는 점수에 넣지 않습니다.
- Additional Reference가 있으면 정답의 근거로 삼습니다.
{more}
질문이 다른 언어를 요구하지 않았는데 한국어로 답하지 않았다면 0점입니다.
한국어로 답했다는 것만으로 점수를 더 주지는 않습니다.

먼저 네다섯 문장으로 평가를 쓰고, 1점에서 10점까지의 점수를 주십시오. 반드시 다음 두 줄의 형식을 지킵니다.
평가: (평가 내용)
점수: (숫자)"""
OWN = {
    "single_turn": _COMMON.format(what="질문 하나와 모델의 답변을 읽고 그 답변에 점수를 매깁니다.", more=""),
    "multi_turn": _COMMON.format(
        what="앞선 질문과 답변, 이어진 질문과 답변을 읽고 마지막 답변에 점수를 매깁니다.",
        more="- 마지막 답변이 앞선 대화와 어긋나지 않는가.\n",
    ),
}


class Question(NamedTuple):
    """Two questions that follow each other, and what a right answer to each says, if the file has it."""

    id: int | str
    category: str
    turns: tuple[str, str]
    references: tuple[str | None, str | None]


def read_questions(spec: JudgeSpec) -> tuple[list[Question], str]:
    """The questions in the file or at the address of the spec, and the sha256 of the file.

    Raises:
        DataError: the file is missing or a line has another form.
        LaunchError: the address cannot be read.
    """
    data = _fetched(spec) if "://" in spec.questions else _read(spec.questions)
    found: dict[int | str, Question] = {}
    for number, line in enumerate(data.decode("utf-8-sig", "replace").split("\n"), start=1):
        if not line.strip():
            continue
        question = _question(line, f"{spec.questions}: line {number}")
        if question.id in found:
            raise DataError(f"{spec.questions}: line {number}: id {question.id} is there twice; give each its own")
        found[question.id] = question
    if not found:
        raise DataError(f"{spec.questions}: has no questions; it must be LogicKor's questions.jsonl")
    return list(found.values()), hashlib.sha256(data).hexdigest()


def read_instructions(spec: JudgeSpec) -> tuple[dict[str, str], str]:
    """The judge's instructions for each of TURNS, and where they are from: "own", or the sha256 of their file.

    Raises:
        DataError: the file is missing or has none.
    """
    if spec.prompts is None:
        return OWN, "own"
    data = _read(spec.prompts)
    try:
        found = json.loads(data) if spec.prompts.endswith(".json") else _assigned(data)
    except (ValueError, SyntaxError):
        found = None
    if not (isinstance(found, dict) and all(isinstance(found.get(turn), str) for turn in TURNS)):
        raise DataError(
            f"{spec.prompts}: must be LogicKor's templates.py, or a JSON file with {' and '.join(TURNS)}, each a text"
        )
    return {turn: found[turn] for turn in TURNS}, hashlib.sha256(data).hexdigest()


def _assigned(data: bytes) -> Any:
    """The value of TEMPLATE in a Python file."""
    for statement in ast.parse(data).body:
        if isinstance(statement, ast.Assign) and any(getattr(to, "id", "") == TEMPLATE for to in statement.targets):
            return ast.literal_eval(statement.value)
    return None


def _question(line: str, where: str) -> Question:
    try:
        row: Any = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict):
        raise DataError(f"{where}: is not a JSON object; it must be a line of LogicKor's questions.jsonl")
    name, category, turns, notes = (row.get(field) for field in ("id", "category", "questions", "references"))
    if not isinstance(name, int | str) or isinstance(name, bool):
        raise DataError(f"{where}: id must be a number or a text")
    if not isinstance(category, str) or not category:
        raise DataError(f"{where}: category must be a text")
    if not isinstance(turns, list) or len(turns) < 2 or not all(isinstance(text, str) and text for text in turns):
        raise DataError(f"{where}: questions must be a list of two texts")
    if notes is not None and not (isinstance(notes, list) and all(isinstance(note, str | None) for note in notes)):
        raise DataError(f"{where}: references must be a list of texts or null")
    first, second = [*(note or None for note in notes or ()), None, None][:2]
    return Question(name, category, (turns[0], turns[1]), (first, second))


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise DataError(
            f"{path}: not there; get it from github.com/instructkr/LogicKor and name it in train.evaluate.judge"
        ) from None
    except OSError as error:
        raise unreadable(path, error) from None


def _fetched(spec: JudgeSpec) -> bytes:
    import urllib3

    try:
        answer = pool(spec, redirects=5).request("GET", spec.questions)
    except urllib3.exceptions.HTTPError as error:
        said = in_words(getattr(error, "reason", None) or error)
        raise LaunchError(
            f"{spec.questions}: cannot be read ({said}); connect, or name a copy of the file in "
            "train.evaluate.judge.questions"
        ) from None
    if answer.status != 200:
        raise LaunchError(f"{spec.questions}: answered {answer.status}; check train.evaluate.judge.questions")
    return answer.data
