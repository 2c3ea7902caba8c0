"""The tokenizer of a trained model instead of one trained on the job's text."""

from __future__ import annotations

from pathlib import Path

from components import measuring
from components.lock import alone
from components.pretrained import check, tokenizer_folder
from components.volume import volume_explained
from manifests.spec import JobSpec
from trainer.data import tokenizer as bpe
from trainer.data.manifest import Manifest, StageResult, file_entry, write_manifest
from trainer.data.stages import reusable
from trainer.files import atomic_write, checksum


def take(job: JobSpec) -> StageResult:
    """Copy it to `job.stage_dir("tokenizers")`, or report that it is unchanged.

    Raises:
        SpecError, DataError: there is none, or it does not fit the job's model.
        VolumeError: the volume is full or cannot be written.
    """
    check(job, downloaded=True)
    directory, source = Path(job.stage_dir("tokenizers")), tokenizer_folder(job)
    there = [file.name for file in bpe.files_of(source)]
    inputs = {name: checksum(source / name, "sha256") for name in there}
    settings = {"from": job.tokenizer_from}
    manifest, why = reusable(directory, "tokenizer", inputs, settings)
    if manifest is None:
        with alone(directory, "copying a tokenizer"), volume_explained(directory):
            for name in bpe.FILES:
                (directory / name).unlink(missing_ok=True)
            for name in there:
                atomic_write(directory / name, (source / name).read_bytes())
            if (config := "tokenizer_config.json") not in there:
                atomic_write(directory / config, bpe.config_text(bpe.Tokenizer.load(directory).eod))
            files = [file_entry(directory, file.name, "sha256") for file in bpe.files_of(directory)]
            manifest = Manifest(kind="tokenizer", inputs=inputs, settings=settings, files=files)
            write_manifest(directory, manifest)
        print(f"tokenizer: that of {source}: {directory}", flush=True)
    else:
        measuring.verified(len(manifest.files))
        print(f"tokenizer: {why}: {directory}", flush=True)
    summary: dict[str, int | float | str] = {"vocab_size": len(bpe.Tokenizer.load(directory).ids())}
    return StageResult(kind="tokenizer", path=str(directory), digest=manifest.digest, summary=summary)
