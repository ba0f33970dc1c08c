"""Sizes and round trips of messages that are wire messages as they stand (coordination, gossip)."""

from __future__ import annotations

from typing import Any, Final

from protocol.codec import Codec
from protocol.rpc import RPC_CODEC, Notice
from sim.world import World

#: Around a message's own bytes: the RPC frame with its method's name, and the length before it.
FRAME_BYTES: Final = 24


def use_codec(world: World, service: str, codec: Codec[Any], method: str, *, round_trip: bool) -> None:
    """Count a service's bytes; with `round_trip`, also send every message through codec and RPC frame."""

    def size_of(message: Any) -> int:  # noqa: ANN401 - the codec's union
        return len(codec.encode(message)) + FRAME_BYTES

    def through(source: int, target: int, message: Any) -> tuple[Any, int]:  # noqa: ANN401 - as above
        del source, target
        body = codec.encode(message)
        return codec.decode_untrusted(body), len(RPC_CODEC.encode_frame(Notice(method, body)))

    world.service(service, size_of=size_of, round_trip=through if round_trip else None)
