"""Load on the server: 64 streams at the same time against one, on an untrained `tiny`, on this machine.

    python benchmarks/serve.py [--seconds 120] [--streams 64] [--check]

Each client asks one of 64 prompts after the other, greedily, and compares each text with what the server wrote when it
had nothing else to do. Prints tokens per second alone and together, their ratio, what was refused, and the memory of
the server after a tenth of the time and at the end. `--check` fails if a text differs, an answer is an error other than
429, memory has grown by more than 5%, or the ratio is below 4.
"""

from __future__ import annotations

import argparse
import asyncio
import gzip
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file

from manifests.spec import load_job
from trainer.checkpoints.checkpoint import describe_files
from trainer.data import tokenizer as tokenizers
from trainer.export import FORMAT, MANIFEST
from trainer.fields import stored, version_of
from trainer.kinds.ngrams import token_classes
from trainer.model.hybrid import build_model
from trainer.specbase import VERSION_FIELD

SAMPLE = Path(__file__).parents[1] / "components" / "download" / "sample" / "ko.jsonl.gz"
WANTED, MOST_GROWTH, PROMPTS = 4.0, 1.05, 64
READY = re.compile(r"listening on http://([\d.]+):(\d+)/v1")


def untrained(folder: Path) -> None:
    """Write an export of `tiny` with random weights, far from ties between tokens."""
    spec = load_job("tiny").train.model
    with gzip.open(SAMPLE, "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    tokenizers.save(tokenizers.train(texts, spec.vocab_size), folder)
    model = build_model(spec, seed=0, token_classes=token_classes(folder / "tokenizer.json"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(stored(spec)))
    files = describe_files(folder, ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"])
    manifest = {"format": FORMAT, VERSION_FIELD: version_of(spec), "name": "tiny"}
    manifest["files"] = {name: entry.model_dump() for name, entry in files.items()}
    (folder / MANIFEST).write_text(json.dumps(manifest))


@dataclass
class Load:
    """A client of the server, and what it has seen.

    The official client would take as much of the two cores as the server, so this one speaks only what it needs.
    """

    host: str
    port: int
    expected: dict[int, str] = field(default_factory=dict)
    tokens: int = 0
    answers: int = 0
    refused: int = 0
    wrong: list[str] = field(default_factory=list)

    async def stream(self, prompt: int) -> tuple[int, str, int]:
        """Status, text and number of tokens of an answer."""
        rng = random.Random(prompt)
        ids = [rng.randrange(300, 4000) for _ in range(rng.randrange(4, 40))]
        body = {"model": "tiny", "prompt": ids, "max_tokens": rng.randrange(24, 64), "temperature": 0, "stream": True}
        data = json.dumps({**body, "stream_options": {"include_usage": True}}).encode()
        reader, writer = await asyncio.open_connection(self.host, self.port)
        try:
            head = (
                f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\nConnection: close\r\n\r\n"
            )
            writer.write(head.encode() + data)
            answer = (await reader.read()).decode()
        finally:
            writer.close()
        status = int(answer.split(" ", 2)[1])
        events = [json.loads(found) for found in re.findall(r"^data: (\{.*)$", answer, re.M)]
        text = "".join(choice["text"] for event in events for choice in event["choices"])
        whole = answer.rstrip("\r\n0").endswith("data: [DONE]")
        return (status if whole or status != 200 else 0), text, events[-1]["usage"]["completion_tokens"] if whole else 0

    async def ask(self, prompt: int) -> None:
        try:
            status, text, tokens = await self.stream(prompt)
        except OSError as error:
            self.wrong.append(f"prompt {prompt}: {error!r}")
            return
        if status == 429:
            self.refused += 1
            await asyncio.sleep(1)
        elif status != 200:
            self.wrong.append(f"prompt {prompt}: status {status}")
        elif self.expected.setdefault(prompt, text) != text:
            self.wrong.append(f"prompt {prompt}: {text!r} instead of {self.expected[prompt]!r}")
        else:
            self.answers += 1
            self.tokens += tokens

    async def client(self, number: int, until: float) -> None:
        rng = random.Random(number)
        while time.monotonic() < until:
            await self.ask(rng.randrange(PROMPTS))


def resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def measure(load: Load, pid: int, seconds: float, streams: int) -> dict[str, float]:
    for prompt in range(4):
        await load.ask(prompt)
    load.tokens, began = 0, time.monotonic()
    for prompt in range(PROMPTS):
        await load.ask(prompt)
    alone = load.tokens / (time.monotonic() - began)
    print(f"one stream: {alone:,.0f} tokens/s, {PROMPTS} texts", flush=True)
    load.tokens = load.answers = 0
    began = time.monotonic()
    clients = [asyncio.create_task(load.client(n, began + seconds)) for n in range(streams)]
    await asyncio.sleep(seconds / 10)
    before = resident(pid)
    await asyncio.gather(*clients)
    together = load.tokens / (time.monotonic() - began)
    return {"alone": alone, "together": together, "before": before, "after": resident(pid)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        untrained(Path(folder))
        command = [sys.executable, "-m", "trainer.serving", folder, "--port=0", "--length=256"]
        server = subprocess.Popen([*command, f"--rows={min(options.streams, 64)}"], stdout=subprocess.PIPE, text=True)
        try:
            assert server.stdout is not None
            address = None
            for line in server.stdout:
                print(line, end="", flush=True)
                address = address or READY.search(line)
                if line.startswith("ready"):
                    break
            assert address, "the server has ended"
            load = Load(address[1], int(address[2]))
            found = asyncio.run(measure(load, server.pid, options.seconds, options.streams))
        finally:
            server.terminate()
            server.wait()
    ratio, growth = found["together"] / found["alone"], found["after"] / found["before"]
    print(
        f"{options.streams} streams for {options.seconds:g} s: {found['together']:,.0f} tokens/s, "
        f"{ratio:.1f} times as many; {load.answers:,} texts as alone, {len(load.wrong)} wrong, "
        f"{load.refused} refused (429)\n"
        f"memory of the server: {found['before'] / 2**20:,.0f} MiB, at the end {found['after'] / 2**20:,.0f} MiB"
    )
    for line in load.wrong[:5]:
        print(line)
    if options.check and (load.wrong or ratio < WANTED or growth > MOST_GROWTH):
        sys.exit("not as it should be")


if __name__ == "__main__":
    main()
