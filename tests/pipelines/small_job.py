"""A job as small as the data path and the model allow, with its texts."""

import json
import random
from pathlib import Path

import yaml


def small_job(folder: Path, tuned: bool = False, **train) -> Path:
    """A job file with its texts: two sources of a few hundred short documents, one layer of each kind.

    Args:
        tuned: the model is tuned on the sample chats too.
    """
    words = random.Random(7).sample([f"{a}{b}{c}" for a in "bcdf" for b in "aeiou" for c in "lmnr"], 60)
    sources = {}
    for number, (name, domain) in enumerate([("prose", "en"), ("programs", "code")]):
        draw = random.Random(number)
        lines = [json.dumps({"text": " ".join(draw.choices(words, k=60)) + "."}) for _ in range(300)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
        origin = {"kind": "files", "paths": [str(folder / f"{name}.jsonl")]}
        sources[name] = {"domain": domain, "weight": 0.5, "licence": "CC0-1.0", "max_epochs": 1e6, "origin": origin}
    job = {
        "preset": "tiny",
        "name": "small",
        "data": {"sources": sources, "heldout_fraction": 0.1},
        "tokenizer": {"vocab_size": 512},
        "train": {
            "steps": 4,
            "seq_len": 32,
            "batch": {"tokens_per_step": 128, "micro_batch_rows": 4},
            "checkpoint": {"every_steps": 2},
            "evaluate": {"max_tokens": 300, "sample_tokens": 4, "prompts": ["bal"]},
            "runtime": {"log_every_steps": 1, "metrics_port": 0},
            **train,
        },
        "cluster": {"nodes": 1},
    }
    job["train"]["model"] = {"vocab_size": 512, "hidden": 32, "layers": ["ME", "*-", "N"]}
    job["train"]["model"] |= {"mamba": {"num_heads": 2, "head_dim": 16, "d_state": 8, "chunk_size": 16}}
    job["train"]["model"] |= {"attention": {"num_heads": 2, "num_kv_heads": 1, "head_dim": 16}, "mlp": {"width": 32}}
    job["train"]["model"] |= {"moe": {"num_experts": 4, "top_k": 2, "expert_width": 16}}
    engram = {"layer": 2, "max_order": 3, "rows_per_head": 50, "width_per_order": 16, "num_heads": 2}
    job["train"]["model"] |= {"engram": [engram]}
    if tuned:
        chat = {"licence": "Apache-2.0", "origin": {"kind": "files", "paths": ["sample://chat.jsonl.gz"]}}
        job["tune"] = {"steps": 2, "sources": {"chat": chat}, "checkpoint": {"every_steps": 2}, "prompts": ["bal?"]}
        job["tune"]["optimizer"] = {"name": "adamw", "adamw": {"learning_rate": 0.01}}
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(whole(job)))
    return path


def whole(job: dict) -> dict:
    """The job without its preset: the preset's sources would stay beside ours."""
    from manifests.spec import preset
    from trainer.specbase import deep_merge

    base = preset(job.pop("preset"))
    del base["data"]
    return deep_merge(base, job)
