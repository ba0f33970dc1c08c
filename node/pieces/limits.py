"""What serving and fetching pieces may cost at most, each with its reason."""

from __future__ import annotations

from dataclasses import dataclass, field

from cargos.shards.pieces_plan import PiecesPolicy
from protocol.limits import MIB


@dataclass(frozen=True, slots=True)
class ServeLimits:
    """Of what others fetch from us."""

    max_streams: int = 32
    """Each holds one chunk of a file in memory; more peers at once only make each of them slower."""

    max_streams_per_peer: int = 8
    """A peer needs one per file that it fetches; an Island that starts fetches all its Cargos at once."""

    read_bytes: int = 1 * MIB
    """Read per thread hop: it costs 40 us, reading 1 MiB some 200 us."""

    readers: int = 2
    """Threads that read for all streams; disks do not become faster by more."""

    max_questions: int = 8
    """Parts of the list or of the holdings asked for and not answered, per stream."""

    hello_s: float = 10.0
    """A new stream must say which file it is about within this time."""

    idle_s: float = 60.0
    """A stream on which nothing was asked for so long is closed; fetching peers ask more often than that."""

    yield_s: float = 10.0
    """Where all places are taken, a stream on which no piece moved for so long makes way for a new one."""

    send_s: float = 30.0
    """A frame that the other side does not take within this time ends the stream."""

    upload_bytes_per_s: int = 0
    """To all peers together; 0: without limit."""


@dataclass(frozen=True, slots=True)
class FetchLimits:
    """Of what we fetch from others."""

    policy: PiecesPolicy = field(default_factory=PiecesPolicy)

    max_peers: int = 8
    """Asked at once. Each has one piece in memory that is not complete, and some more that are checked."""

    unchecked_pieces: int = 2
    """Per peer: complete, not verified and stored yet. Beyond it we read no more from that peer."""

    open_s: float = 15.0
    """Reaching a peer and hearing what it has."""

    list_s: float = 8.0
    """Each part of the piece list (128 KiB) must come within this time: others wait for it."""

    search_s: float = 10.0
    """Who has the file is asked this often while there is room for more peers."""

    ask_again_s: float = 2.0
    """Peers that had nothing of what is wanted are asked this often whether they have it by now."""

    again_s: float = 1.0
    """A peer that had given something when it broke off is tried again after so long."""

    penalty_s: float = 30.0
    """Any other that broke off, refused or could not be reached is left alone for so long."""

    patience_s: float = 60.0
    """Without a single new piece for so long a fetch from peers ends; the origin may have what they do not."""

    idle_s: float = 5.0
    """So does one that has peers, none of which has had anything to give for so long."""

    ban_s: float = 3600.0
    """A peer that sent what is not in the file is asked for nothing for so long."""

    max_banned: int = 256
    """Peers of which that is remembered."""
