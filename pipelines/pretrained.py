"""The architecture of a trained model, in a folder or on the Hugging Face Hub, as a job's section `train.model`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import yaml

from manifests.pretrained import HubModel, hub_model
from manifests.spec import preset_names
from trainer.fields import stored
from trainer.modelspec import ModelSpec


def model_named(name: str) -> ModelSpec | None:
    """The model in a folder, or owner/name[@revision] on the Hub, for which only config.json is fetched; None if the
    name is that of a preset or a file.

    Raises:
        SpecError, CheckpointError, DataError, LaunchError: there is no model, or its architecture is not supported.
    """
    from trainer.pretrained import find

    if name in preset_names() or Path(name).is_file():
        return None
    if Path(name).is_dir():
        return find(name).model
    hub = hub_model(name)
    return _on_hub(hub) if hub and not name.endswith((".yaml", ".yml", ".json")) else None


def as_section(model: ModelSpec) -> str:
    """YAML for a job file; sections that only the preset's model has are removed by null."""
    absent: dict[str, Any] = {name: [] if name == "engram" else None for name in model.section_names.values()}
    fields = absent | {"mtp": None, "mup": None} | stored(model)
    text = yaml.safe_dump({"train": {"model": fields}}, sort_keys=False, width=120, default_flow_style=None)
    return text.rstrip()


def _on_hub(hub: HubModel) -> ModelSpec:
    from components.download.models import fetch_config
    from trainer.pretrained import find

    with tempfile.TemporaryDirectory() as folder:
        fetch_config(hub, Path(folder))
        return find(folder).model
