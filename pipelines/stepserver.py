"""Run the pipeline's steps as forks of one process that has already imported their packages.

kfp.local starts a Python process for each of a dozen steps; each spends half a CPU second on nearly the same imports.
Here a server process imports them once and forks each step. It has no threads, so that forking is safe, and it ignores
signals, which are meant for the steps.
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

import components.measuring  # noqa: F401  like the next line: all steps import it
import manifests.spec  # noqa: F401

IN_KFP = "ephemeral_component.py"  # kfp's command writes a component's source to it
MARK = b"step"


class StepServer:
    """Starts steps until it is closed."""

    def __init__(self) -> None:
        """Fork this process, which must not have threads yet; the steps inherit its environment."""
        self._connection, theirs = socket.socketpair()
        self._server = os.fork()
        if not self._server:
            self._connection.close()
            gc.freeze()  # else each step's garbage collector would copy the pages it shares with this process
            request = serve(theirs)
            if request is not None:
                execute(request)
            sys.exit()
        theirs.close()

    def run(self, full_command: Sequence[str], env_vars: dict[str, str] | None = None) -> int:
        """Replace kfp's run_local_subprocess: print the step's output; returns its exit code, -N for signal N.

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
            with suppress(BrokenPipeError):  # the server was killed; no output and no exit code will come
                socket.send_fds(self._connection, [MARK], [request.fileno(), step_output, step_code])
        os.close(step_output)
        os.close(step_code)
        with open(output, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                print(line, end="")
        with open(code, "rb") as told:  # empty if the server was killed
            ended = int(told.read() or -signal.SIGKILL)
        if ended == -signal.SIGKILL:  # the step itself could not report it
            print("killed (signal 9); if nobody did that, the machine has run out of memory")
        return ended

    def close(self) -> None:
        self._connection.close()
        os.waitpid(self._server, 0)


def serve(connection: socket.socket) -> IO[str] | None:
    """Fork a step for each request. Returns the request in each step, and None in the server when there are no more."""
    told: dict[int, int] = {}  # pid of a step → file descriptor for its exit code

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
    """A handler instead of SIG_IGN, which the child processes of a step would inherit."""


def execute(request: IO[str]) -> None:
    """Do what kfp's shell command does: write the component to a file and execute it with the arguments."""
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
