"""A child of `tdb up` ends with its supervisor, even when that is killed and can tell nobody.

The supervisor gives each child the reading end of a pipe, by number in TDB_PARENT_FD, and keeps
the writing end. Nothing is ever written: end of file means that the supervisor is gone. This works
wherever there are pipes, and needs no polling.
"""

import os
import signal
import threading
import time

PARENT_FD = "TDB_PARENT_FD"


def follow_parent(grace_s: float) -> None:
    """Ends this process when its supervisor has ended: by SIGTERM, by force after `grace_s`.

    Does nothing in a process that `tdb up` did not start.
    """
    number = os.environ.get(PARENT_FD)
    if number is None:
        return
    thread = threading.Thread(
        target=_wait, args=(int(number), grace_s), name="follow-parent", daemon=True
    )
    thread.start()


def _wait(fd: int, grace_s: float) -> None:
    while os.read(fd, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(grace_s)
    os._exit(1)
