"""Jobs in a simulated network: an Island's engine and a gateway's dispatcher, as machines.

Everything around them is production's (adverts, coordinators, followers, books, placement). These two are
models: the engine serves slots one prompt after the other and shares its decode rate among running jobs; the
dispatcher gives each job to the Island that the placement policy ranks first, and to the next one if that
fails. Tokens are not simulated one by one.
"""

from __future__ import annotations

from collections import deque
from heapq import heappop, heappush
from typing import Final, TypeAlias

import msgspec

from protocol.adverts import IslandAdvert
from protocol.dice import Dice
from protocol.ids import CargoDigest
from protocol.instants import SECOND_NS, Instant, after
from protocol.machine import Effect, Emit, Input, Ordered, PeerLost, Received, Send, WakeAt, Woken
from routing.islands import IslandBook
from routing.placement import JobShape, Policy, Query, choose
from routing.requirements import Outlook

#: Service under which engines and dispatchers speak.
JOBS: Final = "jobs"

#: Jobs that wait at one Island; more are refused, and the gateway asks the next one.
MAX_QUEUED: Final = 16

#: A job that found no Island looks again this often.
RETRY_NS: Final = SECOND_NS


class RunJob(msgspec.Struct, frozen=True, gc=False):
    """Gateway to Island. Token counts."""

    job: int
    prompt: int
    output: int


class JobRan(msgspec.Struct, frozen=True, gc=False):
    """Island to gateway: done. `waited_ns`: in its queue."""

    job: int
    waited_ns: int


class JobDeclined(msgspec.Struct, frozen=True, gc=False):
    """Island to gateway: no room."""

    job: int


class Place(msgspec.Struct, frozen=True, gc=False):
    """A command to a dispatcher: somebody wants this."""

    job: int
    shape: JobShape


class Seen(msgspec.Struct, frozen=True):
    """A command to a dispatcher: the follower told of an Island."""

    peer: int
    advert: IslandAdvert
    sequence: int


class Unseen(msgspec.Struct, frozen=True, gc=False):
    """A command to a dispatcher: no coordinator vouches for it any more."""

    peer: int


class LoadChanged(msgspec.Struct, frozen=True, gc=False):
    """Emitted by an engine."""

    active: int
    queued: int


class JobPlaced(msgspec.Struct, frozen=True, gc=False):
    """Emitted by a dispatcher each time it sends a job to an Island. `attempt` counts from 1."""

    job: int
    peer: int
    price_ucr: int
    attempt: int


class JobDone(msgspec.Struct, frozen=True, gc=False):
    """Emitted by a dispatcher. `attempts`: Islands asked."""

    job: int
    peer: int
    took_ns: int
    attempts: int


JobMessage: TypeAlias = RunJob | JobRan | JobDeclined
JobCommand: TypeAlias = Place | Seen | Unseen
JobEvent: TypeAlias = LoadChanged | JobPlaced | JobDone
JobInput: TypeAlias = Input[int, JobMessage, JobCommand]
JobEffects: TypeAlias = list[Effect[int, JobMessage, JobEvent]]


class Engine:
    """An Island's engine. Rates in tokens/s; `slots` jobs at a time."""

    def __init__(self, slots: int, prefill_tps: float, decode_tps: float) -> None:
        self.slots = slots
        self.prefill_tps = prefill_tps
        self.decode_tps = decode_tps
        self._running: list[tuple[int, int, int, int, int]] = []
        self._queue: deque[tuple[int, int, RunJob]] = deque()
        self._number = 0

    @property
    def active(self) -> int:
        return len(self._running)

    @property
    def queued(self) -> int:
        return len(self._queue)

    def run_ns(self, prompt: int, output: int, together: int) -> int:
        """How long a job runs if so many share the engine."""
        return round((prompt / self.prefill_tps + output * together / self.decode_tps) * SECOND_NS)

    def free_in_ns(self, now: int) -> int:
        """Until a further job would begin, if nothing else came."""
        ends = sorted(end for end, *_ in self._running)
        if len(ends) < self.slots:
            return 0
        for _, _, run in self._queue:
            end = ends.pop(0)
            ends.append(end + self.run_ns(run.prompt, run.output, self.slots))
            ends.sort()
        return max(0, ends[0] - now)

    def receive(self, now: Instant, what: JobInput) -> JobEffects:
        out: JobEffects = []
        match what:
            case Received(peer=peer, message=RunJob() as run):
                if len(self._running) >= self.slots and len(self._queue) >= MAX_QUEUED:
                    return [Send(peer, JobDeclined(run.job))]
                self._queue.append((now, peer, run))
            case PeerLost(peer=peer):
                self._queue = deque(waiting for waiting in self._queue if waiting[1] != peer)
            case _:
                pass
        while self._running and self._running[0][0] <= now:
            _, _, peer, job, waited_ns = heappop(self._running)
            out.append(Send(peer, JobRan(job, waited_ns)))
        while self._queue and len(self._running) < self.slots:
            since, peer, run = self._queue.popleft()
            self._number += 1
            end = now + self.run_ns(run.prompt, run.output, len(self._running) + 1)
            heappush(self._running, (end, self._number, peer, run.job, now - since))
        out.append(Emit(LoadChanged(len(self._running), len(self._queue))))
        if self._running:
            out.append(WakeAt(Instant(self._running[0][0])))
        return out

    def next_wake(self) -> Instant | None:
        return Instant(self._running[0][0]) if self._running else None


class _Job:
    __slots__ = ("attempts", "began", "peer", "shape", "tried")

    def __init__(self, shape: JobShape, began: int) -> None:
        self.shape = shape
        self.began = began
        self.peer = -1
        self.attempts = 0
        self.tried: set[int] = set()


class Dispatcher:
    """A gateway's placement: `policy` ranks, `two_choices` draws among the near-best under old load."""

    def __init__(self, policy: Policy[int], outlook: Outlook[int], dice: Dice, *, two_choices: bool) -> None:
        self.book: IslandBook[int] = IslandBook(ttl_ns=1 << 60)
        self._policy = policy
        self._outlook = outlook
        self._dice = dice
        self._two_choices = two_choices
        self._jobs: dict[int, _Job] = {}
        self._waiting: dict[int, None] = {}
        self._retry_at: Instant | None = None

    @property
    def waiting(self) -> int:
        """Jobs that no known Island can take."""
        return len(self._waiting)

    @property
    def open_jobs(self) -> int:
        return len(self._jobs)

    def receive(self, now: Instant, what: JobInput) -> JobEffects:
        out: JobEffects = []
        match what:
            case Ordered(command=Place() as place):
                self._jobs[place.job] = _Job(place.shape, now)
                self._place(now, place.job, out)
            case Ordered(command=Seen() as seen):
                self.book.admit(now, seen.peer, seen.advert, seen.sequence)
                self._retry(now, out)
            case Ordered(command=Unseen() as unseen):
                self.book.lost(unseen.peer)
            case Received(peer=peer, message=JobRan() as ran):
                self._done(now, peer, ran, out)
            case Received(peer=peer, message=JobDeclined() as declined):
                self._again(now, declined.job, peer, out)
            case PeerLost(peer=peer):
                self.book.suspect(now, peer)
                for number in [n for n, job in self._jobs.items() if job.peer == peer]:
                    self._again(now, number, peer, out)
            case Woken():
                self._retry_at = None
                self._retry(now, out)
            case _:
                pass
        if self._waiting and self._retry_at is None:
            self._retry_at = after(now, RETRY_NS)
            out.append(WakeAt(self._retry_at))
        return out

    def next_wake(self) -> Instant | None:
        return self._retry_at

    def _place(self, now: Instant, number: int, out: JobEffects) -> None:
        job = self._jobs[number]
        ranked = self._policy(now, self.book, Query(job.shape, self._outlook, frozenset(job.tried)))
        if not ranked:
            job.tried.clear()  # all have refused: begin anew, later
            job.peer = -1
            self._waiting[number] = None
            return
        chosen = choose(ranked, self._dice) if self._two_choices else ranked[0]
        if chosen is None:
            return
        self._waiting.pop(number, None)
        job.peer = chosen.peer
        job.attempts += 1
        self.book.reserve(chosen.peer)
        out.append(Send(chosen.peer, RunJob(number, job.shape.prompt_tokens, job.shape.output_tokens)))
        out.append(Emit(JobPlaced(number, chosen.peer, chosen.price_ucr, job.attempts)))

    def _again(self, now: Instant, number: int, peer: int, out: JobEffects) -> None:
        job = self._jobs.get(number)
        if job is None or job.peer != peer:
            return
        self.book.release(peer)
        job.tried.add(peer)
        self._place(now, number, out)

    def _retry(self, now: Instant, out: JobEffects) -> None:
        for number in list(self._waiting):
            self._place(now, number, out)

    def _done(self, now: Instant, peer: int, ran: JobRan, out: JobEffects) -> None:
        job = self._jobs.get(ran.job)
        if job is None or job.peer != peer:
            return
        del self._jobs[ran.job]
        self.book.release(peer)
        out.append(Emit(JobDone(ran.job, peer, now - job.began, job.attempts)))


def shape_of_tokens(cargo: str, prompt: int, output: int) -> JobShape:
    return JobShape(CargoDigest(cargo), max(1, prompt), max(1, output))


#: Bytes of text that a token takes, prompt and answer alike.
_TOKEN_BYTES: Final = 4
_JOB_BYTES: Final = 300


def job_bytes(message: JobMessage) -> int:
    """About what an offer takes on the wire. Tokens of the answer come one by one in production; here at the
    end.
    """
    return _JOB_BYTES + (_TOKEN_BYTES * message.prompt if isinstance(message, RunJob) else 0)
