"""Steps of the pipeline as copies of one process that has imported what they all import.

kfp.local starts a Python for each of a dozen steps, which spends half a second of a processor on imports, nearly the
same ones in all. Here they are imported once, and each step is a fork of a process that has them. It has no threads, so
that a fork of it is whole, and it outlives signals, which are meant for the steps.
"""

from __future__ import annotations

import gc
import json
import os
import random
import signal
import socket
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from typing import IO

from kfp.dsl import executor_main

import components.measuring  # noqa: F401  as the next, imported by all steps
import manifests.spec  # noqa: F401

IN_KFP = "ephemeral_component.py"  # what kfp's command writes a component's source to
MARK = b"step"


class StepServer:
    """Starts steps, until it is closed."""

    def __init__(self) -> None:
        """Forks this process, which must not have threads yet; the steps get its environment."""
        self._connection, theirs = socket.socketpair()
        self._server = os.fork()
        if not self._server:
            self._connection.close()
            gc.freeze()  # else the collector of each step would copy the memory that it shares with this process
            request = serve(theirs)
            if request is not None:
                execute(request)
            sys.exit()
        theirs.close()

    def run(self, full_command: Sequence[str], env_vars: dict[str, str] | None = None) -> int:
        """In place of kfp's run_local_subprocess: print what a step prints; its exit code, -N if signal N ended it.

        Raises:
            ValueError: the command is not one that executes a component.
        """
        _, _, script, source, *arguments = full_command
        if IN_KFP not in script:
            raise ValueError(f"not a component of kfp: {script}")
        output, step_output = os.pipe()
        code, step_code = os.pipe()
        with tempfile.TemporaryFile("w+") as request:
            json.dump({"source": source, "arguments": arguments, "environment": env_vars or {}}, request)
            request.flush()
            with suppress(BrokenPipeError):  # the server was killed; nothing will be printed or told
                socket.send_fds(self._connection, [MARK], [request.fileno(), step_output, step_code])
        os.close(step_output)
        os.close(step_code)
        with open(output, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                print(line, end="")
        with open(code, "rb") as told:  # nothing, if the server was killed
            ended = int(told.read() or -signal.SIGKILL)
        if ended == -signal.SIGKILL:  # which nothing in the step could say
            print("killed (signal 9); if nobody did that, the machine has run out of memory")
        return ended

    def close(self) -> None:
        self._connection.close()
        os.waitpid(self._server, 0)


def serve(connection: socket.socket) -> IO[str] | None:
    """Fork a step for each request; returns in each step, with the request, and None when there are no more."""
    told: dict[int, int] = {}  # step → where its exit code is awaited

    def reap(*_: object) -> None:
        for step in list(told):
            ended, status = os.waitpid(step, os.WNOHANG)
            if ended:
                with suppress(BrokenPipeError), open(told.pop(step), "wb", buffering=0) as code:
                    code.write(str(os.waitstatus_to_exitcode(status)).encode())

    # Signals to all processes of the run are meant for the steps.
    handlers = {signal.SIGINT: _ignore, signal.SIGTERM: _ignore, signal.SIGCHLD: reap}
    for number, handler in handlers.items():
        signal.signal(number, handler)
    while True:
        mark, descriptors, _, _ = socket.recv_fds(connection, len(MARK), 3)
        if not mark:
            return None
        request, output, code = descriptors
        signal.pthread_sigmask(signal.SIG_BLOCK, handlers)
        if step := os.fork():
            os.close(request)
            os.close(output)
            told[step] = code
            signal.pthread_sigmask(signal.SIG_UNBLOCK, handlers)
            continue
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, handlers)
        connection.close()
        for other in (code, *told.values()):
            os.close(other)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.close(output)
        return os.fdopen(request, "r")


def _ignore(*_: object) -> None:
    """A handler, and not SIG_IGN, which what a step starts would inherit."""


def execute(request: IO[str]) -> None:
    """What kfp's command does in a shell: write the component to a file and execute it with the arguments."""
    with request:
        request.seek(0)
        wanted = json.load(request)
    random.seed()
    os.environ |= {"_KFP_RUNTIME": "true", **wanted["environment"]}
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, IN_KFP)
        with open(file, "w", encoding="utf-8") as component:
            component.write(wanted["source"])
        sys.argv = ["executor_main", "--component_module_path", file, *wanted["arguments"]]
        executor_main.executor_main()
