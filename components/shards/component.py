from kfp import dsl

from components.images import PIPELINE_IMAGE


@dsl.component(base_image=PIPELINE_IMAGE, install_kfp_package=False)
def encode(part: str) -> str:
    """Encode one range of the raw text; returns what it was made from (JSON), for `shards`.

    Args:
        part: the range, one of those that `data` or `tokenizer` returns (JSON).
    """
    from components.running import step
    from components.shards.ranges import Encoded, Range
    from components.shards.step import encode_range

    one = Range.model_validate_json(part)
    with step(f"encode {one.name}"):
        encode_range(one)
        return Encoded(name=one.name, raw=one.raw, tokenizer=one.tokenizer).model_dump_json()


@dsl.component(base_image=PIPELINE_IMAGE, install_kfp_package=False)
def shards(job: str, encoded: list) -> str:
    """Make token files from the encoded ranges; returns a StageResult (JSON).

    Args:
        job: the whole job, as `plan` returns it (JSON).
        encoded: what `encode` returned for each range.
    """
    from components.plan.enough import tokens_suffice
    from components.running import step
    from components.shards.ranges import Encoded
    from components.shards.step import run
    from manifests.spec import job_from_json

    with step("shards"):
        spec, made = job_from_json(job), Encoded.model_validate_json(encoded[0])
        result = run(spec, made.raw, made.tokenizer)
        tokens_suffice(spec, result)
        return result.to_json()
