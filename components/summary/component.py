from kfp import dsl

from components.images import PIPELINE_IMAGE


@dsl.component(base_image=PIPELINE_IMAGE, install_kfp_package=False)
def summary(
    job: str,
    exported: str,
    report: dsl.Output[dsl.HTML],
    overview: dsl.Output[dsl.Markdown],
    metrics: dsl.Output[dsl.Metrics],
    model: dsl.Output[dsl.Model],
):
    """Show the run's report, overview, numbers and model in the pipeline's UI, or those of the tuned run if there is
    one; the files stay on the volume."""
    from components.running import step
    from components.summary.step import markdown, model_artefact, publish_report, read_run
    from manifests.spec import job_from_json

    with step("summary"):
        spec = job_from_json(job)
        spec = spec.tuning() if spec.tune else spec
        run = read_run(spec.run_dir)
        publish_report(run, report.path)
        with open(overview.path, "w", encoding="utf-8") as file:
            file.write(markdown(run))
        metrics.metadata.update(run.metrics())
        model.uri, found = model_artefact(spec, run)
        model.metadata.update(found)
