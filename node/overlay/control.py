"""What the control socket answers about the overlay: `archi-node dht ...` (node/overlay/commands.py)."""

from __future__ import annotations

from dht.events import Cost, Stored
from dht.keys import key_of_record
from dht.records import open_record_untrusted, seal_record
from node.control import ControlMethods, ControlRefused, NoParams
from node.overlay.names import key_of_name
from node.overlay.overlay import Lookup, Overlay
from node.overlay.views import (
    ContactView,
    CostView,
    FindView,
    NameParams,
    PutParams,
    RecordParams,
    RecordsView,
    RecordView,
    StoredView,
    TableView,
)
from node.peers import Peers
from node.snapshot import overlay_snapshot
from protocol.envelope import Signer
from protocol.errors import ProtocolError
from protocol.instants import MILLISECOND_NS, SECOND_NS, UnixNs


class OverlayControl:
    """Answers for one overlay."""

    def __init__(self, overlay: Overlay, peers: Peers, signer: Signer) -> None:
        self._overlay = overlay
        self._peers = peers
        self._signer = signer

    def register(self, methods: ControlMethods) -> None:
        methods.serve("dht.peers", NoParams, self.peers)
        methods.serve("dht.find", NameParams, self.find)
        methods.serve("dht.get", RecordParams, self.get)
        methods.serve("dht.put", PutParams, self.put)
        methods.serve("dht.provide", NameParams, self.provide)
        methods.serve("dht.withdraw", NameParams, self.withdraw)
        methods.serve("dht.providers", NameParams, self.providers)

    async def peers(self, _: NoParams) -> TableView:
        machine = self._overlay.driver.machine
        rows = tuple(self._contact(entry.peer, verified=entry.verified) for entry in machine.table)
        return TableView(overlay_snapshot(self._overlay), rows)

    async def find(self, params: NameParams) -> FindView:
        key = _key(params.name)
        return self._found(key, await self._overlay.find_closest(key), providers=False)

    async def providers(self, params: NameParams) -> FindView:
        key = _key(params.name)
        return self._found(key, await self._overlay.find_providers(key), providers=True)

    async def get(self, params: RecordParams) -> RecordsView:
        key = key_of_record(params.namespace, params.name)
        found = await self._overlay.get_records(key)
        records: list[RecordView] = []
        for envelope in found.records:
            try:
                opened = open_record_untrusted(envelope, self._overlay.unix_now())
            except ProtocolError:
                continue  # expired since
            expires = opened.expires_unix_ns // SECOND_NS
            records.append(RecordView(opened.issuer, opened.sequence, expires, opened.body.value))
        return RecordsView(_hex(key), tuple(records), _cost(found.cost))

    async def put(self, params: PutParams) -> StoredView:
        now = self._overlay.unix_now()
        expires = UnixNs(now + params.ttl_s * SECOND_NS)
        try:
            envelope = seal_record(
                self._signer,
                params.namespace,
                params.name,
                params.value,
                sequence=now,
                expires_unix_ns=expires,
            )
        except ValueError as error:
            raise ControlRefused("bad-request", str(error)) from error
        key = key_of_record(params.namespace, params.name)
        return _stored(key, await self._overlay.put_record(envelope))

    async def provide(self, params: NameParams) -> StoredView:
        key = _key(params.name)
        return _stored(key, await self._overlay.provide(key))

    async def withdraw(self, params: NameParams) -> StoredView:
        key = _key(params.name)
        self._overlay.withdraw(key)
        return StoredView(_hex(key), 0, CostView(0, 0, 0, 0))

    def _found(self, key: int, found: Lookup, *, providers: bool) -> FindView:
        book = self._overlay.book
        peers = found.providers if providers else found.closest
        rows = tuple(self._contact(book.number_of(peer)) for peer in peers)
        return FindView(_hex(key), rows, _cost(found.cost))

    def _contact(self, number: int, *, verified: bool = True) -> ContactView:
        book = self._overlay.book
        peer = book.peer_of(number)
        rtt_ns = self._peers.rtt_ns(peer) or self._overlay.driver.machine.rtt_estimate_ns(number)
        return ContactView(
            peer=peer,
            key=_hex(book.keys[number]),
            addresses=book.addresses(number),
            rtt_ms=None if rtt_ns is None else round(rtt_ns / MILLISECOND_NS, 3),
            connected=self._peers.hello(peer) is not None,
            verified=verified,
        )


def _key(name: str) -> int:
    try:
        return key_of_name(name)
    except ValueError as error:
        raise ControlRefused("bad-request", str(error)) from error


def _hex(key: int) -> str:
    return f"{key:064x}"


def _cost(cost: Cost) -> CostView:
    return CostView(round(cost.took_ns / MILLISECOND_NS, 3), cost.hops, cost.queries, cost.failures)


def _stored(key: int, stored: Stored) -> StoredView:
    return StoredView(_hex(key), stored.copies, _cost(stored.cost))
