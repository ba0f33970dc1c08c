"""What can go wrong with a remote. All expected; everything else that escapes is a bug of ours."""

from __future__ import annotations


class Unreachable(Exception):
    """The peer could not be reached, refused us, or does not speak the protocol. `reason` is for people."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class AddressInvalid(Unreachable):
    """The text is no address that this node can dial or listen on."""


class StreamBroken(Exception):
    """The stream is gone: reset by either side, or its connection was lost. Bytes in flight may be lost."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class ListenFailed(Exception):
    """No socket could be opened at the address we should listen on."""


class ChannelBroken(Exception):
    """Below the streams: the connection's bytes stop here. Never leaves this package."""
