"""The real commands, as a user would run them, in processes of their own."""

import atexit
import contextlib
import json
import os
import select
import socket
import subprocess
import sys
import tempfile
from pathlib import Path


# two processes, on a port that no other test has
TWO = ("-m", "accelerate.commands.launch", "--multi_gpu", "--main_process_port", "0", "--num_processes", "2", "-m")
PATIENCE = 400  # seconds


def command(*argv, module="training", processes=1, launcher=None, **environment: str) -> subprocess.CompletedProcess:
    """Runs a module, or a script by its path, as that many processes, which find each other.

    They are forks of a process that has imported everything. With a `launcher`, which is Python's arguments before
    `module`, or with variables that libraries may read when they are imported, Python starts anew.
    """
    argv, module = list(map(str, argv)), str(module)
    if launcher is None and all(name.startswith("ACCELERATE_") for name in environment):
        return forked.run(module, argv, processes, environment)
    assert processes == 1, "others are the launcher's"
    launcher = launcher or ("-m",) * (not module.endswith(".py"))
    environment = os.environ | {"PYTHONPATH": os.getcwd()} | environment
    line = [sys.executable, *launcher, module, *argv]
    return subprocess.run(line, capture_output=True, text=True, env=environment, timeout=PATIENCE)


def trained(*argv, **options) -> str:
    """What a command that went well has printed."""
    finished = command(*argv, **options)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def scripted(script: str, folder: Path, *argv, **options) -> subprocess.CompletedProcess:
    """A command in which a script, which is written to `folder`, has replaced something."""
    (folder / "script.py").write_text(script)
    return command(*argv, module=folder / "script.py", **options)


class _Forked:
    """The process of `forked.py`, which is started when it is needed."""

    def __init__(self):
        self.server = None
        atexit.register(self.stop)

    def stop(self) -> None:
        """With all that it has started."""
        if self.server:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.server.pid, 9)
            self.server.communicate()
            self.server = None

    def start(self, module: str, argv: list[str], streams: tuple[Path, Path], environments: list[dict],
              is_background: bool) -> int:  # fmt: skip
        """The answer: an exit code, or the process's number."""
        if self.server is None:
            self.server = subprocess.Popen(
                [sys.executable, "-m", "tests.forked"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                start_new_session=True, cwd=Path(__file__).parent.parent,
            )  # fmt: skip
        for stream in streams:
            stream.touch()
        return self.answer({
            "module": module, "argv": argv, "folder": os.getcwd(), "streams": list(map(str, streams)),
            "environments": environments, "is_background": is_background,
        })  # fmt: skip

    def run(self, module: str, argv: list[str], processes: int, environment: dict) -> subprocess.CompletedProcess:
        with tempfile.TemporaryDirectory() as folder:
            streams = Path(folder) / "stdout", Path(folder) / "stderr"
            environments = [environment | variables for variables in ranks(processes)]
            try:
                code = self.start(module, argv, streams, environments, is_background=False)
            except BaseException:  # the next command shall not be given this one's answer
                self.stop()
                print(*(stream.read_text() for stream in streams))
                raise
            return subprocess.CompletedProcess([module, *argv], code, *(stream.read_text() for stream in streams))

    def answer(self, request: dict) -> int:
        """For a command, the exit code of the process that has failed first, or 0."""
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        if not select.select([self.server.stdout], [], [], PATIENCE)[0]:
            raise subprocess.TimeoutExpired(str(request), PATIENCE)
        line = self.server.stdout.readline()
        if not line:
            raise RuntimeError("tests.forked has ended")
        return json.loads(line.replace("None", "null"))


def ranks(processes: int) -> list[dict[str, str]]:
    """What torchrun tells each of so many processes by its variables."""
    if processes == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        {name: str(value) for name, value in (shared | {"RANK": rank, "LOCAL_RANK": rank}).items()}
        for rank in range(processes)
    ]


forked = _Forked()


class Background:
    """A command in the background, as a fork in a separate session.

    Args:
        folder: Where its streams are written.
        environment: Variables beside those of this process.
    """

    def __init__(self, *argv, folder: Path, module="training", **environment: str):
        self.streams = folder / "stdout", folder / "stderr"
        self.pid = forked.start(str(module), list(map(str, argv)), self.streams, [environment], is_background=True)
        self.code = None

    def poll(self, seconds: float = 0.02) -> int | None:
        """The exit code, if it has ended within so many seconds."""
        if self.code is None:
            self.code = forked.answer({"wait": self.pid, "seconds": seconds})
        return self.code

    def send(self, number: int, whom: str = "process") -> None:
        """A signal to the process, or to the group, workers too, as a terminal or Slurm does."""
        (os.kill if whom == "process" else os.killpg)(self.pid, number)

    @property
    def stdout(self) -> str:
        return self.streams[0].read_text()

    @property
    def stderr(self) -> str:
        return self.streams[1].read_text()
