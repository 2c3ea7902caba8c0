from kfp import dsl

from components.images import PIPELINE_IMAGE


@dsl.component(base_image=PIPELINE_IMAGE, install_kfp_package=False)
def tune(
    job: str,
    after: str,
    pipeline_run: str,
    report: dsl.Output[dsl.HTML],
    overview: dsl.Output[dsl.Markdown],
    metrics: dsl.Output[dsl.Metrics],
    model: dsl.Output[dsl.Model],
) -> str:
    """Tune the exported model on the chats of the job's section `tune`: data, training, evaluation, export; returns a
    StageResult (JSON) and shows report, overview, numbers and model of the tuned run.

    Args:
        job: the whole job, as `plan` returns it (JSON).
        after: result of `export` (StageResult, JSON).
        pipeline_run: id of the pipeline's run, by which `cleanup` finds the jobs.
    """
    from components.running import step
    from components.summary.step import publish
    from components.tune.step import run
    from manifests.spec import job_from_json
    from trainer.data.manifest import StageResult

    with step("tune"):
        spec = job_from_json(job)
        result = run(spec, StageResult.from_json(after), pipeline_run)
        publish(spec.tuning() if spec.tune else spec, report, overview, metrics, model)
        return result.to_json()
