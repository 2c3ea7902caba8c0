"""The pipeline: from raw text to a trained, measured and exported model.

`yaongi run` executes this object on one machine, `yaongi compile` writes it as YAML for Kubeflow Pipelines. Steps hand
on small JSON strings; the bytes lie on two volumes, found by digest. Nothing is cached by the backend: every step
checks what lies on its volume and does no work that is done.
"""

from kfp import dsl, kubernetes

from components.download.component import download
from components.hygiene.component import hygiene
from components.images import PIPELINE_IMAGE
from components.launch.component import launch
from components.plan.component import plan
from components.shards.component import encode, shards
from components.summary.component import summary
from components.tokenizer.component import tokenizer
from manifests.spec import StorageSpec

STORAGE = StorageSpec()
UID = 1000  # of both images
HUB_SECRET = "huggingface"  # optional; its key `token` is an access token of the Hugging Face Hub


@dsl.pipeline(name="yaongi-pretrain", description="Raw text to a trained, measured and exported language model.")
def pretrain(
    preset: str = "tiny",
    steps: int = 0,
    nodes: int = 0,
    gpus_per_node: int = -1,
    datasets_pvc: str = STORAGE.datasets_pvc,
    checkpoints_pvc: str = STORAGE.checkpoints_pvc,
    image: str = PIPELINE_IMAGE,
    trainer_image: str = "",
    overrides: str = "{}",
):
    """Train a language model.

    Args:
        preset: model and data to start from: tiny, small, h100-4b or h100-4b-interleaved.
        steps: optimizer steps; 0 takes the preset's number.
        nodes: machines to train on; 0 takes the preset's number.
        gpus_per_node: GPUs of each machine, 0 trains on CPUs; -1 takes the preset's number.
        datasets_pvc: claim for raw text, tokenizers and token files (ReadWriteMany).
        checkpoints_pvc: claim for runs: checkpoints, logs, exported models (ReadWriteMany).
        image: image of the data steps and the launcher.
        trainer_image: image of the training job; empty takes the preset's.
        overrides: JSON object with any other field of the job, for example {"train": {"seed": 1}}.
    """

    def placed(task: dsl.PipelineTask) -> dsl.PipelineTask:
        """Image, volumes and identity of a step that reads or writes the two volumes."""
        task.set_container_image(image).set_caching_options(False)
        kubernetes.set_image_pull_policy(task, "IfNotPresent")
        kubernetes.set_security_context(task, run_as_user=UID, run_as_group=UID, run_as_non_root=True)
        kubernetes.mount_pvc(task, datasets_pvc, STORAGE.datasets_dir)
        kubernetes.mount_pvc(task, checkpoints_pvc, STORAGE.checkpoints_dir)
        return task

    def from_hub(task: dsl.PipelineTask) -> dsl.PipelineTask:
        """A placed step that may read gated datasets, where the namespace holds the secret."""
        return kubernetes.use_secret_as_env(placed(task), HUB_SECRET, {"token": "HF_TOKEN"}, optional=True)

    def launched(name: str, job: str, after: str) -> dsl.PipelineTask:
        """A task of the trainer; the job it creates belongs to the launcher's pod."""
        task = placed(launch(job=job, task=name, after=after)).set_display_name(name)
        return kubernetes.use_field_path_as_env(task, "POD_NAME", "metadata.name")

    job = placed(
        plan(
            preset=preset,
            steps=steps,
            nodes=nodes,
            gpus_per_node=gpus_per_node,
            datasets_pvc=datasets_pvc,
            checkpoints_pvc=checkpoints_pvc,
            trainer_image=trainer_image,
            overrides=overrides,
        )
    ).output
    fetched = from_hub(download(job=job)).output
    raw = from_hub(hygiene(job=job, raw=fetched)).output
    trained = placed(tokenizer(job=job, raw=raw)).outputs
    with dsl.ParallelFor(trained["Output"], name="encode-ranges") as part:
        encoded = placed(encode(part=part)).output
    tokens = placed(shards(job=job, raw=raw, tokenizer=trained["tokenizer"], after=dsl.Collected(encoded))).output
    model = launched("train", job, tokens).output
    quality = launched("evaluate", job, model).output
    exported = launched("export", job, quality).output
    placed(summary(job=job, exported=exported))
