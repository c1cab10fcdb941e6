"""A process inside the isolation layers, and the socket that leads to it."""

import json
import os
import signal
import socket
import subprocess
from collections.abc import Mapping
from contextlib import suppress

from minids.sandbox.isolation import LIBRARIES


class IsolatedProcess:
    """A process that was started with an isolating command line, until closed; `socket` is its standard input."""

    def __init__(self, line: list[str], environment: Mapping[str, str] | None = None, folder: str = "/"):
        self.socket, theirs = socket.socketpair()
        readable, writable = os.pipe()
        isolated_by_bubblewrap = line[0].endswith("bwrap")
        with theirs, open(readable, "rb") as info, open(writable, "wb") as report:
            if isolated_by_bubblewrap:
                line = [line[0], "--info-fd", str(report.fileno()), *line[1:]]
            self.process = subprocess.Popen(
                line,
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env={"LD_LIBRARY_PATH": LIBRARIES} | dict(environment or {}),
                cwd=folder,
                pass_fds=[report.fileno()],
                start_new_session=True,
            )
            report.close()
            self.inner = None
            with suppress(ValueError, ProcessLookupError):  # bubblewrap failed: it says why on stderr
                if isolated_by_bubblewrap:  # its first process inside: killing it ends all others
                    self.inner = os.pidfd_open(json.loads(info.read())["child-pid"])

    def close(self) -> bytes:
        """Kill everything inside, wait for its end, and return what it wrote to stderr while starting."""
        if self.inner is None:
            self.process.kill()
        else:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.inner, signal.SIGKILL)
            os.close(self.inner)
        self.socket.close()
        return self.process.communicate()[1]
