"""The digests in a passport against other programs and by hand, and the estimate of energy."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

from made_run import make_run

from trainer import energy, passport


def test_the_digest_of_the_code_is_that_of_its_files() -> None:
    root = Path(passport.__file__).parent
    listed = subprocess.run(
        "find . -name '*.py' | sed 's#^./##' | LC_ALL=C sort | xargs sha256sum | sed 's/  / /'",
        shell=True,
        cwd=root,
        stdout=subprocess.PIPE,
        check=True,
    ).stdout
    assert passport.code_digest() == hashlib.sha256(listed).hexdigest()


def test_the_digest_of_the_spec_does_not_depend_on_places(tmp_path: Path) -> None:
    spec, _ = make_run(tmp_path)
    moved = spec.updated({"run_dir": "/other", "tokens": {"shards": "/there", "tokenizer": "/here"}})
    assert passport.spec_digest(moved) == passport.spec_digest(spec)
    for change in ({"seed": 5}, {"tokens": {"seed": 5}}, {"tokens": {"skip": [[256, 512]]}}):
        assert passport.spec_digest(spec.updated(change)) != passport.spec_digest(spec)


def test_energy_is_unknown_where_power_or_time_is() -> None:
    assert energy.estimate("NVIDIA H100 80GB HBM3", 8, 3600)["kwh"] == 5.6
    assert energy.estimate("cpu", 1, 60) == {"kwh": None, "basis": "no nominal power is known for cpu"}
    assert energy.estimate(None, 1, 60)["kwh"] is None and energy.estimate("Tesla T4", 1, None)["kwh"] is None
