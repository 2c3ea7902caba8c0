from typing import NamedTuple

from kfp import dsl

from components.images import PIPELINE_IMAGE


@dsl.component(base_image=PIPELINE_IMAGE, install_kfp_package=False)
def export(
    job: str,
    after: str,
    pipeline_run: str,
    report: dsl.Output[dsl.HTML],
    overview: dsl.Output[dsl.Markdown],
    metrics: dsl.Output[dsl.Metrics],
    model: dsl.Output[dsl.Model],
) -> NamedTuple("Exported", [("result", str), ("Output", bool)]):
    """Write the model in the formats that others read, and show report, overview, numbers and model of the run.

    The files stay on the volume. Output says whether the job has a section `tune`; kfp.local can branch only on an
    output of that name.

    Args:
        job: the whole job, as `plan` returns it (JSON).
        after: result of `evaluate` (StageResult, JSON).
        pipeline_run: id of the pipeline's run, by which `cleanup` finds the jobs.
    """
    from components.launch.step import run
    from components.running import step
    from components.summary.step import publish
    from manifests.spec import job_from_json
    from trainer.data.manifest import StageResult

    with step("export"):
        spec = job_from_json(job)
        result = run(spec, "export", StageResult.from_json(after), pipeline_run)
        publish(spec, report, overview, metrics, model)
        return result.to_json(), spec.tune is not None
