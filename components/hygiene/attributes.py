"""The result of hygiene, one file per raw file: a JSON line for each document and filter that drops it.

    hygiene/<key>/<source>/part-00000.jsonl   {"document": 12, "offset": 3456, "filter": "exact_duplicates", …evidence}

`document` is the line number in the raw file from 0, `offset` the byte at which the line starts. The entries of the
stage's manifest count the dropped documents and the bytes of their texts.
"""

from __future__ import annotations

import json
from pathlib import Path

from manifests.spec import JobSpec
from trainer.data.manifest import Manifest, read_manifest, verify
from trainer.errors import DataError


def decisions(job: JobSpec, raw: Manifest) -> Manifest | None:
    """The hygiene manifest for this raw text; None if the job has hygiene off.

    Raises:
        DataError: hygiene was not finished for this raw text.
    """
    if not job.hygiene.enabled:
        return None
    directory = job.stage_dir("hygiene")
    newest = read_manifest(directory, "hygiene")
    made_for = [generation for generation in newest.generations if generation.inputs.get("raw") == raw.digest]
    if not made_for or (manifest := newest.at(made_for[-1].digest)) is None:
        raise DataError(f"{directory}: made for other raw text; run the hygiene step again")
    verify(directory, manifest, sizes_only=True)
    return manifest


def dropped(directory: str | Path | None, path: str) -> frozenset[int]:
    """Byte offsets of the dropped lines of a raw file; none if `directory` is None.

    Args:
        directory: of the hygiene stage, `job.stage_dir("hygiene")`.
        path: of the raw file, relative to the raw stage.

    Raises:
        DataError: hygiene has not scanned this file.
    """
    if directory is None:
        return frozenset()
    attributes = Path(directory) / path
    try:
        return frozenset(json.loads(line)["offset"] for line in attributes.read_bytes().splitlines())
    except FileNotFoundError:
        raise DataError(f"{attributes}: not there; run the hygiene step") from None
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{attributes}: damaged; remove it and run the hygiene step again") from None
