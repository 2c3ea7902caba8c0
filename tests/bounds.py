"""Bounds of numeric tests, and how close the numbers come to them, written to the file MARGINS (tests/margins.py)."""

from __future__ import annotations

import functools
import inspect
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing._comparison import default_tolerances

TESTS = Path(__file__).parent
_nearest: dict[tuple[str, str], float] = {}


def below(error: Any, bound: Any, what: object = "") -> None:
    """Assert that the error, a number or a tensor with one element, is at most the bound."""
    error, bound = (float(x.detach() if isinstance(x, torch.Tensor) else x) for x in (error, bound))
    _write(error, bound)
    assert error <= bound, f"{what}: {error:.3g} is above {bound:.3g}"


def _write(measured: float, bound: float) -> None:
    """Write a line for each place in a test, and another whenever it comes closer to its bound."""
    if "MARGINS" not in os.environ or not (bound > 0 and measured > 0):  # exact, or meant to be
        return
    test = os.environ.get("PYTEST_CURRENT_TEST", "").removesuffix(" (call)")  # ranks of a test inherit it
    frames = inspect.stack(0)[1:]
    places = (f"{name.name}:{frame.lineno}" for frame in frames if (name := Path(frame.filename)).is_relative_to(TESTS))
    place = next((place for place in places if not place.startswith("bounds.py")), "")
    margin = bound / measured
    if not margin >= _nearest.get((test, place), math.inf):
        _nearest[test, place] = margin
        line = {"test": test, "place": place, "measured": measured, "bound": bound, "margin": margin}
        with open(os.environ["MARGINS"], "a") as file:
            file.write(json.dumps(line) + "\n")


def _compare(actual: Any, expected: Any, rtol: float | None, atol: float | None) -> None:
    """What `torch.testing.assert_close` compares, at the element closest to its tolerance."""
    if isinstance(actual, (list, tuple)):
        for a, e in zip(actual, expected, strict=False):
            _compare(a, e, rtol, atol)
        return
    actual, expected = (torch.as_tensor(x).detach() for x in (actual, expected))
    if not actual.is_floating_point() or not actual.numel() or actual.shape != expected.shape:
        return
    usual = default_tolerances(actual, expected)
    error = (actual.double() - expected.double()).abs().flatten()
    allowed = (atol if atol is not None else usual[1]) + (
        rtol if rtol is not None else usual[0]
    ) * expected.double().abs().flatten()
    place = int((error / allowed.clamp(min=1e-300)).argmax())
    _write(float(error[place]), float(allowed[place]))


def watch() -> None:
    """Also record what tests compare with the functions of torch, numpy and pytest."""

    def watched(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def call(actual: Any, expected: Any, *arguments: Any, **options: Any) -> None:
            _compare(actual, expected, options.get("rtol"), options.get("atol"))
            function(actual, expected, *arguments, **options)

        return call

    torch.testing.assert_close = watched(torch.testing.assert_close)
    np.testing.assert_allclose = watched(np.testing.assert_allclose)
    scalar: Any = type(pytest.approx(1.0))
    equal = scalar.__eq__

    def approximately(self: Any, actual: Any) -> bool:
        if isinstance(actual, float) and math.isfinite(self.expected):
            _write(abs(actual - self.expected), self.tolerance)
        return equal(self, actual)

    scalar.__eq__ = approximately


if "MARGINS" in os.environ:
    watch()
