"""What a job takes from trained models (`train.init_from`, `tokenizer.from`): compared with the job before any work."""

from __future__ import annotations

from pathlib import Path

from components.volume import named
from manifests.pretrained import RUN_NAME, hub_model
from manifests.spec import JobSpec
from trainer.data.chattemplate import ChatTemplate, chat_template
from trainer.data.tokenizer import Tokenizer, files_of
from trainer.errors import SpecError
from trainer.pretrained import find, read_json, refuse_damaged, refuse_misfit, tokenizer_of

INIT, TOKENIZER = "train.init_from", "tokenizer.from"


def check(job: JobSpec, *, downloaded: bool) -> None:
    """Refuse models that are missing or do not fit.

    Args:
        downloaded: whether models on the Hub must have been downloaded.

    Raises:
        SpecError, DataError, CheckpointError: one line that begins with the name of the field.
    """
    names = job.named_models
    there = {field: folder for field, folder in job.models.items() if downloaded or not hub_model(names[field])}
    for field, folder in there.items():
        if (run := RUN_NAME.fullmatch(names[field])) and not Path(folder).is_dir():
            if run["step"]:
                raise SpecError(f"{field}: {folder} is not there; train the run to that step")
            said = f"{Path(folder).parent} has no run {run[0]}"
            raise SpecError(f"{field}: {said}; write ./{run[0]} for a folder, owner/{run[0]} for the Hub")
    if INIT in there:
        with named(INIT):
            found = find(there[INIT])
            refuse_misfit(found, job.train.model)
            if not hub_model(names[INIT]):  # otherwise its weights are fetched later
                refuse_damaged(found, job.train.model)
    if job.tokenizer_from and (field := _tokenizer_field(job)) in there:
        with named(field):
            used = tokenizer_folder(job)
            tokenizer = Tokenizer.load(used)
            for file in files_of(used):
                if file.suffix == ".json":  # an export copies them
                    read_json(file)
            if tokenizer.vocab_size > job.train.model.vocab_size:
                raise SpecError(
                    f"the tokenizer of {used} has {tokenizer.vocab_size:,} entries, but train.model.vocab_size is "
                    f"{job.train.model.vocab_size:,}; it must be at least as large"
                )
            if field == TOKENIZER and INIT in there:
                _refuse_other_words(tokenizer, used, find(there[INIT]).tokenizer)


def tokenizer_folder(job: JobSpec) -> Path:
    """The folder with the tokenizer that a job takes from a model."""
    return tokenizer_of(job.models[_tokenizer_field(job)])


def conversations(job: JobSpec) -> ChatTemplate | None:
    """The chat template of the tokenizer that a job takes, which writes its conversations; None for our own markup.

    Raises:
        DataError: the tokenizer has no template, or one that cannot be used.
    """
    if not job.tokenizer_from or not any(source.has_markup for source in job.data.sources.values()):
        return None
    with named(_tokenizer_field(job)):
        return chat_template(tokenizer_folder(job))


def _tokenizer_field(job: JobSpec) -> str:
    """The field that names the model whose tokenizer the job takes."""
    return TOKENIZER if job.tokenizer.source else INIT


def _refuse_other_words(tokenizer: Tokenizer, used: Path, own: Path | None) -> None:
    """Refuse a tokenizer that gives other ids to the tokens of the model's own; it may have more tokens."""
    if own is None or own == used:
        return
    theirs, ours = Tokenizer.load(own).ids(), tokenizer.ids()
    for text, number in sorted(theirs.items(), key=lambda item: item[1]):
        if ours.get(text) != number:
            raise SpecError(
                f"id {number} is {text!r} in the model's own tokenizer ({own}), but not in {used}; leave out "
                f"{TOKENIZER}, so that the model's own is used"
            )
