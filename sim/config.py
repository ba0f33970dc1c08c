"""What a scenario file may say. Every field has a default and its unit in its name."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

import msgspec
from msgspec import Meta

#: A scenario of more nodes fits no machine that there is (docs/simulator.md has the bytes per node).
MAX_NODES = 10_000_000

Count: TypeAlias = Annotated[int, Meta(ge=0, le=1_000_000_000)]
Seconds: TypeAlias = Annotated[float, Meta(ge=0, le=1e8)]
Milliseconds: TypeAlias = Annotated[float, Meta(ge=0, le=1e7)]
Share: TypeAlias = Annotated[float, Meta(ge=0, le=1)]
Rate: TypeAlias = Annotated[float, Meta(ge=0, le=1e6)]


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of every section."""


class WorldSettings(Section, frozen=True, kw_only=True):
    """`duration_s`: how long is measured, after the network stands. `codec`: send every message through its
    wire format. `events`: write every event to events.csv.gz. `slices`: how often series are sampled.
    """

    nodes: Annotated[int, Meta(ge=2, le=MAX_NODES)] = 1000
    seed: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)] = 1
    duration_s: Seconds = 300.0
    codec: bool = False
    events: bool = False
    slices: Annotated[int, Meta(ge=1, le=10_000)] = 60


class LinkSettings(Section, frozen=True, kw_only=True):
    """`cities`: synthetic geography; `uniform`: `one_way_ms` between any two; `matrix`: round trips in ms from
    `file` (CSV or NPZ, beside the scenario). Bandwidths and service times of 0 are unlimited.
    """

    model: Literal["cities", "uniform", "matrix"] = "cities"
    one_way_ms: Milliseconds = 50.0
    file: str = ""
    inflation: tuple[float, float] = (1.3, 2.3)
    access: bool = True
    loss: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    jitter_ms: Milliseconds = 0.0
    up_mbps: Rate = 0.0
    down_mbps: Rate = 0.0
    service_us: Rate = 0.0


class ConnectionSettings(Section, frozen=True, kw_only=True):
    """`kept`: connections per node; 0 sends datagrams. Shares of nodes behind NAT, and of those nobody can
    dial, need connections.
    """

    kept: Annotated[int, Meta(ge=0, le=100_000)] = 0
    setup_rtts: Annotated[int, Meta(ge=0, le=100)] = 6
    dial_timeout_s: Seconds = 5.0
    heartbeat_timeout_s: Seconds = 4.0
    punch_share: Share = 0.7
    nat_share: Share = 0.0
    unreachable_share: Share = 0.0


class ChurnSettings(Section, frozen=True, kw_only=True):
    """Nodes leave and come back. `session_s`, `downtime_s`: means. `weibull`: sessions with this `shape` (below
    1: long tail). `diurnal`: each node is up around its site's evening; `session_s` is the length of its day.
    `trace`: CSV lines `time_s,node,up|down`. `share`: nodes that take part. `silent`: they vanish without
    closing connections.
    """

    model: Literal["none", "exponential", "weibull", "diurnal", "trace"] = "none"
    session_s: Annotated[float, Meta(gt=0, le=1e8)] = 3600.0
    downtime_s: Annotated[float, Meta(gt=0, le=1e8)] = 1800.0
    shape: Annotated[float, Meta(gt=0.05, le=20)] = 0.6
    day_s: Annotated[float, Meta(gt=0, le=1e8)] = 86_400.0
    file: str = ""
    share: Share = 1.0
    silent: bool = True


class ArrivalSettings(Section, frozen=True, kw_only=True):
    """When things are asked for. `poisson` and `regular`: `per_s`. `bursts`: `burst_size` at once, every
    `burst_every_s` on average. `trace`: CSV lines `time_s,model,prompt_tokens,output_tokens` as a gateway logs
    them. `zipf`: how popular the n-th Cargo (or key) is, 1 / n**zipf; 0: all alike.
    """

    process: Literal["poisson", "regular", "bursts", "trace"] = "poisson"
    per_s: Rate = 5.0
    burst_size: Annotated[int, Meta(ge=1, le=1_000_000)] = 20
    burst_every_s: Annotated[float, Meta(gt=0, le=1e8)] = 10.0
    file: str = ""
    zipf: Annotated[float, Meta(ge=0, le=5)] = 0.9


class DhtSettings(Section, frozen=True, kw_only=True):
    """`bootstrap`: `join` really joins all nodes, one every `join_every_ms` on average (all at once: 0), by
    `seeds` nodes that are in already; `built` gives every node the table that a network at rest would have
    given it, and says so. `settle_s`: quiet time before measuring. `policy`: any field of dht.policy.DhtPolicy.
    `keys`: different targets of lookups, 0: each its own. `lookup`: find the closest peers, or providers of a
    Cargo that `providers` nodes provide. `hosts_per_group`: nodes of one network (/16) on average, 0: groups
    are not known.
    """

    bootstrap: Literal["join", "built"] = "join"
    join_every_ms: Milliseconds = 50.0
    seeds: Annotated[int, Meta(ge=1, le=20)] = 3
    settle_s: Seconds = 60.0
    policy: dict[str, int | bool] = {}
    lookup: Literal["closest", "providers"] = "closest"
    keys: Count = 0
    providers: Annotated[int, Meta(ge=1, le=1000)] = 20
    hosts_per_group: Count = 0
    health_sample: Annotated[int, Meta(ge=1, le=100_000)] = 300


class CutSettings(Section, frozen=True, kw_only=True):
    """A partition: `shares` of the nodes become groups of their own (the rest is one more) from `at_s` until
    `heal_s`.
    """

    at_s: Seconds
    heal_s: Seconds
    shares: tuple[Share, ...] = (0.5,)


class KillSettings(Section, frozen=True, kw_only=True):
    """A share of the nodes dies at once and does not come back."""

    at_s: Seconds
    share: Share = 0.3
    silent: bool = True


class StormSettings(Section, frozen=True, kw_only=True):
    """So many new nodes join, spread over `within_s`."""

    at_s: Seconds
    nodes: Count = 100
    within_s: Seconds = 1.0


class AttackSettings(Section, frozen=True, kw_only=True):
    """Attackers in the DHT. Behaviours combine: list several attacks, each with its own share of the nodes.

    `eclipse`: keys chosen close to a victim's target, answering with accomplices only. `sybil`: many keys from
    few network groups. `free-rider`: asks, never answers. `slow-loris`: answers after `delay_ms`. `liar`: names
    peers that do not exist any more.
    """

    kind: Literal["sybil", "eclipse", "free-rider", "slow-loris", "liar"]
    share: Share = 0.1
    delay_ms: Milliseconds = 900.0
    groups: Annotated[int, Meta(ge=1, le=100_000)] = 4
    victims: Annotated[int, Meta(ge=1, le=10_000)] = 1


class JobSettings(Section, frozen=True, kw_only=True):
    """Islands, coordinators and gateways with jobs (study "jobs"); what of world.nodes is neither coordinator
    nor gateway is an Island. Speeds and lengths are log-normal: `..._median`, and the sigmas. `policy`: how
    gateways choose; `two_choices`: draw two of the near-best where the load is known from an old advert.
    """

    coordinators: Annotated[int, Meta(ge=1, le=1000)] = 3
    gateways: Annotated[int, Meta(ge=1, le=1000)] = 4
    cargos: Annotated[int, Meta(ge=1, le=64)] = 5
    cargos_per_island: Annotated[int, Meta(ge=1, le=16)] = 2
    policy: Literal["completion", "random", "rtt", "price"] = "completion"
    two_choices: bool = True
    decode_tps_median: Annotated[float, Meta(gt=0, le=1e5)] = 20.0
    decode_sigma: Annotated[float, Meta(ge=0, le=3)] = 0.7
    prefill_factor: Annotated[float, Meta(gt=0, le=1000)] = 8.0
    slots: Annotated[int, Meta(ge=1, le=64)] = 4
    prompt_median: Annotated[float, Meta(gt=0, le=1e5)] = 200.0
    output_median: Annotated[float, Meta(gt=0, le=1e5)] = 80.0
    token_sigma: Annotated[float, Meta(ge=0, le=3)] = 0.6
    price_sigma: Annotated[float, Meta(ge=0, le=3)] = 0.5
    settle_s: Seconds = 20.0


class KarmaSettings(Section, frozen=True, kw_only=True):
    """Coordinators that state, gossip and judge; what of world.nodes is no coordinator is an Island (study
    "karma", where world.duration_s is counted in hours of work). `attackers`: their share of the Islands.
    `audited`: share of jobs replayed before they are paid.
    """

    coordinators: Annotated[int, Meta(ge=2, le=1000)] = 6
    attack: Literal["none", "free-rider", "whitewash", "sleeper", "collusion", "sybil", "slander"] = "none"
    attackers: Share = 0.25
    jobs_per_hour: Annotated[int, Meta(ge=2, le=3600)] = 60
    audited: Share = 0.05


class ChainSettings(Section, frozen=True, kw_only=True):
    """A model that no Island holds whole, on chains of them (study "chains"); what of world.nodes is no gateway
    is an Island. `strategy`: who decides which Island holds which layers, and which chain does a job.
    `replicas`: chains that are laid out, if there is room; `spares`: further Islands for each range.

    Memory and speed of Islands are log-normal. `row_factor`: how much cheaper a further row in a step is than
    the first. `width`: values of a row between stages, two bytes each. `fetch_mbps`: how fast weights come.
    `notice_s`: until others know that an Island is gone. `balance_s`: the time constant of the ranges'
    load, by which Islands with room join busy ones; 0: none do.
    """

    strategy: Literal["planner", "random", "greedy"] = "planner"
    gateways: Annotated[int, Meta(ge=1, le=1000)] = 4
    replicas: Annotated[int, Meta(ge=1, le=1000)] = 24
    spares: Annotated[int, Meta(ge=0, le=3)] = 1
    layers: Annotated[int, Meta(ge=2, le=512)] = 80
    layer_mb: Annotated[int, Meta(ge=1, le=100_000)] = 490
    embedding_mb: Annotated[int, Meta(ge=0, le=100_000)] = 600
    head_mb: Annotated[int, Meta(ge=0, le=100_000)] = 860
    cache_mb_per_layer: Annotated[int, Meta(ge=0, le=100_000)] = 64
    width: Annotated[int, Meta(ge=1, le=1_000_000)] = 8192
    room_gb_median: Annotated[float, Meta(gt=0, le=1e5)] = 12.0
    room_sigma: Annotated[float, Meta(ge=0, le=3)] = 0.6
    layer_ms_median: Annotated[float, Meta(gt=0, le=1e5)] = 4.0
    layer_sigma: Annotated[float, Meta(ge=0, le=3)] = 0.7
    row_factor: Annotated[float, Meta(ge=1, le=1000)] = 8.0
    slots: Annotated[int, Meta(ge=1, le=64)] = 4
    fetch_mbps: Annotated[float, Meta(gt=0, le=1e6)] = 1000.0
    prompt_median: Annotated[float, Meta(gt=0, le=1e5)] = 150.0
    output_median: Annotated[float, Meta(gt=0, le=1e5)] = 60.0
    token_sigma: Annotated[float, Meta(ge=0, le=3)] = 0.5
    notice_s: Seconds = 4.0
    review_s: Annotated[float, Meta(gt=0, le=1e5)] = 5.0
    balance_s: Seconds = 0.0
    grace_s: Seconds = 30.0


class LossSettings(Section, frozen=True, kw_only=True):
    """So many coordinators die at once. `silent`: nobody's connection is closed; heartbeats tell."""

    at_s: Seconds
    coordinators: Annotated[int, Meta(ge=1, le=1000)] = 1
    silent: bool = True


class VariantSettings(Section, frozen=True, kw_only=True):
    """The same scenario with some settings changed: `set` maps dotted names to values."""

    name: str
    set: dict[str, object] = {}


class ScenarioSettings(Section, frozen=True, kw_only=True):
    """A scenario file."""

    title: str
    summary: str = ""
    study: Literal["dht", "jobs", "karma", "chains"] = "dht"
    world: WorldSettings = WorldSettings()
    links: LinkSettings = LinkSettings()
    connections: ConnectionSettings = ConnectionSettings()
    churn: ChurnSettings = ChurnSettings()
    arrivals: ArrivalSettings = ArrivalSettings()
    dht: DhtSettings = DhtSettings()
    partition: tuple[CutSettings, ...] = ()
    kill: tuple[KillSettings, ...] = ()
    storm: tuple[StormSettings, ...] = ()
    attack: tuple[AttackSettings, ...] = ()
    jobs: JobSettings = JobSettings()
    loss: tuple[LossSettings, ...] = ()
    karma: KarmaSettings = KarmaSettings()
    chains: ChainSettings = ChainSettings()
    variant: tuple[VariantSettings, ...] = ()
