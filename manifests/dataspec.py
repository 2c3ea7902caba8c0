"""The part of a JobSpec about data: the sources of documents, their mix, and what is dropped."""

from __future__ import annotations

import re
from collections.abc import Sequence
from string import Formatter
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from trainer.kinds.base import Count
from trainer.runtimespec import Positive
from trainer.spec import OrderSpec, StageSpec, listed
from trainer.specbase import Spec

NAME, NAME_LENGTH = r"^[a-z]([-a-z0-9]*[a-z0-9])?$", 40


def _named(value: object) -> object:
    """State the rule in words; pattern and length of `Name` are for the schema."""
    if isinstance(value, str) and (not re.search(NAME, value) or len(value) > NAME_LENGTH):
        raise ValueError(
            f"'{value}' cannot be a name here; write at most {NAME_LENGTH} small letters a-z, digits and hyphens, the "
            "first a letter, the last no hyphen"
        )
    return value


Name = Annotated[str, Field(pattern=NAME, max_length=NAME_LENGTH), BeforeValidator(_named)]
Fraction = Annotated[float, Field(ge=0, le=1)]
CHAT = "chat"  # the format of a template field that turns a list of messages into chat markup


class FilesSource(Spec):
    """Files by path or URL (local, http, s3, gs), globs allowed; `sample://NAME` is in the corpus shipped with
    yaongi."""

    kind: Literal["files"] = "files"
    paths: list[str] = Field(min_length=1)


class HubSource(Spec):
    """A dataset on the Hugging Face Hub; `revision` is a commit id, or a branch that download resolves and records.

    `files` are globs of paths in the dataset's repository; a leading `!` excludes. Without them, config and split
    select the files.
    """

    kind: Literal["hub"] = "hub"
    dataset: str
    config: str | None = None
    split: str = "train"
    revision: str = "main"
    files: list[str] = []

    @model_validator(mode="after")
    def _files_or_config(self) -> Self:
        if self.files and self.config is not None:
            raise ValueError("config and files exclude each other; files says which files are read")
        return self


class BlobsSpec(Spec):
    """Texts that a dataset only references: `text_column` holds ids, the gzipped contents are at `url` (Software
    Heritage).

    Contents that are missing, or whose SHA-1 (or git blob id) does not match the id, are counted and left out.
    """

    url: str = "https://softwareheritage.s3.amazonaws.com/content/{id}"
    encoding_column: str | None = "src_encoding"
    workers: Annotated[int, Field(ge=1, le=256)] = 32

    @model_validator(mode="after")
    def _url_has_the_id(self) -> Self:
        if self.url.count("{id}") != 1:
            raise ValueError(f"blobs.url '{self.url}' must contain {{id}} once; it stands for the content's id")
        return self


class TextSpec(Spec):
    """Documents: their origin, and how a row becomes a text: a column, a template, or a content fetched by id.

    A template names columns, as in `{title}\\n\\n{text}`; `{messages:chat}` formats a list of messages with the
    tokenizer's chat markup.
    """

    origin: Annotated[FilesSource | HubSource, Field(discriminator="kind")]
    text_column: str | None = None
    template: str | None = None
    blobs: BlobsSpec | None = None

    @model_validator(mode="after")
    def _one_way_to_a_text(self) -> Self:
        if self.template is not None:
            if self.text_column is not None or self.blobs is not None:
                raise ValueError("template excludes text_column and blobs; give one of them")
            template_fields(self.template)
        if self.blobs is not None and self.text_column is None:
            raise ValueError("blobs needs text_column, the column that holds the contents' ids")
        return self

    @property
    def score_column(self) -> str | None:
        """The column of each document's score, if its order in training is by one."""
        return None

    @property
    def columns(self) -> list[str]:
        """The columns from which a row's text is made."""
        if self.template is not None:
            return list(dict.fromkeys(name for _, name, _ in template_fields(self.template) if name is not None))
        encoding = self.blobs.encoding_column if self.blobs else None
        return [self.text_column or "text", *([encoding] if encoding else [])]

    @property
    def has_markup(self) -> bool:
        """Whether special tokens in the texts are encoded as such (chat markup written by the template)."""
        return self.template is not None and any(form == CHAT for _, _, form in template_fields(self.template))


class SourceSpec(TextSpec):
    """One named source: its licence, its share of the training tokens, and the share written by a model.

    `available_tokens` is the approximate size of the source; with it, a weight that exceeds the epoch cap is refused
    before anything is downloaded. `loss: answers` trains only on the assistant's messages, with all others as context
    (trainer/data/chat.py); it needs a template with a list of messages. `order`: by a score instead of at random.
    """

    domain: Literal["ko", "en", "code", "math"]
    licence: str
    weight: Positive
    max_epochs: Positive = 4.0
    synthetic: Fraction = 0.0
    available_tokens: Positive | None = None
    loss: Literal["all", "answers"] = "all"
    order: OrderSpec | None = None

    @property
    def score_column(self) -> str | None:
        return self.order.column if self.order else None

    @model_validator(mode="after")
    def _answers_are_of_a_chat(self) -> Self:
        if self.loss == "answers" and not self.has_markup:
            raise ValueError(
                "loss: answers needs chats, but the source has plain text; name the column of messages, as in "
                'template: "{messages:chat}", or set loss: all'
            )
        return self


class DataSpec(Spec):
    """Sources by name; their weights sum to 1. `max_bytes_per_source` stops a download early.

    `begun_with_max_bytes` is written when that limit changes for a run that has begun; the run keeps its name and data.
    `max_synthetic_share`: maximum share of training tokens written by a model.
    """

    sources: dict[Name, SourceSpec] = Field(min_length=1)
    heldout_fraction: Annotated[float, Field(gt=0, lt=0.5)] = 0.005
    max_bytes_per_source: Count | None = None
    begun_with_max_bytes: Count | None = None
    max_synthetic_share: Fraction = 1.0

    @model_validator(mode="after")
    def _mix_is_whole(self) -> Self:
        total = sum(source.weight for source in self.sources.values())
        if abs(total - 1) > 1e-6:
            weights = listed({name: source.weight for name, source in self.sources.items()})
            raise ValueError(
                f"the weights of sources sum to {total:g}; they must sum to 1: {weights}; change them, or remove a "
                f"source by null, as in data.sources.{next(iter(self.sources))}: null"
            )
        return self

    @property
    def scored(self) -> list[str]:
        """The sources whose shards have a score of each document beside them; lengths are in the shards themselves."""
        return sorted(n for n, source in self.sources.items() if source.order and source.order.by != "length")

    @property
    def score_columns(self) -> dict[str, str]:
        """The column of the score by source, where it is one."""
        return {name: source.score_column for name, source in self.sources.items() if source.score_column}

    @property
    def first_max_bytes(self) -> int | None:
        """The limit with which the run began."""
        return self.begun_with_max_bytes or self.max_bytes_per_source

    def wanted_tokens(self, tokens: int, curriculum: Sequence[StageSpec] = ()) -> dict[str, float]:
        """Tokens of each source among the first `tokens`, with the curriculum's changes of weights."""
        stages = [(stage.from_tokens, stage.weights) for stage in curriculum if stage.weights is not None]
        wanted = dict.fromkeys(self.sources, 0.0)
        weights = {name: source.weight for name, source in self.sources.items()}
        position = 0
        for start, later in [*stages, (tokens, {})]:
            end = min(start, tokens)
            for name, weight in weights.items():
                wanted[name] = wanted.get(name, 0.0) + weight * (end - position)
            position, weights = end, later
        return wanted

    def check_caps(self, tokens: int, curriculum: Sequence[StageSpec] = ()) -> None:
        """Refuse shares of `tokens` that exceed the declared size of a source times its epoch cap.

        Raises:
            ValueError: names the source, how much is missing and what to change.
        """
        wanted = self.wanted_tokens(tokens, curriculum)
        for name, source in self.sources.items():
            if source.available_tokens is None:
                continue
            most = source.available_tokens * source.max_epochs
            if wanted[name] > most:
                raise ValueError(
                    f"data.sources.{name}: its share is {wanted[name] / 1e9:.3g}B of {tokens / 1e9:.3g}B tokens, but "
                    f"{source.available_tokens / 1e9:.3g}B available × {source.max_epochs:g} epochs give only "
                    f"{most / 1e9:.3g}B, {(wanted[name] - most) / 1e9:.2g}B too few; lower the weight to "
                    f"{int(most / tokens * 1e4) / 1e4:g}, raise max_epochs or add a source"
                )
        if (share := self.synthetic_share(tokens, curriculum)) > self.max_synthetic_share + 1e-9:
            raise ValueError(
                f"data.max_synthetic_share is {self.max_synthetic_share:g}, but a model wrote {share:.3g} of the "
                "training tokens; lower the weights of synthetic sources or raise the cap"
            )

    def synthetic_share(self, tokens: int, curriculum: Sequence[StageSpec] = ()) -> float:
        """Share of the training tokens written by a model, as declared by the sources."""
        wanted = self.wanted_tokens(tokens, curriculum)
        return sum(wanted[name] * source.synthetic for name, source in self.sources.items()) / tokens


class NearDuplicatesSpec(Spec):
    """Of documents whose sets of five-word runs have at least this Jaccard similarity, only the first stays."""

    threshold: Annotated[float, Field(ge=0.5, le=1)] = 0.8


class QualitySpec(Spec):
    """Gopher's rules for prose, applied to the sources of these domains."""

    domains: list[Literal["ko", "en", "math"]] = Field(["en", "ko"], min_length=1)


class HygieneSpec(Spec):
    """The filters between download and tokenization; all are off by default.

    `near_duplicates: {}` and `quality: {}` switch these filters on with their defaults. `evaluation`: texts that
    training must not see; a document that shares `ngram` consecutive words with one of them is dropped.
    """

    exact_duplicates: bool = False
    near_duplicates: NearDuplicatesSpec | None = None
    quality: QualitySpec | None = None
    evaluation: dict[Name, TextSpec] = {}
    ngram: Annotated[int, Field(ge=2, le=100)] = 13

    @property
    def enabled(self) -> bool:
        return self.exact_duplicates or bool(self.near_duplicates or self.quality or self.evaluation)


def template_fields(template: str) -> list[tuple[str, str | None, str]]:
    """(text before, column or None, format) of each piece of a template.

    Raises:
        ValueError: a template that is more than text and plain columns.
    """
    hint = "write columns as {column} or {column:chat}, and braces of the text twice"
    try:
        pieces = [(text, name, form or "", conversion) for text, name, form, conversion in Formatter().parse(template)]
    except ValueError as error:
        raise ValueError(f"template {template!r} cannot be read ({error}); {hint}") from None
    for _, name, form, conversion in pieces:
        plain = name is None or re.fullmatch(r"\w+", name)
        if not plain or form not in ("", CHAT) or conversion:
            raise ValueError(f"template {template!r} has a field that is not a plain column; {hint}")
    if all(name is None for _, name, _, _ in pieces):
        raise ValueError(f"template {template!r} names no column; {hint}")
    return [(text, name, form) for text, name, form, _ in pieces]
