"""`yaongi tune` of a published model with its own tokenizer: from chats to a folder that transformers loads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from foreign_models import qwen_tokenizer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from trainer.data.tokenizer import FILES

YAONGI = Path(sys.executable).with_name("yaongi")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def test_a_model_of_others_is_tuned_and_goes_back_to_transformers(tmp_path: Path) -> None:
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 384, "tie_word_embeddings": True}
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**shape, rope_parameters={"rope_type": "default", "rope_theta": 1e6}))
    model.to(torch.bfloat16).save_pretrained(tmp_path / "model", max_shard_size="60KB")
    qwen_tokenizer(tmp_path / "model")
    described = subprocess.run([YAONGI, "describe", tmp_path / "model"], capture_output=True, text=True, check=True)
    section = yaml.safe_load(described.stdout.partition("For a job that begins with it:")[2])
    job = {
        "preset": "tiny",
        "name": "theirs",
        "train": section["train"] | {"seq_len": 128, "batch": {"tokens_per_step": 2048, "micro_batch_rows": 16}},
        "tokenizer": {"from": "./model"},
        "tune": {
            "init_from": "./model",
            "steps": 12,
            "sources": {
                "chat": {
                    "licence": "Apache-2.0",
                    "origin": {"kind": "files", "paths": ["sample://chat.jsonl.gz"]},
                }
            },
            "optimizer": {"name": "adamw", "adamw": {"learning_rate": 0.003}},
            "checkpoint": {"every_steps": 12},
            "prompts": ["1 + 1?"],
        },
        "cluster": {"nodes": 1},
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    command = [YAONGI, "tune", tmp_path / "job.yaml", "--set", "train.runtime.metrics_port=0"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (run_dir,) = (tmp_path / "work/checkpoints/runs").iterdir()
    evaluation = json.loads((run_dir / "eval.json").read_text())
    before, after = evaluation["begun_with"]["domains"]["en"]["loss"], evaluation["domains"]["en"]["loss"]
    assert after < before - 0.5, (before, after)

    out = run_dir / "export" / "transformers"
    for name in FILES:
        there = tmp_path / "model" / name
        assert not there.exists() or name == "generation_config.json" or (out / name).read_bytes() == there.read_bytes()
    tuned, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert type(tuned).__name__ == "Qwen3ForCausalLM" and tuned.dtype == torch.bfloat16
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "1 + 1?"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    answered = tuned.generate(**asked, max_new_tokens=3, do_sample=False)
    assert answered.shape[1] > asked["input_ids"].shape[1]
    names = {key for file in (tmp_path / "model").glob("*.safetensors") for key in load_file(file)}
    assert load_file(out / "model.safetensors").keys() == names
