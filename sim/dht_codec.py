"""Codec mode: every DHT message goes through the wire format of production, in its RPC frame, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dht.messages import DhtMessage
from dht.wire import DHT_CODEC, METHOD_DHT, Contact, from_wire_untrusted, to_wire
from protocol.rpc import RPC_CODEC, Notice

if TYPE_CHECKING:
    from sim.dht_network import DhtNetwork


class DhtCodec:
    """Encodes and decodes with real peer ids and addresses of realistic length."""

    def __init__(self, network: DhtNetwork) -> None:
        self._network = network
        self._contacts: dict[int, Contact] = {}
        self._numbers: dict[str, int] = {}

    def contact(self, node: int) -> Contact:
        """A node as others are told of it."""
        known = self._contacts.get(node)
        if known is None:
            group = self._network.directory.groups[node]
            address = f"/ip4/10.{group & 255}.{node >> 8 & 255}.{node & 255}/tcp/4001"
            known = self._contacts[node] = Contact(self._network.peer_id(node), (address,), 0)
            self._numbers[known.peer] = node
        return known

    def round_trip(self, source: int, target: int, message: DhtMessage) -> tuple[DhtMessage, int]:
        """The message as the other side decodes it, and the bytes that it took in its RPC frame."""
        del source, target
        body = DHT_CODEC.encode(to_wire(message, self.contact))
        frame = RPC_CODEC.encode_frame(Notice(METHOD_DHT, body))
        wire = DHT_CODEC.decode_untrusted(body)
        return from_wire_untrusted(wire, lambda contact: self._numbers.get(contact.peer)), len(frame)
