"""What the control socket answers about karma: the statements that lie in the DHT about a peer, and what
they are worth to this node.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from dht.keys import key_of_record
from dht.records import open_record_untrusted
from node.control import ControlMethods, ControlRefused
from node.coordination.karma_views import KarmaParams, KarmaView, StatementView
from node.overlay.overlay import Overlay
from protocol.errors import ProtocolError
from protocol.ids import PeerId, peer_id_untrusted
from routing.karma import HOUR_UNITS, KarmaPolicy, Statement
from routing.karma_store import KarmaStore
from routing.karma_wire import KARMA_NAMESPACE, merge_records_untrusted
from routing.trust import FULL


class KarmaControl:
    """`believed`: whose word counts in full here."""

    def __init__(self, overlay: Overlay, believed: Callable[[], Iterable[PeerId]]) -> None:
        self._overlay = overlay
        self._believed = believed
        self._policy = KarmaPolicy()

    def register(self, methods: ControlMethods) -> None:
        methods.serve("karma", KarmaParams, self.karma)

    async def karma(self, params: KarmaParams) -> KarmaView:
        """Raises ControlRefused (bad-request) for what is no peer id."""
        try:
            peer = peer_id_untrusted(params.peer) if params.peer else self._overlay.peer
        except ProtocolError as error:
            raise ControlRefused("bad-request", f"{params.peer!r} is no peer id: {error.detail}") from error
        statements = await self._statements(peer)
        now = self._overlay.unix_now()
        epoch = self._policy.epoch_at(now)
        believed = dict.fromkeys(self._believed(), FULL)
        store: KarmaStore[PeerId] = KarmaStore(self._overlay.peer, believed, policy=self._policy)
        for statement in statements:
            store.merge(statement, epoch)
        return KarmaView(
            peer=peer,
            points=store.points_mpt(peer, epoch) / 1000,
            threshold=self._policy.threshold_mpt / 1000,
            statements=tuple(
                self._view(s, epoch, believed=store.trust(s.issuer, epoch) > 0) for s in statements
            ),
        )

    async def _statements(self, peer: PeerId) -> list[Statement[PeerId]]:
        found = await self._overlay.get_records(key_of_record(KARMA_NAMESPACE, peer), quorum=3)
        now = self._overlay.unix_now()
        values: list[bytes] = []
        for envelope in found.records:
            try:
                values.append(open_record_untrusted(envelope, now).body.value)
            except ProtocolError:
                continue  # expired since
        return merge_records_untrusted(values, peer, self._policy, now)

    def _view(self, statement: Statement[PeerId], epoch: int, *, believed: bool) -> StatementView:
        counters, worth = statement.counters, self._policy.fold(statement, epoch)
        return StatementView(
            issuer=statement.issuer,
            believed=believed,
            hours=(worth.merit_units - worth.lie_units) / HOUR_UNITS,
            work_hours=counters.work_units / HOUR_UNITS,
            failures=counters.failures,
            timeouts=counters.timeouts,
            lies=counters.lies,
            audits_passed=counters.audits_passed,
            audits_failed=counters.audits_failed,
        )
