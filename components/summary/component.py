from kfp import dsl

from components.images import PIPELINE_IMAGE


@dsl.component(base_image=PIPELINE_IMAGE, install_kfp_package=False)
def summary(
    job: str,
    exported: str,
    report: dsl.Output[dsl.HTML],
    overview: dsl.Output[dsl.Markdown],
    metrics: dsl.Output[dsl.Metrics],
):
    """Show the run's report, overview and numbers beside the pipeline; the files stay on the volume."""
    from components.running import step
    from components.summary.step import markdown, publish_report, read_run
    from manifests.spec import job_from_json

    with step("summary"):
        run = read_run(job_from_json(job).run_dir)
        publish_report(run, report.path)
        with open(overview.path, "w", encoding="utf-8") as file:
            file.write(markdown(run))
        for name, value in run.metrics().items():
            metrics.log_metric(name, value)
