from kfp import dsl

from components.images import PIPELINE_IMAGE


@dsl.component(base_image=PIPELINE_IMAGE, install_kfp_package=False)
def encode(part: str) -> str:
    """Encode one range of the raw text; returns its name, the first one itself, which `shards` reads.

    Args:
        part: the range, one of those that `data` or `tokenizer` returns (JSON).
    """
    from components.running import step
    from components.shards.ranges import Range
    from components.shards.step import encode_range

    one = Range.model_validate_json(part)
    with step(f"encode {one.name}"):
        encode_range(one)
        return one.name if one.index else part


@dsl.component(base_image=PIPELINE_IMAGE, install_kfp_package=False)
def shards(encoded: list) -> str:
    """Make token files from the encoded ranges; returns a StageResult (JSON).

    Args:
        encoded: what `encode` returned for each range. The first one has the job and what the ranges were made from:
            within a loop of kfp.local, steps get nothing from outside but the loop's item.
    """
    from components.plan.enough import tokens_suffice
    from components.running import step
    from components.shards.ranges import Range
    from components.shards.step import run

    with step("shards"):
        one = Range.model_validate_json(encoded[0])
        result = run(one.job, one.raw, one.tokenizer)
        tokens_suffice(one.job, result)
        return result.to_json()
