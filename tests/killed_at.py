"""train.py, to which something happens before a certain operation on its files: python3 killed_at.py ARGUMENTS EVENT

EVENT is a JSON object:
    directory   where the files are
    process     which process it happens to
    operation   before which operation, as this script writes them: "os.rename state/.epoch-1-step-4.tmp"; "" for none
    signal      the signal to be sent, or 0 for a disk that is full
    to          who gets the signal: that process, the "group" of all processes, or the "command" that started them;
                or nobody, and it waits until its "terminal" is closed

An operation is what Python tells its audit hooks of: to open, rename or remove something, to make or read a directory.
At the end the operations are printed, one a line.
"""

import errno
import json
import os
import re
import signal
import sys
import time
from contextlib import suppress

import psutil

import train

OPERATIONS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.scandir"}
event = json.loads(sys.argv[-1])
rank = int(os.environ.get("RANK", 0))
met = []


def watch(name, arguments):
    if name not in OPERATIONS or not str(arguments[0]).startswith(event["directory"]):
        return
    path = os.path.relpath(str(arguments[0]), event["directory"]).replace(f".{os.getpid()}.", ".")
    met.append(f"{name} {re.sub('tfevents.*', 'tfevents', path)}")
    if rank == event["process"] and met[-1] == event["operation"] and met.count(met[-1]) == 1:
        happens()


def happens():
    if event["signal"] == 0:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if event["to"] == "group":
        os.killpg(0, event["signal"])
    elif event["to"] == "terminal":
        print("waits for its terminal to be closed", flush=True)
        with suppress(OSError):  # which it is then
            os.read(0, 1)
    elif event["to"] == "command":
        launcher = psutil.Process(os.getppid())
        os.kill(os.getpgrp(), event["signal"])
        while launcher.is_running() and launcher.ppid() == os.getpgrp():  # until the command is gone
            time.sleep(0.01)
    else:
        os.kill(os.getpid(), event["signal"])
    while event["signal"] == signal.SIGKILL:  # goes no further
        signal.pause()


if __name__ == "__main__":
    sys.addaudithook(watch)
    train.main(sys.argv[1:-1])
    print("".join(f"operation of {rank}: {operation}\n" for operation in met), end="", flush=True)
