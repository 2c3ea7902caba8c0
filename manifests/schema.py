"""The JSON schema of a job file, for editors; `python -m manifests.schema` writes it (a test compares)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from manifests.spec import JobSpec, preset_names
from trainer.specbase import VERSION_FIELD

COMMITTED = Path(__file__).with_name("job.schema.json")


def job_schema() -> str:
    """JSON schema (draft 2020-12) of a job file: JobSpec with every field optional, plus the preset."""
    schema = _all_optional(JobSpec.model_json_schema())
    named = schema["$defs"]["DataSpec"]["properties"]["sources"]["patternProperties"]
    for pattern, source in named.items():
        named[pattern] = {"anyOf": [source, {"type": "null", "description": "removes a source of the preset"}]}
    version = {"type": "integer", "minimum": 1, "description": "version of the specs that the file is written in"}
    own = {"preset": {"type": "string", "enum": preset_names()}, VERSION_FIELD: version}
    schema["properties"] = own | schema["properties"]
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
    return json.dumps(schema, indent=1, ensure_ascii=False) + "\n"


def _all_optional(schema: Any) -> Any:
    """A job file has only the differences from its preset, so nothing in it is required."""
    if isinstance(schema, dict):
        return {
            name: _all_optional(value)
            for name, value in schema.items()
            if not (name == "required" and isinstance(value, list))
        }
    return [_all_optional(value) for value in schema] if isinstance(schema, list) else schema


if __name__ == "__main__":
    COMMITTED.write_text(job_schema(), encoding="utf-8")
    print(f"wrote {COMMITTED.name}")
