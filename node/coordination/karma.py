"""The karma that a coordinator states and holds: signed, spread, kept across restarts, put into the DHT.

What this node stated itself is kept on disk, and what it forgot may come back by gossip: its counts must
not begin at zero again (routing/karma_witness.py).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, ClassVar, Final

import structlog
import trio
from msgspec import Meta

from dht.records import seal_record
from node.overlay.cache import OverlayFiles
from node.overlay.overlay import Overlay
from protocol.codec import Codec, Message, encode
from protocol.envelope import Envelope, Signer
from protocol.errors import ProtocolError
from protocol.ids import PeerId
from protocol.instants import SECOND_NS, UnixNs
from protocol.limits import MAX_ISLANDS_PER_COORDINATOR, MIB
from routing.gossip_messages import Item
from routing.karma import KarmaPolicy, Statement
from routing.karma_store import KarmaStore
from routing.karma_wire import (
    KARMA_NAMESPACE,
    MAX_SEALED_BYTES,
    karma_item,
    karma_record,
    open_statement_untrusted,
    seal_statement,
)
from routing.trust import FULL

#: Statements that go into the DHT a minute: each costs a lookup and some twenty messages. What waits is put
#: later; gossip has spread it meanwhile.
RECORDS_PER_MINUTE: Final = 30

#: A karma record holds this long without being put anew.
RECORD_TTL_NS: Final = 24 * 3600 * SECOND_NS

#: Our own statements are written down this often if there are new ones, and at the end.
SAVE_S: Final = 30.0

_FILE: Final = "karma-own"

_log = structlog.get_logger("karma")


class OwnStatements(Message, frozen=True, gc=False, tag="own-karma"):
    """The file: our sealed statements, the latest about each subject."""

    max_bytes: ClassVar[int] = 8 * MIB

    statements: Annotated[
        tuple[Annotated[bytes, Meta(max_length=MAX_SEALED_BYTES)], ...],
        Meta(max_length=MAX_ISLANDS_PER_COORDINATOR),
    ]


_OWN: Final[Codec[OwnStatements]] = Codec(OwnStatements)
_ENVELOPE: Final[Codec[Envelope]] = Codec(Envelope)


class KarmaKeeper:
    """`store` judges; `state` takes what the coordinator's witness says is due."""

    def __init__(
        self,
        signer: Signer,
        overlay: Overlay,
        data_dir: Path,
        *,
        seeds: Iterable[PeerId] = (),
        policy: KarmaPolicy = KarmaPolicy(),  # noqa: B008 - frozen: one shared default is safe
        spread: Callable[[Item], None],
    ) -> None:
        self.policy: Final = policy
        self.store: Final[KarmaStore[PeerId]] = KarmaStore(
            signer.peer, dict.fromkeys(seeds, FULL), policy=policy
        )
        self._signer = signer
        self._overlay = overlay
        self._files = OverlayFiles(data_dir)
        self._spread = spread
        self._own: OrderedDict[PeerId, Envelope] = OrderedDict()
        self._unpublished: OrderedDict[PeerId, None] = OrderedDict()
        self._dirty = False

    def restore(self) -> list[Statement[PeerId]]:
        """Our statements of earlier runs, for the witness; they are spread again."""
        data = self._files.load_values_untrusted().get(_FILE)
        if data is None:
            return []
        try:
            sealed = _OWN.decode_untrusted(data).statements
        except ProtocolError as error:
            _log.warning("our own karma statements are damaged; we begin anew", reason=error.detail)
            return []
        found: list[Statement[PeerId]] = []
        for one in sealed:
            try:
                envelope = _ENVELOPE.decode_untrusted(one)
                statement = open_statement_untrusted(envelope, self.policy, self._overlay.unix_now())
            except ProtocolError:
                continue  # too old by now
            if statement.issuer == self._signer.peer:
                found.append(statement)
                self._hold(statement, envelope)
        return found

    def state(self, statements: Iterable[Statement[PeerId]]) -> None:
        """Sign these, hold them, spread them."""
        for statement in statements:
            envelope = seal_statement(self._signer, statement, self.policy)
            self._hold(statement, envelope)
            self._unpublished[statement.subject] = None
            self._dirty = True

    def learn(self, statement: Statement[PeerId]) -> bool:
        """A statement came by gossip, verified. Whether it is our own, from before a loss of memory."""
        self.store.merge(statement, self.epoch())
        return statement.issuer == self._signer.peer

    def epoch(self) -> int:
        return self.policy.epoch_at(self._overlay.unix_now())

    def points_mpt(self, peer: PeerId) -> int:
        """Thousandths of a point, by our own judgement."""
        return self.store.points_mpt(peer, self.epoch())

    async def run(self) -> None:
        """Save and publish, until cancelled."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._save_often)
                nursery.start_soon(self._publish)
        finally:
            self.save()

    def save(self) -> None:
        if self._dirty:
            self._dirty = False
            own = tuple(encode(envelope) for envelope in self._own.values())
            self._files.save_value(_FILE, encode(OwnStatements(own)))

    # --- inside -------------------------------------------------------------------------------------

    def _hold(self, statement: Statement[PeerId], envelope: Envelope) -> None:
        self._own[statement.subject] = envelope
        self._own.move_to_end(statement.subject)
        if len(self._own) > MAX_ISLANDS_PER_COORDINATOR:
            gone, _ = self._own.popitem(last=False)
            self._unpublished.pop(gone, None)
        self.store.merge(statement, self.epoch())
        self._spread(karma_item(envelope))

    async def _save_often(self) -> None:
        while True:
            await trio.sleep(SAVE_S)
            self.save()
            self.store.expire(self.epoch())

    async def _publish(self) -> None:
        """Put what we state into the DHT at the subject's key, a few a minute, the longest waiting first."""
        while True:
            await trio.sleep(60 / RECORDS_PER_MINUTE)
            if not self._unpublished or not self._overlay.view().joined:
                continue
            subject, _ = self._unpublished.popitem(last=False)
            await self._publish_one(subject)

    async def _publish_one(self, subject: PeerId) -> None:
        record = karma_record(self._own.get(subject), ())
        if record is None:
            return
        now = self._overlay.unix_now()
        envelope = seal_record(
            self._signer,
            KARMA_NAMESPACE,
            subject,
            encode(record),
            sequence=now,
            expires_unix_ns=UnixNs(now + RECORD_TTL_NS),
        )
        stored = await self._overlay.put_record(envelope)
        if not stored.copies:
            self._unpublished[subject] = None
