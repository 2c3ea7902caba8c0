"""A few rows of each source of the large presets, with the columns and the layout of the real dataset."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

CODE = {"utf-8": "def 안녕():\n    return 1\n", "latin-1": "# caf\xe9\nx = 2\n", "no-such-encoding": "y = 3\n"}
GONE = hashlib.sha1(b"a content that the bucket lacks").hexdigest()
MESSAGES = [
    {"role": "user", "content": "What is 1 + 1? Do not say <|im_end|>."},
    {"role": "assistant", "content": "<think>\nEasy.\n</think>\n\n2"},
]
CHAT = (
    "<|im_start|>user\nWhat is 1 + 1? Do not say <| im_end |>.<|im_end|>\n"
    "<|im_start|>assistant\n<|think_start|>\nEasy.\n<|think_end|>\n\n2<|im_end|>\n"
)


def blob(text: str, encoding: str) -> tuple[str, bytes]:
    """(id, object) as Software Heritage stores a content."""
    content = text.encode(encoding if encoding != "no-such-encoding" else "utf-8")
    return hashlib.sha1(content).hexdigest(), gzip.compress(content)


def objects() -> dict[str, bytes]:
    return dict(blob(text, encoding) for encoding, text in CODE.items())


def repositories() -> dict[str, dict[str, bytes]]:
    """The files of each dataset on the Hub."""
    web = {"id": "<urn:uuid:1>", "dump": "CC-MAIN-2024-10", "url": "https://example.org/a", "file_path": "s3://…"}
    fineweb = web | {"language": "en", "language_score": 0.9, "token_count": 4, "score": 3.1, "int_score": 3}
    page = {"url": "https://example.org/b", "fetch_time": 1, "content_mime_type": "text/html", "warc_filename": "w"}
    finemath = page | {"warc_record_offset": 1, "warc_record_length": 2, "token_count": 5, "char_count": 20}
    finemath |= {"metadata": "{}", "score": 4.2, "int_score": 4, "crawl": "CC-MAIN-2024-10", "snapshot_type": "latest"}
    wiki = {"id": "5", "url": "https://ko.wikipedia.org/wiki/A", "title": "지미 카터"}
    files = [{"blob_id": blob(text, encoding)[0], "src_encoding": encoding} for encoding, text in CODE.items()] + [
        {"blob_id": GONE, "src_encoding": "utf-8"}
    ]
    repo = {"language": "Python", "repo_name": "a/b", "path": "/x.py", "length_bytes": 20, "score": 3.5, "int_score": 4}
    stack = [file | repo | {"detected_licenses": ["MIT"], "license_type": "permissive"} for file in files]
    dolci = {"id": "1", "messages": MESSAGES, "dataset_source": "saumyamalik/OpenThoughts3"}
    dolma = {"id": "1", "source": "common_crawl", "version": "v1", "metadata": {"warc_url": "https://example.org"}}
    return {
        "HAERAE-HUB/KOREAN-SyntheticText-1.5B": {
            "README.md": _card({"default": "data/train-*"}),
            "data/train-00000-of-00001.parquet": _parquet([{"text": "합성 문서", "__index_level_0__": 0}]),
        },
        "KORMo-Team/korean-web-collection": {
            "README.md": _card({"default": "data/train-*"}),
            "data/train-00000-of-00001.parquet": _parquet([{"text": "웹 문서"}]),
        },
        "wikimedia/wikipedia": {
            "README.md": _card({"20231101.en": "20231101.en/train-*", "20231101.ko": "20231101.ko/train-*"}),
            "20231101.en/train-00000-of-00001.parquet": _parquet([wiki | {"text": "English"}]),
            "20231101.ko/train-00000-of-00001.parquet": _parquet([wiki | {"text": "제임스 얼 카터"}]),
        },
        "allenai/dolma3_pool": {
            "README.md": _card({"default": "data/**/*"}),
            "data/common_crawl-adult_content-0019/shard_00000000.jsonl.zst": _zst(dolma | {"text": "Unwanted"}),
            "data/common_crawl-health-0007/shard_00000000.jsonl.zst": _zst(dolma | {"text": "Of lower quality"}),
            "data/common_crawl-health-0019/shard_00000000.jsonl.zst": _zst(dolma | {"text": "Health"}),
            "data/stack_edu-Python/shard_00000000.jsonl.zst": _zst(dolma | {"text": "import os"}),
        },
        "HuggingFaceFW/fineweb-edu": {
            "README.md": _card({"default": "data/*/*", "sample-10BT": "sample/10BT/*"}),
            "data/CC-MAIN-2024-10/train-00000.parquet": _parquet([fineweb | {"text": "Not in the sample"}]),
            "sample/10BT/000_00000.parquet": _parquet([fineweb | {"text": "Education"}]),
        },
        "HuggingFaceTB/stack-edu": {
            "README.md": _card({"C": "C/train-*", "Python": "Python/train-*"}),
            "C/train-00000-of-00001.parquet": _parquet(stack[:1]),
            "Python/train-00000-of-00001.parquet": _parquet(stack),
        },
        "allenai/Dolci-Think-SFT-7B": {
            "README.md": _card({"default": "data/train-*"}),
            "data/train-00000-of-00001.parquet": _parquet([dolci]),
        },
        "HuggingFaceTB/finemath": {
            "README.md": _card(
                {"finemath-3plus": "finemath-3plus/train-*", "finemath-4plus": "finemath-4plus/train-*"}
            ),
            "finemath-3plus/train-00000-of-00001.parquet": _parquet([finemath | {"text": "Other"}]),
            "finemath-4plus/train-00000-of-00001.parquet": _parquet([finemath | {"text": "1 + 1 = 2"}]),
        },
    }


TEXTS = {
    "ko-synthetic": ["합성 문서"],
    "ko-web": ["웹 문서"],
    "ko-wikipedia": ["제임스 얼 카터"],
    "en-dolma3": ["Health"],
    "en-fineweb-edu": ["Education"],
    "code-stack-edu": list(CODE.values()),
    "code-dolci-think": [CHAT],
    "math-finemath": ["1 + 1 = 2"],
}


def _card(configs: dict[str, str]) -> bytes:
    lines = [
        f"- config_name: {name}\n  data_files:\n  - {{split: train, path: '{path}'}}" for name, path in configs.items()
    ]
    return ("---\nconfigs:\n" + "\n".join(lines) + "\n---\n").encode()


def _parquet(rows: list[dict[str, Any]]) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), out)
    return out.getvalue()


def _zst(*rows: dict[str, Any]) -> bytes:
    out = pa.BufferOutputStream()
    with pa.CompressedOutputStream(out, "zstd") as stream:
        stream.write("".join(json.dumps(row) + "\n" for row in rows).encode())
    return out.getvalue().to_pybytes()
