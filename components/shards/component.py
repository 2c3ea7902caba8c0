from kfp import dsl

from components.images import PIPELINE_IMAGE


@dsl.component(base_image=PIPELINE_IMAGE, install_kfp_package=False)
def encode(part: str) -> str:
    """Encode one range (JSON) of the raw text's units; returns its name."""
    from components.running import step
    from components.shards.ranges import Range
    from components.shards.step import encode_range

    one = Range.model_validate_json(part)
    with step(f"encode {one.name}"):
        encode_range(one)
    return one.name


@dsl.component(base_image=PIPELINE_IMAGE, install_kfp_package=False)
def shards(job: str, raw: str, tokenizer: str, after: list) -> str:
    """Make token files from the encoded ranges; returns a StageResult (JSON)."""
    from components.plan.enough import tokens_suffice
    from components.running import step
    from components.shards.step import run
    from manifests.spec import job_from_json
    from trainer.data.manifest import StageResult

    with step("shards"):
        spec = job_from_json(job)
        result = run(spec, StageResult.from_json(raw), StageResult.from_json(tokenizer))
        tokens_suffice(spec, result)
        return result.to_json()
