"""Runs our commands in forks of one process, which has imported what they need: that takes longer than most of them.

`python -m tests.forked` reads a line of JSON for each from stdin, and answers with its exit code. A fork that has
become a command is one: with its own arguments, variables and streams, and an end like any other's.
"""

import gc
import json
import os
import runpy
import signal
import sys
import time

import matplotlib.pyplot  # noqa: F401
import numpy as np
import timm  # noqa: F401

import evaluation.suite  # noqa: F401
import training  # noqa: F401


def take_requests() -> tuple[dict, dict] | None:
    """In a fork, what it is asked to do, and its variables; at the end of stdin, None."""
    for line in sys.stdin:
        request, processes = json.loads(line), []
        if "wait" in request:
            print(code_within(request["wait"], request["seconds"]), flush=True)
            continue
        for environment in request["environments"]:
            process = os.fork()
            if process == 0:
                return request, environment
            processes.append(process)
        print(processes[0] if request["is_background"] else code_of(processes), flush=True)
    return None


def code_within(process: int, seconds: float) -> int | None:
    """The exit code of a process, or `null` if it has none after so many seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    return None


def code_of(processes: list[int]) -> int:
    """When all have ended, that of the first that has failed; the others are then told to end, as by launchers."""
    code, running = 0, set(processes)
    while running:
        process, status = os.wait()
        running.remove(process)
        if code == 0 and (code := os.waitstatus_to_exitcode(status)):
            time.sleep(1)  # in which they may say why they fail, too
            for other in running:
                os.kill(other, signal.SIGTERM)
    return code


def become(request: dict, environment: dict) -> None:
    if request["is_background"]:
        os.setsid()  # so that signals can be sent to it with its workers
    os.environ.update(environment)
    os.chdir(request["folder"])
    for descriptor, path in enumerate((os.devnull, *request["streams"])):
        os.dup2(os.open(path, os.O_RDWR | os.O_APPEND), descriptor)
    np.random.seed()  # as NumPy does when it is imported
    module = request["module"]
    sys.argv = [module, *request["argv"]]
    if module.endswith(".py"):
        runpy.run_path(module, run_name="__main__")
    else:
        runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    gc.freeze()  # or the first collection of each would copy all that is shared
    if request := take_requests():
        become(*request)
