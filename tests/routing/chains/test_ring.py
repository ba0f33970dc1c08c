"""The ring as a whole: what comes out at the head is what an undisturbed ring makes, whatever happens."""

from __future__ import annotations

from typing import Any

import pytest

from protocol.dice import Dice
from protocol.instants import MILLISECOND_NS, SECOND_NS
from protocol.ring import STAGE_RECEIPT, Chain
from routing.chains.ring import RingPolicy

SESSION = "ab" * 16
COUNT = 24


def drafting(dice: Dice, truth: list[int], prompt: int) -> Any:
    """Guesses that are right more often than not, given what the ring will make."""

    def drafts(tokens: list[int], goal: int) -> list[int]:
        made = len(tokens) - prompt
        most = min(dice.below(6), goal - len(tokens) - 1)
        return [
            truth[made + ahead] if dice.below(10) < 6 and made + ahead < len(truth) else dice.below(1000)
            for ahead in range(max(0, most))
        ]

    return drafts


class Case:
    """One job on a ring of `stages`, and its truth."""

    def __init__(
        self,
        world_type: Any,
        reference: Any,
        *,
        stages: int = 3,
        spares: int = 1,
        prompt: int = 100,
        seed: int = 0,
        deterministic: bool = False,
        drafts: bool = False,
        policy: RingPolicy | None = None,
        delay_ns: int = 5 * MILLISECOND_NS,
        count: int = COUNT,
        jobs: int = 1,
        slots: int = 64,
    ):
        self.world = world_type(seed, policy=policy, delay_ns=delay_ns)
        self.world.deterministic = deterministic
        self.dice = Dice(seed, 9)
        self.chain: Chain = self.world.ring(stages, spares=spares, slots=slots)
        self.orders: list[Any] = []
        self.truths: list[list[int]] = []
        for job in range(jobs):
            self.prompt = [self.dice.below(1000) for _ in range(prompt)]
            truth = reference(self.chain, self.prompt, count, deterministic=deterministic)
            make = drafting(self.dice, truth, prompt) if drafts else (lambda tokens, goal: [])
            name = f"{job:02d}" + SESSION[2:]
            self.truths.append(truth)
            self.orders.append(
                self.world.gateway.start(
                    name, self.chain, self.prompt, count, deterministic=deterministic, drafts=make
                )
            )
        self.order = self.orders[0]

    def finish(self, limit_ns: int = 120 * SECOND_NS) -> None:
        self.world.run(until=lambda: all(order.done_at is not None for order in self.orders), limit_ns=limit_ns)
        for order, truth in zip(self.orders, self.truths, strict=True):
            assert order.done_at is not None, f"only {len(order.got)} tokens"
            assert order.got == truth
            # A silent Island is given up after 1 s, one that has to be dialled and says nothing after 2.5 s.
            assert max(order.gaps) < 6 * SECOND_NS, f"a gap of {max(order.gaps) // MILLISECOND_NS} ms"

    def is_clean(self) -> None:
        """A while later nobody who lives keeps anything."""
        self.world.run(limit_ns=70 * SECOND_NS)
        for node in self.world.nodes.values():
            if not node.dead and not node.frozen:
                assert not node.machine.sessions(self.chain.cargo), f"{node.name} keeps a session"
                assert not node.engine.sessions, f"{node.name}'s engine keeps a session"
                assert node.machine.next_wake() is None
                assert node.machine.log_bytes == 0

    def until_tokens(self, count: int) -> None:
        self.world.run(until=lambda: len(self.order.got) >= count)


@pytest.fixture
def case(ring_world: Any, ring_reference: Any) -> Any:
    return lambda **how: Case(ring_world, ring_reference, **how)


@pytest.mark.parametrize("stages", [2, 3, 8])
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("drafts", [False, True])
def test_undisturbed(case: Any, stages: int, deterministic: Any, drafts: Any) -> None:
    if deterministic and drafts:
        pytest.skip("deterministic sessions have no drafts")
    ring = case(stages=stages, deterministic=deterministic, drafts=drafts)
    ring.finish()
    world = ring.world
    world.run(until=lambda: bool(ring.order.ended), limit_ns=3 * SECOND_NS)
    (ended,) = ring.order.ended
    assert [work.peer for work in ended.works] == [str(index) for index in range(stages)]
    for index, work in enumerate(ended.works):
        assert not work.failed
        assert work.hop_ns > 0
        receipt = STAGE_RECEIPT.decode_untrusted(work.receipt.body)
        assert (receipt.index, receipt.first, receipt.last) == (index, work.first, work.last)
        assert receipt.rows >= receipt.kept == len(ring.prompt) + COUNT - 1
        assert receipt.compute_ns > 0
    for node in world.nodes.values():
        assert not node.machine.sessions(ring.chain.cargo)
        assert not node.engine.sessions
        assert node.machine.log_bytes == 0
    world.run(limit_ns=2 * SECOND_NS)
    assert all(node.machine.next_wake() is None for node in world.nodes.values())


@pytest.mark.parametrize("victim", ["0", "1", "2", "3"])
@pytest.mark.parametrize("how", ["kill", "freeze"])
@pytest.mark.parametrize("deterministic", [False, True])
def test_a_stage_dies_between_tokens(case: Any, victim: str, how: str, deterministic: Any) -> None:
    ring = case(stages=4, deterministic=deterministic, drafts=not deterministic)
    ring.until_tokens(7)
    getattr(ring.world, how)(victim)
    ring.finish()
    assert max(ring.order.gaps) < 2 * SECOND_NS


TROUBLES = ("kill", "kill", "head", "freeze", "engine", "link", "link", "twin")

#: Spans within which the next trouble comes: while the one before is being mended, a little later, much later.
SPANS_MS = (30, 150, 600)


def plan_troubles(ring: Case, dice: Dice, count: int) -> None:
    at = dice.below(500 * MILLISECOND_NS)
    for _ in range(count):
        ring.world.later(at, lambda: trouble(ring))
        at += dice.below(dice.choice(SPANS_MS) * MILLISECOND_NS)


def trouble(ring: Case) -> None:
    """Something at random goes wrong, anywhere; enough Islands are left to go on."""
    world, dice = ring.world, ring.dice
    kind = dice.choice(TROUBLES)
    if kind == "link":
        if world.links:
            world.break_link(*dice.choice(sorted(world.links)))
        return
    for _ in range(2 if kind == "twin" else 1):
        able = [node for node in world.nodes.values() if not node.dead and not node.frozen]
        if kind == "head":
            able = [node for node in able if node.jobs] or able
        node = dice.choice(able)
        if kind == "engine":
            node.lose_engine()
        elif len(world.holders(node.engine.first, node.engine.last)) > 1:
            if kind == "freeze":
                world.freeze(node.name)
                if dice.below(2):
                    world.later(dice.below(4 * SECOND_NS), lambda name=node.name: world.thaw(name))
            else:
                world.kill(node.name)


@pytest.mark.parametrize("seed", range(60))
def test_any_trouble_at_any_moment(case: Any, seed: int) -> None:
    dice = Dice(seed, 5)
    deterministic = bool(dice.below(2))
    ring = case(
        seed=seed,
        stages=2 + dice.below(4),
        spares=2,
        prompt=1 + dice.below(400),
        deterministic=deterministic,
        drafts=not deterministic,
        policy=RingPolicy(log_bytes=dice.choice([0, 500, 1 << 20]), window_rows=dice.choice([1, 40, 512])),
        delay_ns=(1 + dice.below(40)) * MILLISECOND_NS,
    )
    ring.world.jitter_ns = dice.choice([0, 30 * MILLISECOND_NS])
    plan_troubles(ring, dice, 1 + dice.below(8))
    ring.finish()
    ring.is_clean()


@pytest.mark.parametrize("seed", range(20))
def test_much_trouble_for_several_sessions(case: Any, seed: int) -> None:
    dice = Dice(seed, 6)
    deterministic = bool(dice.below(3) == 0)
    ring = case(
        seed=seed,
        stages=2 + dice.below(5),
        spares=3,
        prompt=1 + dice.below(200),
        deterministic=deterministic,
        drafts=not deterministic,
        policy=RingPolicy(log_bytes=dice.choice([0, 500, 1 << 20]), window_rows=dice.choice([1, 40, 512])),
        delay_ns=(1 + dice.below(30)) * MILLISECOND_NS,
        count=40,
        jobs=3,
        slots=dice.choice([2, 3, 64]),
    )
    ring.world.jitter_ns = dice.choice([0, 30 * MILLISECOND_NS])
    plan_troubles(ring, dice, 4 + dice.below(12))
    ring.finish(400 * SECOND_NS)
    ring.is_clean()


def test_the_gap_after_a_death_with_a_spare_that_stands_by(case: Any) -> None:
    """100 tokens of context, 20 ms between any two, each stage killed or frozen at several moments."""
    gaps: list[int] = []
    for seed, victim in enumerate(("0", "1", "2", "3") * 4):
        ring = case(seed=seed, stages=4, delay_ns=20 * MILLISECOND_NS, drafts=bool(seed % 2))
        ring.until_tokens(2 + seed % 5)
        ring.world.run(limit_ns=seed * 7 * MILLISECOND_NS)
        (ring.world.freeze if seed % 3 == 0 else ring.world.kill)(victim)
        ring.finish()
        gaps.append(max(ring.order.gaps))
    assert max(gaps) < 2 * SECOND_NS


def test_a_long_session_with_many_rejected_drafts_holds_little(case: Any) -> None:
    ring = case(stages=3, drafts=True, count=600, prompt=20, policy=RingPolicy(log_bytes=2000))
    ring.finish()
    world = ring.world
    assert max(world.nodes[name].most_log_bytes for name in "01") < 2000 + 100
    assert world.nodes["2"].most_log_bytes < 4 * (600 + 20 + 6)  # a head's log is its tokens
    assert world.nodes["0"].engine.rows < 3 * (600 + 20)  # drafts, and nothing else, are computed twice


def test_a_death_costs_the_others_no_computing(case: Any) -> None:
    ring = case(stages=4, prompt=300)
    ring.until_tokens(5)
    before = {name: node.engine.rows for name, node in ring.world.nodes.items()}
    ring.world.kill("1")
    ring.finish()
    for name in ("0", "2", "3"):
        assert ring.world.nodes[name].engine.rows - before[name] < COUNT + 3, name
    assert ring.world.nodes["1a"].engine.rows >= 300


def test_a_new_head_costs_the_others_no_computing(case: Any) -> None:
    ring = case(stages=4, prompt=300, drafts=True)
    ring.until_tokens(5)
    before = {name: node.engine.rows for name, node in ring.world.nodes.items()}
    ring.world.kill("3")
    ring.finish()
    for name in ("0", "1", "2"):
        assert ring.world.nodes[name].engine.rows - before[name] < 6 * COUNT, name


def test_one_of_two_frozen_stages_that_wakes_again_does_no_harm(case: Any) -> None:
    ring = case(stages=4, drafts=True, count=60)
    ring.until_tokens(5)
    ring.world.freeze("1")
    ring.world.freeze("2")
    ring.until_tokens(20)
    ring.world.thaw("1")
    ring.until_tokens(30)
    ring.world.thaw("2")
    ring.finish()
    (ended,) = [ring.world.run(until=lambda: bool(ring.order.ended)) or ring.order.ended[0]]
    lost = {work.peer for work in ended.works if work.failed}
    assert lost == {"1", "2"}
    ring.is_clean()
