import json

from manifests.schema import COMMITTED, job_schema
from manifests.spec import preset, preset_names


def test_the_committed_schema_is_the_generated_one():
    assert COMMITTED.read_text(encoding="utf-8") == job_schema(), "job.schema.json is stale; run `make gen`"


def test_the_schema_knows_the_presets_and_every_field_that_they_use():
    schema = json.loads(job_schema())
    assert schema["properties"]["preset"]["enum"] == preset_names()
    for name in preset_names():
        assert preset(name).keys() <= schema["properties"].keys()


def test_a_job_file_needs_no_field():
    assert "required" not in json.loads(job_schema())
    assert '"required": [' not in job_schema()


def test_a_source_may_be_null_as_in_a_job_file():
    sources = json.loads(job_schema())["$defs"]["DataSpec"]["properties"]["sources"]
    (source,) = sources["patternProperties"].values()
    assert [option.get("$ref", option.get("type")) for option in source["anyOf"]] == ["#/$defs/SourceSpec", "null"]
