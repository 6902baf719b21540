"""Scripts in processes of their own, without the seconds in which a new Python imports torch, transformers and DeepSpeed.

A server has them imported, one for each pytest worker, and forks. What it forks is a process like any other: signals reach
it, and its environment, session and streams are its own. What is left out is the start of Python and its end.
"""

import multiprocessing
import os
import runpy
import signal
import socket
import sys
from pathlib import Path
from tempfile import NamedTemporaryFile

ROOT = Path(__file__).parent.parent
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.forked", "deepspeed", "train"])


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def alone() -> dict[str, str]:
    """The environment of a run of its own, without the ranks and ports of the runs in this process."""
    of_runs = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    return {name: value for name, value in os.environ.items() if name not in of_runs}


class Fork:
    """`python3 SCRIPT ARGUMENTS` in a session of its own. environment: all variables; output: a file, or a terminal."""

    def __init__(self, *command, environment: dict, output):
        self.process = SERVER.Process(target=run, args=([str(word) for word in command], environment, str(output)))
        self.process.start()

    def wait(self, seconds: float = 300) -> int:
        """The exit status, or the negative number of the signal that ended it."""
        self.process.join(seconds)
        if self.process.is_alive():
            self.process.kill()
            raise TimeoutError(f"no end after {seconds} s")
        return self.process.exitcode


def run(command: list[str], environment: dict, output: str):
    """In the process that was forked."""
    multiprocessing.set_start_method(None, force=True)  # what this process starts, it starts as any other
    os.setsid()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # `nohup make test` ignores it
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    file = os.open(output, os.O_RDWR | os.O_APPEND)  # a terminal becomes that of this session
    for stream in range(3):
        os.dup2(file, stream)
    sys.stdin, (sys.stdout, sys.stderr) = open(0), (open(number, "w", buffering=1) for number in (1, 2))
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")


def run_to_the_end(*command, processes: int = 1) -> tuple[list[int], str]:
    """A script in one process, or in several as the launcher starts them: their exit statuses, and what they print."""
    together = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    together |= {"WORLD_SIZE": processes, "LOCAL_SIZE": processes}
    with NamedTemporaryFile() as printed:
        forks = []
        for rank in range(processes):
            numbers = {**together, "RANK": rank, "LOCAL_RANK": rank} if processes > 1 else {}
            environment = alone() | {name: str(number) for name, number in numbers.items()}
            forks.append(Fork(*command, environment=environment, output=printed.name))
        statuses = [fork.wait() for fork in forks]
        return statuses, Path(printed.name).read_text(encoding="utf-8")
