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
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started the lab sees to that
    while True:
        ended, status = os.wait()
        if ended == child:
            code = os.waitstatus_to_exitcode(status)
            sys.exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    main()
