"""The first process of the lab: runs one command and buries the orphans that it leaves.

    unshare --pid --fork python -m tests.lab.init COMMAND...

When it ends, the kernel ends whatever is left in its process namespace.
"""

from __future__ import annotations

import os
import signal
import sys


def main() -> None:
    """Entry point; ends with the command's code, 128 + n if signal n ended it."""
    child = os.fork()
    if child == 0:
        os.execvp(sys.argv[1], sys.argv[1:])
    # Ctrl-C reaches the child by itself, a kill of the lab only through here.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, _: os.kill(child, number))
    while True:
        ended, status = os.wait()
        if ended == child:
            code = os.waitstatus_to_exitcode(status)
            sys.exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    main()
