"""Servers as processes, for tests."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
from ports import free_port

KEY = "a key of many"


@dataclass
class Process:
    """A server. Its output is read by a thread, so that it never blocks."""

    process: subprocess.Popen[str]
    lines: list[str]
    metrics: int

    @property
    def address(self) -> str:
        found = [re.search(r"http://\S+", line) for line in self.lines]
        return next(each[0] for each in found if each).removesuffix("/v1")

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.address}/v1", api_key=KEY, max_retries=0, timeout=60)

    def get(self, path: str) -> tuple[int, Any]:
        try:
            with urllib.request.urlopen(self.address + path, timeout=60) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def metric(self, name: str) -> float:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics}/metrics", timeout=60) as response:
            return sum(float(x) for x in re.findall(rf"^yaongi_serve_{name}\S* (\S+)$", response.read().decode(), re.M))


def start(directory: Path, *options: str, key: str = "") -> Process:
    metrics = free_port()
    command = [sys.executable, "-m", "trainer.serving", str(directory), "--port=0", f"--metrics-port={metrics}"]
    environment = {**os.environ, "YAONGI_API_KEY": key, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    lines: list[str] = []
    threading.Thread(target=lambda: lines.extend(process.stdout or ()), daemon=True).start()
    return Process(process, lines, metrics)
