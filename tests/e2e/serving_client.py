"""Asks a server without pause, over lasting and over new connections, until the file /tmp/stop exists.

    python serving_client.py HOST PORT KEY MODEL

Prints one JSON object: how many answers there were, and everything that was not the expected answer. Nothing is tried
again. Runs in a pod, so it needs only the standard library.
"""

import http.client
import json
import sys
import threading
import time
from pathlib import Path

HOST, PORT, KEY, MODEL = sys.argv[1:]
HEADERS = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
answers, failures, texts = [], [], {}


def ask(connection, prompt, stream):
    body = {"model": MODEL, "prompt": prompt, "max_tokens": 16, "temperature": 0, "stream": stream}
    connection.request("POST", "/v1/completions", json.dumps(body), HEADERS)
    response = connection.getresponse()
    data = response.read().decode()
    if response.status != 200:
        raise ValueError(f"{response.status} {data}")
    if not stream:
        return json.loads(data)["choices"][0]["text"]
    *events, done = [line.removeprefix("data: ") for line in data.splitlines() if line]
    if done != "[DONE]":
        raise ValueError(f"the stream ends with {done}")
    return "".join(json.loads(each)["choices"][0]["text"] for each in events)


def work(prompt, stream, lasting):
    connection = None
    while not Path("/tmp/stop").exists():
        try:
            connection = connection or http.client.HTTPConnection(HOST, int(PORT), timeout=60)
            text = ask(connection, prompt, stream)
            if texts.setdefault(prompt, text) != text:
                raise ValueError(f"{prompt}: {text!r} instead of {texts[prompt]!r}")
            answers.append(time.time())
        except Exception as error:
            failures.append(f"{time.time():.1f} {'lasting' if lasting else 'new'}: {type(error).__name__}: {error}")
            connection = None
        if connection and not lasting:
            connection.close()
            connection = None
        time.sleep(0.05)


threads = [
    threading.Thread(target=work, args=(f"river {n // 2}", stream, lasting))
    for n, (stream, lasting) in enumerate([(True, True), (False, True), (True, False), (False, False)])
]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
longest = max((b - a for a, b in zip(sorted(answers), sorted(answers)[1:], strict=False)), default=0.0)
print(json.dumps({"answers": len(answers), "failures": failures, "longest_pause": longest, "texts": texts}))
