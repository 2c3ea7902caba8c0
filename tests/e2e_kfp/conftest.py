"""Kubeflow Pipelines at KFP_HOST, and one run of the pipeline that the tests share. See run.sh."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import backend
import pytest
from backend import MARK, OF_THIS_SESSION, Run, form

PRETRAIN = Path(backend.ROOT) / "pipelines" / "pretrain.yaml"


@pytest.fixture(scope="session")
def uploaded() -> tuple[str, str]:
    """The committed pipeline, uploaded as a person would: ids of the pipeline and of its version."""
    assert backend.HOST, "set KFP_HOST to the address of Kubeflow Pipelines (make e2e-kfp)"
    made = backend.client().upload_pipeline(str(PRETRAIN), pipeline_name=f"yaongi-{MARK}")
    (version,) = backend.client().list_pipeline_versions(made.pipeline_id).pipeline_versions
    return made.pipeline_id, version.pipeline_version_id


@pytest.fixture(scope="session")
def create(uploaded: tuple[str, str]) -> Iterator:
    """Create a run of the uploaded pipeline from the fields of its form."""
    experiment = backend.client().create_experiment("yaongi-e2e").experiment_id

    def made(name: str, fields: dict) -> Run:
        pipeline, version = uploaded
        run = backend.client().run_pipeline(
            experiment, name, pipeline_id=pipeline, version_id=version, params=fields, enable_caching=None
        )
        return Run(run.run_id)

    yield made


@pytest.fixture(scope="session")
def name() -> str:
    """Name of the job of the run `first`."""
    return f"e2e{MARK}"


@pytest.fixture(scope="session")
def red(create, name: str) -> dict[str, tuple[Run, str]]:
    """Runs that `plan` must refuse, with the reason; created at once, since each mostly waits for pods."""
    cases = {
        "claim": (form(f"{name}c", 8, {}, datasets_pvc="no-such-claim"), "claim 'no-such-claim' does not exist"),
        "image": (form(f"{name}i", 8, {}, trainer_image="Not/An:Image"), "'Not/An:Image' is no image reference"),
        "namespace": (form(f"{name}n", 8, {"cluster": {"namespace": "no-such"}}), "namespace 'no-such'"),
        "field": (form(f"{name}f", 8, {"trian": {}}), "trian: unknown field; did you mean 'train'?"),
    }
    return {case: (create(f"red-{case}", fields), reason) for case, (fields, reason) in cases.items()}


@pytest.fixture(scope="session")
def first(create, red, name: str) -> Run:
    """A green run, whose text two pods encode."""
    run = create("first", form(name, 8, {"shards": {"pods": 2}, **OF_THIS_SESSION}))
    assert run.ended(1500) == "SUCCEEDED", run.logs
    run.show()
    return run
