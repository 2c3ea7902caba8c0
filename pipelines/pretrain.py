"""The pipeline: from raw text to a trained, evaluated and exported model.

`yaongi run` executes this object on one machine, `yaongi compile` writes it as YAML for Kubeflow Pipelines. Steps pass
small JSON strings; the data is on two volumes, found by digest. The backend caches nothing: every step checks what is
on its volume and skips work that is done. Every task costs two pods there and every group of tasks one, about ten
seconds each, so that what needs no pod of its own shares one.
"""

from kfp import dsl, kubernetes

from components.cleanup.component import cleanup
from components.data.component import data
from components.export.component import export
from components.images import PIPELINE_IMAGE
from components.launch.component import evaluate, train
from components.plan.component import plan
from components.shards.component import encode, shards
from components.tune.component import tune
from manifests.clusterspec import StorageSpec
from manifests.names import APP_LABEL, EGRESS_LABEL, HUB, STEP_APP
from manifests.workerspec import HUB_SECRET

STORAGE = StorageSpec()
UID = 1000  # of both images
RUN_ID = dsl.PIPELINE_JOB_ID_PLACEHOLDER  # marks the jobs of this run of the pipeline
# Time limits of a step's pod, including the image pull. A launcher enforces cluster.{queue,start,run}_timeout_seconds
# itself: a second limit that ends its pod would look as if a person had stopped it.
SHORT_SECONDS, DATA_SECONDS, OWN_CLOCKS = 1800, 7 * 86_400, 0


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
    hub_secret: str = HUB_SECRET,
    overrides: str = "{}",
):
    """Train a language model.

    Args:
        preset: model and data to start from: tiny, small, h100-4b, h100-4b-interleaved, h100-4b-1t, dual-h100-dense,
            qwen3-30b-a3b or nemotron-3-nano.
        steps: optimizer steps; 0 takes the preset's number.
        nodes: machines to train on; 0 takes the preset's number.
        gpus_per_node: GPUs of each machine, 0 trains on CPUs; -1 takes the preset's number.
        datasets_pvc: claim for raw text, tokenizers and token files (ReadWriteMany).
        checkpoints_pvc: claim for runs: checkpoints, logs, exported models (ReadWriteMany).
        image: image of the data steps and the launcher.
        trainer_image: image of the training job; empty takes the preset's.
        hub_secret: Secret whose key `token` is for gated data and models of the Hugging Face Hub; it need not exist,
            but must be named.
        overrides: JSON object with any other field of the job, for example {"train": {"seed": 1}}.
    """

    def based(task: dsl.PipelineTask, limit: int) -> dsl.PipelineTask:
        """Image, user, time limit and the label for Prometheus of every step."""
        task.set_container_image(image).set_caching_options(False)
        kubernetes.set_image_pull_policy(task, "IfNotPresent")
        kubernetes.set_timeout(task, limit)
        kubernetes.add_pod_label(task, APP_LABEL, STEP_APP)
        return kubernetes.set_security_context(task, run_as_user=UID, run_as_group=UID, run_as_non_root=True)

    def placed(task: dsl.PipelineTask, limit: int = DATA_SECONDS) -> dsl.PipelineTask:
        """A step that reads or writes the two volumes."""
        kubernetes.mount_pvc(based(task, limit), datasets_pvc, STORAGE.datasets_dir)
        kubernetes.mount_pvc(task, checkpoints_pvc, STORAGE.checkpoints_dir)
        return task

    def from_hub(task: dsl.PipelineTask, limit: int = DATA_SECONDS) -> dsl.PipelineTask:
        """As `placed`, with access to the web and, if the namespace has the secret, to gated datasets."""
        kubernetes.add_pod_label(task, EGRESS_LABEL, HUB)
        return kubernetes.use_secret_as_env(placed(task, limit), hub_secret, {"token": "HF_TOKEN"}, optional=True)

    def launched(task: dsl.PipelineTask) -> dsl.PipelineTask:
        """A step whose pod owns the jobs that it creates."""
        kubernetes.set_timeout(task, OWN_CLOCKS)
        return kubernetes.use_field_path_as_env(task, "POD_NAME", "metadata.name")

    # Runs however the other steps end, even when the run is terminated, which kills a launcher without a signal.
    last = based(cleanup(pipeline_run=RUN_ID, preset=preset, overrides=overrides), SHORT_SECONDS)
    with dsl.ExitHandler(last, name="pretrain"):
        places = {"datasets_pvc": datasets_pvc, "checkpoints_pvc": checkpoints_pvc, "trainer_image": trainer_image}
        form = {"steps": steps, "nodes": nodes, "gpus_per_node": gpus_per_node, "hub_secret": hub_secret, **places}
        planned = based(plan(preset=preset, overrides=overrides, **form), SHORT_SECONDS).outputs
        ready = from_hub(data(job=planned["job"])).outputs
        job = ready["job"]
        # Once if several pods encode, otherwise never: for one pod, `data` has made the token files already.
        with dsl.ParallelFor(planned["Output"], name="encode-in-several-pods"):
            with dsl.ParallelFor(ready["Output"], name="ranges") as part:
                encoded = placed(encode(part=part)).output
            tokens = placed(shards(encoded=dsl.Collected(encoded)))
        training = placed(train(job=job, after=ready["result"], pipeline_run=RUN_ID)).after(tokens)
        model = launched(training).output
        measured = launched(placed(evaluate(job=job, after=model, pipeline_run=RUN_ID))).output
        exported = launched(placed(export(job=job, after=measured, pipeline_run=RUN_ID))).outputs
        with dsl.If(exported["Output"] == True, name="to-tune"):  # noqa: E712  builds a condition
            launched(from_hub(tune(job=job, after=exported["result"], pipeline_run=RUN_ID)))
