"""Every knob of the DHT, with its reason. Bounds that a remote could press against stand in dht/limits.py."""

from __future__ import annotations

from dataclasses import dataclass

from protocol.instants import MILLISECOND_NS, SECOND_NS

_MINUTE_NS = 60 * SECOND_NS


@dataclass(frozen=True, slots=True)
class DhtPolicy:
    """How one node behaves. Nodes of a network may differ in all but `k` (replicas are counted in it)."""

    #: Bucket size, replicas of a record and contacts in an answer (Maymounkov and Mazieres 2002): 20 are never
    #: all gone within a republish interval.
    k: int = 20

    #: Queries that a lookup has open at once. 3: one slow peer never stops it, and bandwidth stays small.
    alpha: int = 3

    #: A lookup is done when the `beta` closest peers have answered (go-libp2p's "resiliency"): their answers
    #: name the other k - beta. Asking all k takes three times as long and finds the same peers.
    beta: int = 3

    #: The same for lookups of the own key, which also make us known to the neighbours: a record's finders are
    #: closer to it than half of its holders, so half of k must know us; the others hear of us from them.
    join_beta: int = 10

    #: The same for records and providers, if not enough were found before: what exists is mostly found at the
    #: first of its holders, and to hide it ten of its closest peers must keep silent.
    value_beta: int = 10

    #: Queries after which a lookup ends in any case. An honest one takes 10 to 15, a join some 40; with a third
    #: of all peers dead twice that.
    max_queries: int = 100

    #: Paths that share no peer (S/Kademlia, Baumgart and Mies 2007): a lookup is misled only if every path
    #: meets a liar. 1: off (each path has its own alpha of at least 1, so d paths cost up to d times the
    #: messages).
    disjoint_paths: int = 1

    #: A full bucket prefers nearer peers (proximity neighbour selection): lookups take a quarter to a third
    #: less time. Never decides the order of queries: that would make them slower (FINDINGS: 63-92 %).
    rtt_aware: bool = True

    #: Entries of a bucket, those longest there, which no nearer peer can push out: who rents machines beside a
    #: victim does not get all of its table. Each costs a twentieth of the gain in time.
    senior_entries: int = 4

    #: A newcomer must be this much nearer (percent of the entry's RTT) to replace a live entry: measuring noise
    #: is below 20 %, and a swap that gains less is not worth its ping.
    swap_percent: int = 80

    #: Candidates kept per full bucket, for when an entry dies or turns out to be far.
    candidates: int = 4

    #: Peers of one network group (Directory.group_of) per bucket and per table. S/Kademlia and go-libp2p take
    #: 2-3 per bucket; one hosting company's /16 holds several honest nodes, so 2 and 16.
    max_group_per_bucket: int = 2
    max_group_per_table: int = 16

    #: One ping per interval in quiet times: 20 a minute, 2 KB, so that 270 entries are seen every quarter of an
    #: hour.
    ping_interval_ns: int = 3 * SECOND_NS

    #: After a failure the interval is quartered (down to this), after each answer it grows by a sixteenth: as
    #: long as more than 4 % of entries are dead the whole table is swept at up to 8 pings a second, about 35 s.
    min_ping_interval_ns: int = 125 * MILLISECOND_NS

    #: An entry heard of more recently needs no ping.
    fresh_ns: int = 30 * SECOND_NS

    #: A refresh query into each bucket in turn. One every minute: a table of 14 buckets in a quarter of an
    #: hour.
    refresh_interval_ns: int = _MINUTE_NS

    #: Refreshes right after joining (and after heavy loss) come this fast.
    join_refresh_interval_ns: int = 500 * MILLISECOND_NS

    #: After a join the neighbourhood is looked up again after this time, since others may have joined at the
    #: same time, and then at growing intervals.
    first_self_lookup_ns: int = 4 * SECOND_NS

    #: The own neighbourhood is looked up this often; the k neighbours are asked, so about 2 messages a minute.
    self_lookup_interval_ns: int = 10 * _MINUTE_NS

    #: An answer that takes longer than `slow_factor` round trips plus `slow_ns` no longer counts against alpha
    #: (another query starts); after `timeout_factor` round trips plus `timeout_ns` the query has failed.
    slow_factor: int = 2
    slow_ns: int = 50 * MILLISECOND_NS
    timeout_factor: int = 4
    timeout_ns: int = 500 * MILLISECOND_NS
    min_timeout_ns: int = SECOND_NS
    max_timeout_ns: int = 5 * SECOND_NS

    #: Round trip assumed for peers of which nothing is known: Earth's half circumference in fibre is 200 ms.
    unknown_rtt_ns: int = 250 * MILLISECOND_NS

    #: Added to both limits for peers without a connection, which has to be made first: a fixed part and so many
    #: round trips (the node: TCP, noise, three protocol negotiations, hello). Without it a far peer that must
    #: be dialled is late, and lookups end without it. 0 where there are no connections.
    connect_ns: int = 0
    connect_rtts: int = 0

    #: A measured peer heard of more recently than this still has its connection.
    link_kept_ns: int = 90 * SECOND_NS

    #: Whether an answer's delay is a round trip even if a connection may have been made in between. The node
    #: says no and reports round trips by `RoundTripSeen`.
    rtt_from_first_answer: bool = True

    #: Provider records live this long and are told anew after a third of it (jitter of a tenth), so that two
    #: losses in a row hide nobody. An Island that vanishes is listed at most this long.
    provider_ttl_ns: int = 60 * _MINUTE_NS
    provide_interval_ns: int = 20 * _MINUTE_NS

    #: Signed records are put anew by their owner this often: half of the k closest are replaced in several
    #: hours.
    republish_interval_ns: int = 30 * _MINUTE_NS

    #: Store as soon as a peer is close enough, judged by the estimated size of the network (Trautwein et al.,
    #: "IPFS in the fast lane", 2024), instead of when the lookup is done.
    optimistic_provide: bool = True

    #: Know every node while the network is smaller than `full_table_nodes`: lookups take one hop. 12 bytes a
    #: node.
    full_table: bool = False
    full_table_nodes: int = 10_000

    #: A round of comparing full tables with one other peer. A new node is known to all after some 14 rounds.
    full_table_interval_ns: int = 30 * SECOND_NS

    #: One more ping per interval proves the members of a full table: 1000 nodes in a quarter of an hour.
    full_table_ping_interval_ns: int = SECOND_NS

    def __post_init__(self) -> None:
        if not 1 <= self.k <= 64 or not 1 <= self.alpha <= 16 or not self.beta >= 1:
            raise ValueError("k must lie in 1..64, alpha in 1..16, and beta above 0")
        if not 1 <= self.disjoint_paths <= 8:
            raise ValueError("disjoint_paths must lie in 1..8")
        if not 0 <= self.senior_entries <= self.k or not 0 <= self.candidates <= 16:
            raise ValueError("senior_entries must lie in 0..k, candidates in 0..16")
