"""Bounds and patience of the ring machine, each with its reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from protocol.instants import MILLISECOND_NS, SECOND_NS
from protocol.limits import MIB
from protocol.ring import MAX_FEED_BYTES, MAX_FEED_ROWS

#: Rows and bytes on the way to a stage that it has not acknowledged; whatever its own policy says, nobody
#: sends more than this. 1,024 rows are sixteen steps of the engine: enough to keep all stages of a chain busy.
MAX_WINDOW_ROWS: Final = 1024
MAX_WINDOW_BYTES: Final = 2 * MAX_FEED_BYTES

#: What a stage takes in from a stage before it: its window, and one feed that was begun within it. A stage that
#: takes over has a window of its own while the engine works on that of the one before.
MAX_TAKEN_ROWS: Final = 4 * MAX_WINDOW_ROWS + MAX_FEED_ROWS

#: Bytes held back while the engine finishes rows that are void by now.
MAX_HELD_BYTES: Final = MAX_WINDOW_BYTES + MAX_FEED_BYTES

#: A timer that fires later than this says that this process was stopped: nobody else is to blame for the
#: silence.
LATE_NS: Final = 500 * MILLISECOND_NS

#: Changes of mind that a head remembers one by one. Only rows that are still on their way need them.
MAX_CUTS: Final = 1024

#: Feeds whose time is being taken, per session: those within one window, one row each, and more are not needed.
MAX_MARKS: Final = 64

#: The weight of a new measurement is one part in this.
SMOOTHING: Final = 8

#: A draw of at most this many rows says what one traversal takes; larger ones are prompts.
TRIP_ROWS: Final = 32


@dataclass(frozen=True, slots=True)
class RingPolicy:
    """Durations in nanoseconds."""

    ping_ns: int = 250 * MILLISECOND_NS
    """Between pings on a link that sessions use."""
    dead_ns: int = SECOND_NS
    """Silence until a stage is given up: four pings. Its network answers while its engine computes."""
    connect_ns: int = 2500 * MILLISECOND_NS
    """Until the first word of a peer that has to be dialled."""
    open_ns: int = 4 * SECOND_NS
    """Until a stage that answers pings answers to `RingOpen`."""
    retry_ns: int = 500 * MILLISECOND_NS
    """Until the head, which only the gateway can replace, is tried again by the stage before it..."""
    head_tries: int = 6
    """...so often."""
    stall_ns: int = 60 * SECOND_NS
    """Rows are with a stage that lives, but it acknowledges none for this long: its engine hangs. A step
    of 63 rows may take 10 s on a small machine, and other sessions have their turns between."""
    drain_ns: int = 30 * SECOND_NS
    """Until the engine has computed what is void by now; then its memory of the session is given up."""
    orphan_ns: int = 30 * SECOND_NS
    """A session without the stage before it is kept this long: somebody may take that place."""
    idle_ns: int = 600 * SECOND_NS
    """A session that gets no rows for this long gives its slot back: as long as a job may take unless its offer
    says otherwise. Should it go on after all, its rows are made once more."""
    end_ns: int = SECOND_NS
    """Until the end has gone round the ring."""
    window_rows: int = 512
    """On the way to the next stage. A feed goes if there is room for one row, so a single one always passes."""
    window_bytes: int = MAX_FEED_BYTES
    ack_rows: int = 8
    """Rows that come one by one are acknowledged when there are so many of them (or a quarter of the window),
    or within a second: nobody waits for it, and a message costs two nodes as much as a token does."""
    acks_at_once: int = 4
    """The first ones after a stage was opened: whoever opened it learns that it works, and how fast."""
    feed_rows: int = 256
    """Rows in one feed when there is a backlog (a prompt, a replay): four steps of the engine."""
    feed_bytes: int = 2 * MIB
    log_bytes: int = 256 * MIB
    """Outputs kept for replays, all sessions of this node together. 16,000 rows of the largest models. Beyond
    it the session with the longest log forgets first what the next stage has; if that one dies, this stage
    asks for its own input again and recomputes (`RingOpened(again)`), so nothing is lost but time."""
    most_log_bytes: int = 512 * MIB
    """Outputs that the next stages have not are kept beyond that, but no more than this: stages before and
    behind one that keep to no window could else fill its memory. Beyond it the session with the longest log is
    given up here, as if there were no slot for it."""
    sessions: int = 128
    """At once in this node. The engine's slots bound it further; each costs a few KiB here."""
    sessions_per_peer: int = 64

    @property
    def ack_due(self) -> int:
        """Rows that are acknowledged together."""
        return max(1, min(self.ack_rows, self.window_rows // 4))

    def __post_init__(self) -> None:
        if self.window_rows > MAX_WINDOW_ROWS or self.window_bytes > MAX_WINDOW_BYTES:
            raise ValueError("the window is larger than what stages take in")
        if self.feed_rows > MAX_FEED_ROWS or self.feed_bytes > MAX_FEED_BYTES:
            raise ValueError("a feed is larger than what a message holds")
