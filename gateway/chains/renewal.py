"""A chain whose head is gone goes on with another one."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from protocol.ids import PeerId
from protocol.ring import MAX_SPARES, Chain, Stage, StagePeer
from routing.chains.plan import Holder


def renewed(chain: Chain, holders: Sequence[Holder[PeerId]]) -> Chain | None:
    """The chain with another head, if its head is gone and each other place has somebody alive."""
    by_peer = {holder.peer: holder for holder in holders}

    def alive(peer: StagePeer, stage: Stage) -> bool:
        holder = by_peer.get(PeerId(peer.peer))
        return holder is not None and (holder.first, holder.last) == (stage.first, stage.last)

    *others, head = chain.stages
    if alive(head.holder, head):
        return None  # it lives: its session there is over, and those behind it, too
    if not all(any(alive(one, stage) for one in (stage.holder, *stage.spares)) for stage in others):
        return None
    standing = {stage.holder.peer for stage in chain.stages}
    behind = [spare for spare in head.spares if alive(spare, head) and spare.peer not in standing]
    behind += [
        StagePeer(holder.peer, holder.addresses)
        for holder in holders
        if (holder.first, holder.last) == (head.first, head.last)
        and holder.peer not in standing
        and all(spare.peer != holder.peer for spare in behind)
    ]
    if not behind:
        return None
    stage = msgspec.structs.replace(
        head, holder=behind[0], spares=tuple(behind[1 : 1 + MAX_SPARES]), generation=head.generation + 1
    )
    return msgspec.structs.replace(chain, stages=(*others, stage))
