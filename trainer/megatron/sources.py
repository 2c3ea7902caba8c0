"""Rows of the weights of a model that a run starts from, whatever its format, under our names; read when asked for."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from trainer.checkpoints import checkpoint
from trainer.checkpoints.boxes import Boxes, whole
from trainer.errors import CheckpointError
from trainer.hf.files import SCALES, compare, parts_of, shape_of
from trainer.hf.weights import opened, rows_of
from trainer.kinds.base import Part
from trainer.megatron.layout import Rows
from trainer.modelspec import ModelSpec
from trainer.parameters import parameters
from trainer.pretrained import MTP, Pretrained


class Source(Protocol):
    def read(self, rows: Rows) -> Tensor:
        """Rows of a matrix, or elements of a vector; zeros for a router's bias that the other model lacks.

        Raises:
            CheckpointError: a file is damaged.
        """
        ...


def source_of(found: Pretrained, model: ModelSpec) -> Source:
    """
    Raises:
        CheckpointError: files are missing or damaged, or hold another model.
    """
    if found.kind == "checkpoint":
        return _OfCheckpoint(found.folder)
    if found.architecture is None:
        names = [*(parameter.name for parameter in parameters(model)), *biases(model)]
        return _OfFolder(found.folder, [Part(name, name) for name in names], model, (MTP,))
    parts, ignored = parts_of(found.architecture, model)
    return _OfFolder(found.folder, parts, model, (*ignored, MTP))


def biases(model: ModelSpec) -> dict[str, tuple[int]]:
    """The routers' biases on the choice, which are buffers of ours and no parameters, with their shapes."""
    experts = model.moe.num_experts if model.moe else 0
    return {f"layers.{place}.mixer.bias_E": (experts,) for place, section in model.trunk() if section is model.moe}


class _OfCheckpoint:
    def __init__(self, folder: Path) -> None:
        checkpoint.verify(folder)
        self._boxes = Boxes(folder)
        self._name, self._tensor = "", torch.empty(0)  # the last one: stacks of experts are asked for one by one

    def read(self, rows: Rows) -> Tensor:
        key = f"model.{rows.name}"
        if key not in self._boxes.shapes:
            raise CheckpointError(f"{self._boxes.folder}: {rows.name} is missing; use another checkpoint")
        if self._name != rows.name:
            self._tensor = torch.empty(self._boxes.shapes[key])
            self._boxes.read(whole(key, self._boxes.shapes[key]), self._tensor)
            self._name = rows.name
        matrix = self._tensor if rows.expert is None else self._tensor[rows.expert]
        return matrix[rows.first : rows.first + rows.count]


class _OfFolder:
    def __init__(self, folder: Path, parts: list[Part], model: ModelSpec, ignored: tuple[str, ...]) -> None:
        self._shapes = {parameter.name: parameter.shape for parameter in parameters(model)} | biases(model)
        self._where = compare(folder, parts, self._shapes, ignored=ignored)
        self._parts: dict[str, list[Part]] = defaultdict(list)
        for part in parts:
            self._parts[part.ours].append(part)
        self._opened: dict[Path, Any] = {}

    def read(self, rows: Rows) -> Tensor:
        parts = self._parts.get(rows.name)
        if parts is None:
            return torch.zeros(rows.count)
        found, last = [], rows.first + rows.count
        for part in sorted(parts, key=lambda part: part.first):
            if part.expert not in (None, rows.expert):
                continue
            stacked = part.expert is None and rows.expert is not None  # an export has them as we do
            shape = self._shapes[rows.name][1:] if stacked else shape_of(part, self._shapes[rows.name])
            low, high = max(rows.first, part.first), min(last, part.first + shape[0])
            if low < high:
                its = slice(part.their_first + low - part.first, part.their_first + high - part.first)
                found.append(self._rows(part.theirs, its, rows.expert if stacked else None).reshape(-1, *shape[1:]))
        return torch.cat(found) if len(found) > 1 else found[0]

    def _rows(self, name: str, rows: slice, expert: int | None) -> Tensor:
        file = self._where[name]
        if expert is not None:
            values: Tensor = self._open(file).get_slice(name)[expert, rows]
            return values
        scales = self._where.get(name + SCALES, file)
        return rows_of(self._open(file), name, rows, None if scales == file else scales)

    def _open(self, file: Path) -> Any:
        if file not in self._opened:
            self._opened[file] = opened(file)
        return self._opened[file]
