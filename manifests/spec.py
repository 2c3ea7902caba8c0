"""JobSpec: data + tokenizer + shards + train + cluster + observability.

The user writes this one file; everything else is derived from it.

A job file names a preset and the differences from it:

    preset: tiny
    train: {steps: 500}
"""

from __future__ import annotations

import difflib
import json
import re
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from manifests.clusterspec import ClusterSpec, ObservabilitySpec, StorageSpec
from manifests.dataspec import DataSpec, FilesSource, HygieneSpec, Name
from manifests.paths import whole
from manifests.pretrained import folder_of
from manifests.tunespec import TuneSpec, tuning
from trainer.data.vocabulary import SMALLEST_VOCABULARY
from trainer.errors import SpecError
from trainer.fields import stored
from trainer.kinds.base import Count
from trainer.parallel.layout import Layout
from trainer.spec import (
    CutSpec,
    MixSpec,
    RecipeSpec,
    TokensSpec,
    TrainSpec,
)
from trainer.specbase import (
    MISSING,
    Spec,
    begins_with,
    canonical_digest,
    deep_merge,
    is_stored,
    parse,
    read_yaml,
    to_stored_yaml,
)

PRESETS = files("manifests") / "presets"
BYTES_PER_TOKEN = 6  # UTF-8 bytes of text per token: 3 (math) to 6.5 (Korean) were measured
DOWNLOAD_MARGIN = 1.2
VOCAB_MULTIPLE = 128
StageName = Literal["raw", "hygiene", "tokenizers", "shards"]


def _padded(vocab_size: int) -> int:
    return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


class TokenizerSpec(Spec):
    """Byte-level BPE; `vocab_size` includes special tokens, the 256 bytes and padding and equals model.vocab_size.

    `from`: the model whose tokenizer is used instead of training one, named as in `train.init_from`, which is also the
    default; then `vocab_size` and `sample_bytes` have no effect.
    """

    vocab_size: Annotated[int, Field(ge=_padded(SMALLEST_VOCABULARY))]
    sample_bytes: Count = 200_000_000
    # `from` is a keyword of Python, so this field cannot be declared like the others.
    __annotations__["from"] = "Annotated[str, Field(min_length=1)] | None"
    vars()["from"] = None

    @property
    def source(self) -> str | None:
        """The field `from`."""
        named: str | None = getattr(self, "from")
        return named

    @model_validator(mode="after")
    def _is_padded(self) -> Self:
        padded = _padded(self.vocab_size)
        if padded != self.vocab_size:
            raise ValueError(
                f"vocab_size {self.vocab_size} is not a multiple of {VOCAB_MULTIPLE}, which the matrix products of the "
                f"head want on a GPU; make it and train.model.vocab_size {padded}, reserved tokens fill it up"
            )
        return self


class ShardsSpec(Spec):
    """How text becomes token files; `unit_bytes` is the unit of work, and so the most a crash can lose per worker.

    `pods` of the pipeline encode in parallel, each with `workers` processes; neither changes the output.
    """

    unit_bytes: Count = 64 * 2**20
    max_shard_bytes: Annotated[int, Field(ge=2**16)] = 2**30
    workers: Count = 2
    pods: Annotated[int, Field(ge=1, le=256)] = 1


@begins_with("steps", "begun_with_steps", "init_from")
class JobTrainSpec(RecipeSpec, CutSpec):
    """The fields of TrainSpec that the user sets; `JobSpec.train_spec` derives run name, directories, mix and shards.

    `seq_len` to `skip`: see TokensSpec. Changing `skip` keeps the run's name, so that a run can continue past a loss
    spike. `begun_with_steps` is written when a run is lengthened; it keeps its name, data and warm-up.
    """


class JobSpec(Spec):
    sections_without_numbers: ClassVar = frozenset(
        {
            "cluster",
            "observability",
            "train.parallel",
            "train.runtime",
            "train.evaluate",
            "train.export",
            "train.megatron",
            "train.trackers",
        }
    )

    name: Name
    data: DataSpec
    hygiene: HygieneSpec = HygieneSpec()
    tokenizer: TokenizerSpec
    shards: ShardsSpec = ShardsSpec()
    train: JobTrainSpec
    storage: StorageSpec = StorageSpec()
    tune: TuneSpec | None = None
    cluster: ClusterSpec = ClusterSpec()
    observability: ObservabilitySpec = ObservabilitySpec()

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        if self.tokenizer_from is None and self.tokenizer.vocab_size != self.train.model.vocab_size:
            raise ValueError(
                f"tokenizer.vocab_size {self.tokenizer.vocab_size} differs from train.model.vocab_size "
                f"{self.train.model.vocab_size}; make them equal"
            )
        self.data.check_caps(self.train.steps * self.train.batch.tokens_per_step, self.train.curriculum)
        spec = self.train_spec()
        if spec.engine == "megatron":
            self._check_megatron(spec)
        else:
            spec.check_shares(self.cluster.world_size)
        return self

    @model_validator(mode="after")
    def _ranks_can_share_the_model(self) -> Self:
        from trainer.arithmetic.memory import step_memory  # imports what most users of a spec never need

        train, cluster = self.train, self.cluster
        if train.engine == "megatron":
            return self  # _check_megatron has seen to it
        layout, fitted = self.layout(), self.fitted_spec()
        if not cluster.gpus_per_node:
            return self
        memory = step_memory(fitted, layout)
        if memory.total > cluster.gpu_memory_gib * 2**30:
            if memory.state + memory.reserved > cluster.gpu_memory_gib * 2**30:
                remedy = "use more or larger GPUs, train.parallel.data fsdp, or a smaller train.model"
            else:
                remedy = (
                    f"lower train.batch.micro_batch_rows {fitted.batch.rows}, or write "
                    "train.runtime.activation_checkpointing selective or full"
                )
            raise ValueError(
                f"cluster.gpu_memory_gib {cluster.gpu_memory_gib:g} is too little: weights, gradients and optimizer "
                f"state take {memory.state / 2**30:.1f} GiB on each GPU ({layout}), activations of a micro-batch "
                f"{memory.activations / 2**30:.1f} GiB, copies and reserve "
                f"{(memory.copies + memory.reserved) / 2**30:.1f} GiB; raise it if the GPUs have more, else {remedy}"
            )
        return self

    def _check_megatron(self, spec: TrainSpec) -> None:
        """Raises SpecError for what Megatron-LM cannot train on the job's ranks."""
        from trainer.megatron.check import check
        from trainer.megatron.memory import refuse_too_large

        mesh = check(spec, self.cluster.world_size)
        if only := sorted(name for name, source in self.data.sources.items() if source.loss != "all"):
            raise SpecError(
                f"data.sources.{only[0]}.loss {self.data.sources[only[0]].loss}: Megatron's GPT trains on all tokens; "
                "write all, or train it with train.engine yaongi"
            )
        if self.cluster.gpus_per_node:
            refuse_too_large(spec, mesh, self.cluster.gpu_memory_gib * 2**30, "cluster.gpu_memory_gib:")

    @model_validator(mode="after")
    def _sees_its_fabric(self) -> Self:
        if self.cluster.fabric != "none" and not self.train.runtime.preflight.enabled:
            raise ValueError(
                "cluster.fabric needs train.runtime.preflight.enabled: true; only preflight sees whether NCCL takes it"
            )
        return self

    @model_validator(mode="after")
    def _can_be_tuned(self) -> Self:
        if self.tune is not None:
            self.tuning()
        return self

    def tuning(self) -> JobSpec:
        """The job that tunes this job's run, or the model that `tune.init_from` names.

        Raises:
            SpecError: there is no section `tune`, or one that gives no valid job; one line for each problem.
        """
        if self.tune is None:
            raise SpecError(
                "the job has no section tune; add one, as in tune: {steps: 100, sources: {chat: {licence: Apache-2.0, "
                'origin: {kind: files, paths: ["sample://chat.jsonl.gz"]}}}}'
            )
        try:
            return parse(JobSpec, tuning(self.tune, stored(self, {"tune"}), self.run_name))
        except SpecError as error:
            lines = (line.removeprefix("JobSpec: ") for line in str(error).splitlines())
            raise SpecError("\n".join(f"tune: {line}" for line in lines)) from None

    def layout(self) -> Layout:
        """The mesh of the job's ranks.

        Raises:
            ValueError: no such mesh exists.
        """
        from trainer.arithmetic.memory import choose_layout

        train, cluster = self.train, self.cluster
        ranks = (cluster.world_size, cluster.ranks_per_node)
        return choose_layout(train.parallel, train.model, train.optimizer, *ranks, self._gpu_bytes)

    @property
    def _gpu_bytes(self) -> float | None:
        """Memory of each of the cluster's GPUs; None without any."""
        return self.cluster.gpu_memory_gib * 2**30 if self.cluster.gpus_per_node else None

    def fitted_spec(self) -> TrainSpec:
        """The trainer's spec, with numbers for what it leaves to the memory of the cluster's GPUs: rows `auto`, and a
        budget of activation checkpointing.

        Raises:
            ValueError: no mesh of the ranks exists, they cannot share a step, or nothing fits in the budget.
        """
        return self.fitted()[0]

    def fitted(self) -> tuple[TrainSpec, list[str]]:
        """`fitted_spec`, and a line for each thing that was decided."""
        from trainer.arithmetic.budget import within_budget
        from trainer.arithmetic.rows import fitting

        spec, cluster, said = self.train_spec(), self.cluster, list[str]()
        if spec.engine == "megatron":
            return spec, said
        layout = self.layout()
        if spec.batch.micro_batch_rows == "auto":
            rows, why = fitting(spec, layout, self._gpu_bytes)
            spec = spec.with_rows(rows)
            said.append(f"train.batch.micro_batch_rows auto: {rows} ({why}); a trial on the GPU may lower it")
        of_cpus = cluster.memory_gib_per_node / cluster.ranks_per_node * 2**30
        spec, found = within_budget(spec, layout, self._gpu_bytes or of_cpus)
        return spec, [*said, *([found] if found else [])]

    def byte_budget(self, name: str) -> int | None:
        """UTF-8 bytes to read of each source: the job's limit, else for Hub sources what the run's tokens need.

        The tokenizer's sample needs as much for a short run as for a long one, so that a later, longer run keeps the
        tokenizer.
        """
        if not self._is_as_long_as_the_run(name):
            return self.data.max_bytes_per_source
        sample = 0 if self.tokenizer_from else self.data.sources[name].weight * self.tokenizer.sample_bytes
        return max(self._bytes_of_steps(name, self.train.steps), int(sample))

    def _is_as_long_as_the_run(self, name: str) -> bool:
        """Whether the number of steps determines how much of a source is read."""
        return self.data.max_bytes_per_source is None and not isinstance(self.data.sources[name].origin, FilesSource)

    def _bytes_of_steps(self, name: str, steps: int) -> int:
        wanted = self.data.wanted_tokens(steps * self.train.batch.tokens_per_step, self.train.curriculum)
        return int(wanted[name] * BYTES_PER_TOKEN * DOWNLOAD_MARGIN)

    # Keys of the stages: a pure function of the spec, so that a manifest can be rendered before any data exists.
    @property
    def keys(self) -> dict[StageName, str]:
        """The keys of all stages. They do not depend on the run's length: a longer run appends to existing data."""
        return self._keys(dict.fromkeys(self.data.sources, self.data.first_max_bytes))

    @property
    def former_keys(self) -> dict[StageName, str]:
        """The keys of version 0.1, which included the run's length; run names still contain them."""
        amounts = {
            name: self._bytes_of_steps(name, self.begun_with_steps)
            if self._is_as_long_as_the_run(name)
            else self.data.first_max_bytes
            for name in self.data.sources
        }
        return self._keys(amounts)

    def _keys(self, amounts: dict[str, int | None]) -> dict[StageName, str]:
        mixed = {"weight", "max_epochs", "available_tokens", "synthetic", "loss", "order"}
        sources = self.data.sources.items()
        used = self.tokenizer_from
        raw_parts = ["raw", {name: [stored(one, mixed, raw=True), amounts[name]] for name, one in sources}]
        if columns := self.data.score_columns:  # the download adds the score to each line
            raw_parts.append({"scores": columns})
        if used and any(
            source.has_markup for _, source in sources
        ):  # their text is written by that model's chat template
            raw_parts.append(used)
        raw_key = canonical_digest(raw_parts)
        weights = {name: source.weight for name, source in self.data.sources.items()}
        hygiene = canonical_digest(["hygiene", raw_key, stored(self.hygiene)])
        tokenizer = canonical_digest(["tokenizer", raw_key, stored(self.tokenizer), weights])
        begins = ["shards", tokenizer]
        if used:  # it does not depend on the text
            tokenizer = canonical_digest(["tokenizer", used])
            begins = ["shards", raw_key, tokenizer]
        parts = [*begins, stored(self.shards, {"workers", "pods"}), self.data.heldout_fraction]
        if answers := sorted(name for name, source in sources if source.loss == "answers"):
            parts.append({"answers": answers})
        if scored := self.data.scored:
            parts.append({"scored": scored})
        shards = canonical_digest([*parts, hygiene] if self.hygiene.enabled else parts)
        return {"raw": raw_key, "hygiene": hygiene, "tokenizers": tokenizer, "shards": shards}

    @property
    def raw_key(self) -> str:
        return self.keys["raw"]

    @property
    def hygiene_key(self) -> str:
        return self.keys["hygiene"]

    @property
    def tokenizer_key(self) -> str:
        return self.keys["tokenizers"]

    @property
    def shards_key(self) -> str:
        return self.keys["shards"]

    @property
    def tokenizer_from(self) -> str | None:
        """The model whose tokenizer is used; None if the job trains one."""
        return self.tokenizer.source or self.train.init_from

    @property
    def named_models(self) -> dict[str, str]:
        """The names of the models that the job starts from, by the field that names them."""
        named = {"train.init_from": self.train.init_from, "tokenizer.from": self.tokenizer.source}
        return {field: name for field, name in named.items() if name}

    @property
    def models(self) -> dict[str, str]:
        """The folders of these models, by the same fields."""
        return {field: self._model_dir(name) for field, name in self.named_models.items()}

    def _model_dir(self, named: str) -> str:
        storage = self.storage
        return folder_of(named, storage.datasets_dir, storage.checkpoints_dir, storage.sources_dir)

    @property
    def begun_with_steps(self) -> int:
        """The length with which the run began."""
        return self.train.begun_with_steps or self.train.steps

    @property
    def run_name(self) -> str:
        """`<name>-<hash>`, also the name of the cluster's job. It does not depend on where the run is, how it is
        monitored, or later changes of its length."""
        how = {"begun_with_steps", "skip", "parallel", "runtime", "evaluate", "export", "megatron", "trackers"}
        identity = {
            "shards": self.former_keys["shards"],
            "train": stored(self.train, how) | {"steps": self.begun_with_steps},
            "mix": {
                name: [s.weight, s.max_epochs, *([stored(s.order)] if s.order else [])]
                for name, s in self.data.sources.items()
            },
        }
        return f"{self.name}-{canonical_digest(identity)[:8]}"

    @property
    def run_dir(self) -> str:
        return f"{self.storage.checkpoints_dir}/runs/{self.run_name}"

    def stage_dir(self, stage: StageName) -> str:
        """The directory of a stage's output: under the former key if version 0.1 began exactly this job's data here."""
        datasets, former = self.storage.datasets_dir, self.former_keys
        keys = former if Path(datasets, "raw", former["raw"]).is_dir() else self.keys
        return f"{datasets}/{stage}/{keys[stage]}"

    def train_spec(self) -> TrainSpec:
        """The trainer's spec: the user's fields plus those derived from data and storage."""
        mix = {
            n: MixSpec(weight=s.weight, max_epochs=s.max_epochs, order=s.order) for n, s in self.data.sources.items()
        }
        tokens = TokensSpec(
            shards=self.stage_dir("shards"),
            tokenizer=self.stage_dir("tokenizers"),
            mix=mix,
            **{name: getattr(self.train, name) for name in CutSpec.model_fields},
        )
        recipe = {name: getattr(self.train, name) for name in RecipeSpec.model_fields}
        if self.train.init_from:
            recipe["init_from"] = self._model_dir(self.train.init_from)
        if self.storage.sources_dir:
            recipe["evaluate"] = self.train.evaluate.beside(self.storage.sources_dir)
        return TrainSpec(run=self.run_name, run_dir=self.run_dir, tokens=tokens, **recipe)


def preset_names() -> list[str]:
    return sorted(re.sub(r"\.yaml$", "", entry.name) for entry in PRESETS.iterdir() if entry.name.endswith(".yaml"))


def preset(name: str) -> dict[str, Any]:
    """The preset's fields.

    Raises:
        SpecError: no such preset.
    """
    if name not in preset_names():
        raise SpecError(f"preset '{name}' does not exist; presets are {', '.join(preset_names())}")
    fields = read_yaml(Path(str(PRESETS / f"{name}.yaml")))
    base = fields.pop("preset", None)  # one preset may be another with differences
    return deep_merge(preset(base), fields) if base else fields


def job_from(value: dict[str, Any], changes: dict[str, Any] | None = None, where: str = "") -> JobSpec:
    """A JobSpec from a job file's mapping (`preset:` plus differences) and further changes.

    A source of `data.sources` set to null is removed, so that a preset's model can be trained on other data only.

    Raises:
        SpecError: as `parse`.
    """
    value = dict(value)
    base = preset(value.pop("preset")) if "preset" in value else {}
    try:
        return parse(JobSpec, _without_removed(deep_merge(deep_merge(base, value), changes or {})), where)
    except SpecError as error:
        lines = str(error).splitlines()
        missing = [line for line in lines if line.endswith(MISSING)]
        if base or not missing:
            raise
        hint = (
            f"{f'{where}: ' if where else ''}names no preset; begin it with one ({', '.join(preset_names())}), as in "
        )
        raise SpecError("\n".join([f"{hint}preset: tiny", *lines])) from None


def _without_removed(job: dict[str, Any]) -> dict[str, Any]:
    data = job.get("data")
    if not (isinstance(data, dict) and isinstance(data.get("sources"), dict)):
        return job  # `parse` reports the error
    left = {name: source for name, source in data["sources"].items() if source is not None}
    return job | {"data": data | {"sources": left}}


def changes_of(preset_or_file: str) -> tuple[str, dict[str, Any]]:
    """A preset's name (or "") and the fields that a job file changes in it (none for the preset itself).

    For a user's file, the fields include its folder, where its relative paths start; not for a stored job, whose paths
    start where it was started.

    Raises:
        SpecError: neither a preset nor a readable file.
    """
    if preset_or_file in preset_names():
        return preset_or_file, {}
    if not Path(preset_or_file).exists():
        near = difflib.get_close_matches(preset_or_file.lower(), preset_names(), n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"check the name, {whole(preset_or_file)} was tried"
        raise SpecError(f"'{preset_or_file}' is neither a preset ({', '.join(preset_names())}) nor a file; {hint}")
    changes = read_yaml(preset_or_file)
    from manifests.megatronform import is_form

    if is_form(changes):
        changes = _of_form(changes, preset_or_file)
    if not is_stored(preset_or_file):
        changes = deep_merge({"storage": {"sources_dir": str(whole(preset_or_file).parent)}}, changes)
    return str(changes.pop("preset", "")), changes


def _of_form(value: dict[str, Any], where: str) -> dict[str, Any]:
    """A job file's mapping from one in Megatron's own words."""
    from manifests.megatronform import read_form, refuse_other_arguments
    from manifests.megatronjob import changes_by

    form, others = read_form(value, where)
    base = job_from({"preset": form.preset})
    try:
        changes = changes_by(form, base.train_spec(), list(base.data.sources))
    except SpecError as error:
        raise SpecError(f"{where}: {error}") from None
    made = {"preset": form.preset, **changes}
    job = job_from(made, where=where)
    refuse_other_arguments(job.train_spec(), job.cluster.world_size, others, where)
    ranks = job.cluster.world_size // (job.train.megatron.sharing if job.train.megatron else 1)
    if (wanted := form.parallelism.data_parallel_size) not in (None, ranks):
        raise SpecError(f"{where}: parallelism.data_parallel_size {wanted}: it is {ranks} with these sizes; remove it")
    return made


def load_job(preset_or_file: str, changes: dict[str, Any] | None = None) -> JobSpec:
    """A JobSpec from a preset's name or a job file.

    Raises:
        SpecError: as `parse`; also if the name is neither a preset nor a file.
    """
    base, differences = changes_of(preset_or_file)
    value = {"preset": base} if base else {}
    return job_from(value, deep_merge(differences, changes or {}), preset_or_file)


def job_file_text(job: JobSpec) -> bytes:
    """The job as text for a stored file. If its paths start in the current folder, where it is started, `sources_dir`
    is omitted, because version 0.1 does not know it."""
    if job.storage.sources_dir == str(Path.cwd()):
        job = job.updated({"storage": {"sources_dir": None}})
    return to_stored_yaml(job)


def job_from_json(text: str) -> JobSpec:
    """A resolved JobSpec from the output of the `plan` step."""
    return parse(JobSpec, json.loads(text), "job")
