"""What hygiene found, a file beside each raw file: JSON lines, one for each document and filter that drops it.

    hygiene/<key>/<source>/part-00000.jsonl   {"document": 12, "offset": 3456, "filter": "exact_duplicates", …evidence}

`document` counts the lines of the raw file from 0, `offset` is the byte at which the line starts. The entries of the
stage's manifest count the documents that are left out and the bytes of their texts.
"""

from __future__ import annotations

import json
from pathlib import Path

from manifests.spec import JobSpec
from trainer.data.manifest import Manifest, read_manifest, verify
from trainer.errors import DataError


def decisions(job: JobSpec, raw: Manifest) -> Manifest | None:
    """The manifest of what hygiene decided on this raw text; None where the job asks for none.

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
    """Byte offsets of the lines of a raw file whose documents are left out; none where `directory` is None.

    Args:
        directory: of the hygiene stage, `job.stage_dir("hygiene")`.
        path: of the raw file, relative to the raw stage.

    Raises:
        DataError: hygiene has not looked at this file.
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
