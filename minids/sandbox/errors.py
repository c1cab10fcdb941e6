"""What a sandbox raises."""


class IsolationUnavailable(OSError):
    """The isolation layers are not available on this machine; the message says what was tried."""


class Failed(Exception):
    """The isolated process failed or cheated; the message is the reason."""
