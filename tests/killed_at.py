"""train.py, killed before its n-th operation on the files below a path: python3 killed_at.py ARGUMENTS PROCESS N PATH

An operation is what Python tells its audit hooks of: to open, rename or remove something, to make or read a directory.
"""

import os
import signal
import sys

import train

OPERATIONS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.scandir"}
process, last, path = int(sys.argv[-3]), int(sys.argv[-2]), sys.argv[-1]
done = 0


def watch(event, arguments):
    global done
    if event in OPERATIONS and str(arguments[0]).startswith(path) and int(os.environ.get("RANK", 0)) == process:
        done += 1
        if done == last:
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    sys.addaudithook(watch)
    train.main(sys.argv[1:-3])
    print("operations", done)
