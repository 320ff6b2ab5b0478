"""Owns the workers as a group: placement, start, calling all, noticing that one is gone, and leaving nothing behind.

Every wait watches the workers: a dead one ends it within moments, never a hang. What a worker raised comes back as a
value (worker.py); here it becomes one error that names the culprit and folds what it caused on the others.
"""

import contextlib
import logging
import math
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.exceptions import (
    GetTimeoutError,
    RayActorError,
    RayError,
    RayTaskError,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from dtrain.cluster import NAMESPACE
from dtrain.errors import ConfigError, WorkerDied
from dtrain.faults import FaultPlan
from dtrain.interrupts import Interrupts
from dtrain.lost_nodes import address_of_lost
from dtrain.newcomers import Newcomers
from dtrain.outcomes import NOT_STARTED, error_from, have_answered, outcome_of
from dtrain.rendezvous import RendezvousServer, Scope, assign
from dtrain.rooms import Room, Rooms
from dtrain.spares import READY_SECONDS, Spares
from dtrain.types import Array, Beat, Failure, Membership, ModelDescription, Progress, WorkerInfo, WorkerSettings
from dtrain.worker import ANY_NODE, NO_RANK, Worker

log = logging.getLogger("dtrain")

POLL_SECONDS = 0.1
"""How often a wait looks at progress."""
NAME_SECONDS = 15.0
"""How long an actor that has ended may hold its name, and that of a driver that was killed may take to end."""
BLAME_SECONDS = 3.0
"""After a first failure, how long the others have to say what happened to them."""
BEAT_SECONDS = 1.0
"""How often ranks are asked what they do."""
STACK_SECONDS = 3.0
"""How long they have to say where they are, once one hangs."""
GLOO_SECONDS = 10.0
"""Gloo gives up a silent peer so long after the timeout for hangs: who hangs is to be known, and ended, before."""
ENDED_SECONDS = 1.0
"""A process that was ended has so long to be known as dead; if its node cannot be reached, it counts as that."""
DRAIN_SECONDS = 60.0
"""How long what was sent ahead to workers whose group broke may take to come back, which it does at once."""
RESCUE_SECONDS = 10.0
"""After a failure, how long a rank has to hand over the state before its process ends, too."""
START_SECONDS = 600.0
"""How long Ray may take to start the processes, what runtime_env asks for included."""
PROGRESS_SECONDS = 1.0
"""How long a wait is held up by a worker that does not tell its progress."""
LAST_PROGRESS_SECONDS = 10.0
"""The same at the end, when no later one could tell what was printed."""


class GroupBroken(Exception):
    """Workers died, or lost each other, and some are left: the group can be formed anew.

    Attributes:
        dead: the ranks whose processes have ended.
        error: what it comes to where it is not survived.
    """

    def __init__(self, dead: Sequence[int], error: WorkerDied) -> None:
        super().__init__(str(error))
        self.dead = tuple(dead)
        self.error = error


@dataclass(frozen=True)
class GroupSpec:
    """What a group of workers is made of.

    Attributes:
        run_name: names the actors: `dtrain:<run>:rank<k>`.
        num_workers: how many, or how many at least.
        resources: Ray's resources of each.
        strategy: Ray's placement strategy.
        runtime_env: Ray's runtime environment.
        timeout: seconds after which a peer that says nothing is gone.
        spares: how many more processes wait to take a dead one's place.
        extra_workers: how many more there may be where the cluster has room for them.
        settings: for a worker on a node with so many CPUs and so many workers.
    """

    run_name: str
    num_workers: int
    resources: Mapping[str, float]
    strategy: str
    settings: Callable[[float, int], WorkerSettings]
    runtime_env: Mapping[str, Any] = field(default_factory=dict)
    timeout: float = 60.0
    spares: int = 0
    extra_workers: int = 0


class WorkerGroup:
    """The workers of one Trainer, from `start` to `close`.

    Args:
        spec: what it is made of.
        interrupts: ends every wait within moments. The workers go on: what becomes of them is the caller's to say.
    """

    def __init__(self, spec: GroupSpec, interrupts: Interrupts) -> None:
        self.spec = spec
        self._interrupts = interrupts
        self.workers: tuple[WorkerInfo, ...] = ()
        self.description: ModelDescription | None = None
        """The model that the workers hold, once it is built."""
        self.intra_threads = 0
        """TensorFlow's threads within an operation, on rank 0."""
        self.rescued: dict[str, Array] | None = None
        """The state that the workers had when a failure closed the group, where rank 0 could still tell it."""
        self.directory: str | None = None
        """The driver's working directory, as the workers were told."""
        self._actors: list[Any] = []
        self._cluster = Rooms(spec.run_name, spec.resources, spec.strategy, interrupts)
        self._rooms: list[Room] = []  # each rank's
        self._spares = Spares(lambda number, room: self._spawn(f"spare{number}", NO_RANK, room), interrupts)
        self._newcomers = Newcomers(self._spares, interrupts)
        self._looked = 0.0
        self._beats: dict[int, Any] = {}
        self._asked = 0.0
        self._ended: dict[int, tuple[str, float]] = {}  # by us: why, and when
        self._told: dict[str, tuple[Any, ...]] = {}  # what a newcomer is to be told to be what the others are
        self._late_polls: dict[int, Any] = {}
        self._rendezvous: RendezvousServer | None = None
        self._scope: Scope | None = None
        self._generation = 0
        self._num_replaced = 0

    @property
    def closed(self) -> bool:
        """Whether it has no workers: not started, closed, or closed by a failure."""
        return not self._actors

    def start(self, status: Callable[[str], None] = lambda _: None) -> None:
        """Reserve room, start the processes and form the group. A failure leaves nothing behind."""
        try:
            spec = self.spec
            self._rooms = self._cluster.reserve(spec.num_workers, spec.spares, spec.extra_workers, status)
            ranks = range(len(self._rooms))
            status(f"starting {len(ranks)} worker{'s' * (len(ranks) > 1)}")
            self._actors = [self._spawn(f"rank{rank}", rank, self._rooms[rank]) for rank in ranks]
            self.workers = tuple(self.wait(self.submit("where"), patience=START_SECONDS))
            self._set_up(ranks)
            self._take_places(ranks)
            self.form()
        except BaseException:
            self.close()
            raise

    def replace(
        self,
        dead: Sequence[int],
        status: Callable[[str], None] = lambda _: None,
        watch: Callable[[bool], None] = lambda _: None,
    ) -> None:
        """Start new processes in the places of the dead, and tell them all that the others were told.

        The others wait. The new ones are as far as where a fit begins, and are in no group until `form`.

        Raises:
            GroupBroken: one of them has died, too.
        """
        names = ", ".join(f"rank {rank}" for rank in dead)
        status(f"starting a new worker for {names}")
        found: dict[int, WorkerInfo] = {}
        for rank in dead:
            ray.kill(self._actors[rank], no_restart=True)  # or one that is only silent would go on
            for known in (self._late_polls, self._beats, self._ended):
                known.pop(rank, None)
            taken = self._spares.take(READY_SECONDS if self.spec.spares else 0.0)
            if taken is not None:
                spare, where = taken
                self._actors[rank], self._rooms[rank] = spare.actor, spare.room
                found[rank] = replace(where, rank=rank)
            else:  # the dead one may still hold its name, and after a change of numbers another rank
                self._num_replaced += 1
                self._actors[rank] = self._spawn(f"rank{rank}.{self._num_replaced}", rank, self._rooms[rank])
        new = [rank for rank in dead if rank not in found]
        calls = self.submit("where", ranks=new)
        started = self.wait(calls, watch, ranks=new, patience=START_SECONDS, survivable=True, is_replacing=True)
        found.update(zip(new, started, strict=True))
        self.workers = tuple(found.get(worker.rank, worker) for worker in self.workers)
        self._set_up(new, survivable=True)
        self._take_places(dead, survivable=True)
        status(f"getting {names} ready")
        for method, *args in self._told.values():
            self.wait(self.submit(method, *args, ranks=dead), watch, ranks=dead, survivable=True)

    def can_grow(self) -> bool:
        """Whether a worker is ready to make the group larger. Looks once a second at most, and does not wait."""
        if not self.spec.extra_workers or self.closed or time.monotonic() - self._looked < BEAT_SECONDS:
            return False
        self._looked = time.monotonic()
        self._start_spares()
        return self._newcomers.get_ready(self._told, self._place_one_more)

    def _place_one_more(self, actor: Any, where: WorkerInfo) -> Any:
        """Tell a process that it is one rank more; the call."""
        rank = len(self._actors)
        membership = assign([worker.node_id for worker in (*self.workers, where)], self._generation)[rank]
        plan = FaultPlan.current
        return actor.take_place.remote(membership, plan.of_next_life(rank) if plan else ())

    def grow(self, method: str, *args: Any, watch: Callable[[bool], None], **kwargs: Any) -> list[int]:
        """Let those that are ready join, as the highest ranks, where a last call to them ends well.

        The others are not touched; the new ones are in no group until `renumber` and `form`.

        Returns:
            The new ranks; none: none could.
        """
        before = len(self._actors)
        last = (method, args, kwargs)
        for newcomer in self._newcomers.join(self._told, last, watch):
            self.workers = (*self.workers, replace(newcomer.where, rank=len(self._actors)))
            self._actors.append(newcomer.spare.actor)
            self._rooms.append(newcomer.spare.room)
        return list(range(before, len(self._actors)))

    def renumber(self) -> None:
        """Tell all ranks their numbers; they are in no group then, until `form`."""
        calls = [
            actor.renumber.remote(membership)
            for actor, membership in zip(self._actors, self._memberships(), strict=True)
        ]
        self.wait(calls, survivable=True)

    def shrink(self, dead: Sequence[int]) -> None:
        """Go on without the dead: those that live are numbered anew, in their order, and are in no group until `form`.

        The room of the dead stays reserved.
        """
        left = [rank for rank in range(len(self._actors)) if rank not in dead]
        for rank in dead:
            ray.kill(self._actors[rank], no_restart=True)  # or one that is only silent would go on
        self._actors = [self._actors[rank] for rank in left]
        self._rooms = [self._rooms[rank] for rank in left]
        self.workers = tuple(replace(self.workers[old], rank=new) for new, old in enumerate(left))
        self._late_polls = {new: self._late_polls[old] for new, old in enumerate(left) if old in self._late_polls}
        self._beats.clear()
        self._ended.clear()
        self.renumber()

    def call(self, method: str, *args: Any, watch: Callable[[bool], None] = lambda _: None) -> list[Any]:
        """Call a method on every worker and wait for all.

        Args:
            method: of `Worker`.
            *args: large ones as object references (`dtrain.cluster.put`).
            watch: called with False a few times a second while waiting, and with True before a failure closes the
                group.

        Returns:
            What each rank returned, in rank order.

        Raises:
            WorkerError: a worker raised, or died (`WorkerDied`). The group is closed by then, and what could be saved
                is `rescued`.
            DtrainError: a worker raised one of dtrain's own; the same.
        """
        results = self.wait(self.submit(method, *args), watch)
        if method in ("enter", "make_model"):
            self._told[method] = method, *args
        elif method == "open":
            if args[0] != "validation":  # what was open for the verb before is of no use any more
                self._told = {key: told for key, told in self._told.items() if not key.startswith("open")}
            self._told[f"open {args[0]}"] = method, *args
        return results

    def submit(
        self, method: str, *args: Any, beside: str | None = None, ranks: Sequence[int] | None = None, **kwargs: Any
    ) -> list[Any]:
        """Send a call to every worker, or to some ranks, without waiting; they run calls in the order they were sent.

        `beside` names a concurrency group, "files": the call then does not wait for the others, nor they for it.
        """
        options = {} if beside is None else {"concurrency_group": beside}
        actors = self._actors if ranks is None else [self._actors[rank] for rank in ranks]
        return [getattr(actor, method).options(**options).remote(*args, **kwargs) for actor in actors]

    def drain(self, calls: Sequence[Any]) -> None:
        """Wait until calls to all ranks have ended, whatever came of them; but not for processes that were ended."""
        calls = [call for rank, call in enumerate(calls) if rank not in self._ended]
        with self._interrupts.watched():
            deadline = time.monotonic() + DRAIN_SECONDS
            while time.monotonic() < deadline and not self.have_answered(calls):
                ray.wait(list(calls), num_returns=len(calls), timeout=POLL_SECONDS)
                self._interrupts.check()

    def have_answered(self, calls: Sequence[Any]) -> bool:
        """Whether `wait` would return at once."""
        return have_answered(calls)

    def wait(
        self,
        calls: Sequence[Any],
        watch: Callable[[bool], None] = lambda _: None,
        patience: float = math.inf,
        ranks: Sequence[int] | None = None,
        survivable: bool = False,
        is_replacing: bool = False,
        blame: float | None = None,
    ) -> list[Any]:
        """Wait for what `submit` returned, for `patience` seconds at most; see `call`.

        Where a worker `is_replacing` another, one that does not start has died. After a first failure the others have
        `blame` seconds to say what happened to them; where it is survivable, as long as they need.

        Raises:
            GroupBroken: where that is `survivable`, instead of WorkerDied: the group is not closed.
        """
        ranks = range(len(calls)) if ranks is None else ranks
        pending = dict(zip(calls, ranks, strict=True))
        if blame is None:  # those who live notice when they wait for the others next; the heartbeat says who hangs
            blame = math.inf if survivable else BLAME_SECONDS
        results, failures = self._collect(pending, watch, patience, survivable, blame)
        if pending and not failures:
            failures[min(pending.values())] = Failure(NOT_STARTED.format(patience), traceback="", died=is_replacing)
        if not failures:
            return [results[rank] for rank in ranks]
        watch(True)  # what the user's code printed before it raised
        error = error_from(failures, len(self._actors), self.workers)
        dead = [rank for rank, failure in failures.items() if failure.died]
        if survivable and isinstance(error, WorkerDied) and len(dead) < len(self._actors):
            told = error_from(failures, len(self._actors), self.workers, are_stopped=False)
            assert isinstance(told, WorkerDied)
            raise GroupBroken(sorted(dead), told)
        self.fail(dead)
        raise error

    def _collect(
        self, pending: dict[Any, int], watch: Callable[[bool], None], patience: float, survivable: bool, blame: float
    ) -> tuple[dict[int, Any], dict[int, Failure]]:
        """What the ranks have answered, and how others failed; those that have done neither stay in `pending`."""
        results: dict[int, Any] = {}
        failures: dict[int, Failure] = {}
        let_go: set[int] = set()
        silent: set[int] = set()  # of whom nobody confirms that they have died
        deadline = time.monotonic() + patience
        with self._interrupts.watched():
            while pending and time.monotonic() < deadline:
                ready, _ = ray.wait(list(pending), num_returns=1 if failures else len(pending), timeout=POLL_SECONDS)
                for call in ready:
                    rank = pending.pop(call)
                    result = outcome_of(call)
                    if isinstance(result, Failure) and result.died and rank in self._ended:
                        result = replace(result, error=self._ended[rank][0])
                    if isinstance(result, Failure) and not failures:
                        deadline = min(deadline, time.monotonic() + blame)
                    (failures if isinstance(result, Failure) else results)[rank] = result
                for call, rank in [(call, rank) for call, rank in pending.items() if self._counts_as_dead(rank)]:
                    del pending[call]
                    failures[rank] = Failure(self._ended[rank][0], traceback="", died=True)
                    silent.add(rank)
                for rank in [rank for rank, failure in failures.items() if failure.died and rank not in let_go]:
                    let_go.add(rank)
                    dead = {rank for rank, failure in failures.items() if failure.died} | self._ended.keys()
                    self._let_go(rank, dead, [*pending.values()], rank in silent)
                if any(not failure.lost_peer and not (survivable and failure.died) for failure in failures.values()):
                    break  # the culprit is known; the others are stuck waiting for it
                self._interrupts.check()
                watch(False)
        return results, failures

    def _let_go(self, lost: int, dead: Collection[int], waiting: Sequence[int], is_silent: bool) -> None:
        """Have ranks end their connections to the machine of one that died, should it be gone with that."""
        address = address_of_lost(lost, self.workers, dead, is_silent) if self.workers else None
        for rank in waiting if address is not None else ():
            self._actors[rank].let_go.options(concurrency_group="watch").remote(address)

    def _counts_as_dead(self, rank: int) -> bool:
        return rank in self._ended and time.monotonic() - self._ended[rank][1] > ENDED_SECONDS

    def fail(self, dead: Sequence[int] = ()) -> None:
        """Close after a failure, when some ranks are dead; what can be saved of the workers' state is `rescued`."""
        try:
            self.rescued = self._rescue(dead)
        finally:
            self.close()

    def progress(self, rank: int = 0, timeout: float = PROGRESS_SECONDS) -> Progress | None:
        """How far a worker is; None if it does not say so at once: the next call then returns what it says.

        What the worker printed is told once; so an answer that comes late is never thrown away.
        """
        if not self._actors or rank in self._ended:
            return None
        call = self._late_polls.pop(rank, None)
        if call is None:
            call = self._actors[rank].progress.options(concurrency_group="watch").remote()
        try:
            progress: Progress = ray.get(call, timeout=timeout)
        except GetTimeoutError:
            self._late_polls[rank] = call
        except (RayActorError, RayTaskError):
            pass
        else:
            return progress
        return None

    def beats(self) -> list[tuple[int, Beat | None]]:
        """What ranks have answered to `Worker.heartbeat` since the last call; None: they never will."""
        if time.monotonic() - self._asked >= BEAT_SECONDS:
            self._asked = time.monotonic()
            for rank, actor in enumerate(self._actors):
                if rank not in self._beats:
                    self._beats[rank] = actor.heartbeat.options(concurrency_group="watch").remote()
        found = []
        for rank, call in list(self._beats.items()):
            if ray.wait([call], timeout=0)[0]:
                del self._beats[rank]
                try:
                    found.append((rank, ray.get(call)))
                except RayError:
                    found.append((rank, None))
        return found

    def stacks(self) -> dict[int, str]:
        """Where each rank is that answers within moments."""
        calls = {
            rank: actor.stack.options(concurrency_group="watch").remote() for rank, actor in enumerate(self._actors)
        }
        ray.wait(list(calls.values()), num_returns=len(calls), timeout=STACK_SECONDS)
        found = {}
        for rank, call in calls.items():
            with contextlib.suppress(RayError):
                found[rank] = ray.get(call, timeout=0)
        return found

    def end(self, rank: int, why: str) -> None:
        """End a process that hangs: with SIGKILL, which ends those that are stopped, too."""
        self._ended[rank] = why, time.monotonic()
        worker = self.workers[rank]
        if worker.node_id == ray.get_runtime_context().get_node_id():
            _kill(worker.pid)
        else:
            there = NodeAffinitySchedulingStrategy(worker.node_id, soft=False)
            runtime_env = dict(self.spec.runtime_env) or None  # which may be how dtrain comes there
            ray.remote(num_cpus=0, scheduling_strategy=there, runtime_env=runtime_env)(_kill).remote(worker.pid)

    def close(self) -> None:
        """End all processes and give back their room. May be called again, and in any state.

        Takes moments, which Ctrl-C does not cut short: it is raised where the verb goes on.
        """
        with self._interrupts.graceful():
            actors, self._actors = self._actors, []
            rendezvous, self._rendezvous = self._rendezvous, None
            try:
                if ray.is_initialized():  # or they have ended with it
                    self._spares.close()
                    self._newcomers.close()
                    for actor in actors:
                        ray.kill(actor, no_restart=True)
                    self._cluster.give_back()
            finally:
                if rendezvous is not None:
                    rendezvous.close()

    def _rescue(self, dead: Sequence[int]) -> dict[str, Array] | None:
        """The job's state from the first rank that lives, if it can still tell it."""
        left = [actor for rank, actor in enumerate(self._actors) if rank not in dead]
        if self.description is None or not left:
            return None
        for actor in left[1:]:
            ray.kill(actor, no_restart=True)  # the first may be waiting for them: their end sets it free
        with contextlib.suppress(RayError):
            state: dict[str, Array] | Failure = ray.get(left[0].rescue.remote(), timeout=RESCUE_SECONDS)
            return None if isinstance(state, Failure) else state
        return None

    def _spawn(self, name: str, rank: int, room: Room) -> Any:
        """Start a process for a rank, or (NO_RANK) one that waits."""
        strategy = PlacementGroupSchedulingStrategy(room.placement, placement_group_bundle_index=room.bundle)
        resources = dict(self.spec.resources)
        actor_class = ray.remote(concurrency_groups={"watch": 1, "files": 1}, max_restarts=0)(Worker)
        try:
            return actor_class.options(
                name=f"dtrain:{self.spec.run_name}:{name}",
                namespace=NAMESPACE,
                num_cpus=resources.pop("CPU", 0),
                num_gpus=resources.pop("GPU", 0),
                resources=resources or None,
                scheduling_strategy=strategy,
                runtime_env=dict(self.spec.runtime_env) or None,
            ).remote(self.spec.run_name, rank)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"runtime_env={dict(self.spec.runtime_env)!r} is refused by Ray: {error}") from error

    def _set_up(self, ranks: Sequence[int], survivable: bool = False) -> None:
        """Prepare the processes of these ranks."""
        by_node = self._settings()
        self.intra_threads = by_node[self.workers[0].node_id].intra_threads
        self.wait(self.submit("setup", by_node, ranks=ranks), ranks=ranks, survivable=survivable)

    def _settings(self) -> dict[str, WorkerSettings]:
        """For a worker on each of the cluster's nodes: one that will not have to share its cores with more of them."""
        cpus = {node["NodeID"]: node["Resources"].get("CPU", 1.0) for node in ray.nodes() if node["Alive"]}
        nodes = Counter(worker.node_id for worker in self.workers)
        spec = self.spec
        at_most = -(-(spec.num_workers + spec.extra_workers) // max(1, len(cpus))) if spec.extra_workers else 1
        found = {node: spec.settings(cpus.get(node, 1.0), max(at_most, nodes[node])) for node in {*cpus, *nodes}}
        return {**found, ANY_NODE: spec.settings(min(cpus.values(), default=1.0), at_most)}

    def _take_places(self, ranks: Sequence[int], survivable: bool = False) -> None:
        self.wait(self._place(ranks), ranks=ranks, survivable=survivable)

    def _place(self, ranks: Sequence[int]) -> list[Any]:
        """Tell these ranks who they are, and what a test has planned for them; the calls."""
        memberships = self._memberships()
        plan = FaultPlan.current
        return [
            self._actors[rank].take_place.remote(memberships[rank], plan.of_next_life(rank) if plan else ())
            for rank in ranks
        ]

    def _memberships(self) -> list[Membership]:
        """Each rank's place in the group that forms next."""
        return assign([worker.node_id for worker in self.workers], self._generation)

    def _start_spares(self) -> None:
        """Let there be one in each room that no rank has."""
        used = {*self._rooms, *self._spares.rooms, *self._newcomers.rooms}
        free = [room for room in self._cluster.rooms if room not in used]
        if free and (self.spec.spares or self.spec.extra_workers):
            self._spares.start(free, self._settings())

    def form_anew(self, watch: Callable[[bool], None]) -> None:
        """The same, where that it breaks is survived.

        Raises:
            GroupBroken: one has died. Where it died while they met, Horovod ends the others, too: all are to be
                replaced.
        """
        self.wait(self.submit("where"), watch, survivable=True)  # all live, before any waits for another
        try:
            self.form(survivable=True)
        except GroupBroken as broken:
            raise GroupBroken(range(len(self._actors)), broken.error) from None

    def form(self, survivable: bool = False) -> None:
        """Make the ranks one group, a new one where there was one. On one machine it meets and talks on loopback."""
        nodes = [worker.node_id for worker in self.workers]
        here = ray.get_runtime_context().get_node_id()
        on_one_node = len(set(nodes)) == 1
        host = "127.0.0.1" if set(nodes) == {here} else ray.util.get_node_ip_address()
        if self._rendezvous is not None and self._rendezvous.host != host:
            self._rendezvous.close()
            self._rendezvous = None
        self._rendezvous = self._rendezvous or RendezvousServer(host)
        if self._scope is not None:
            self._rendezvous.drop(self._scope)  # who is of an older generation finds nobody there
        scope = self._scope = self._rendezvous.new_scope()
        interface = "lo" if on_one_node else None
        calls = [
            actor.join.remote(membership, scope.address, interface, self.spec.timeout)
            for actor, membership in zip(self._actors, self._memberships(), strict=True)
        ]
        self._generation += 1
        self.wait(calls, survivable=survivable, blame=BLAME_SECONDS)
        self._start_spares()


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def threads_for(cpus: float, workers_on_node: int) -> tuple[int, int]:
    """Intra-op and inter-op threads of each worker on a node with so many CPUs.

    One thread across operations: TensorFlow's spinning threads otherwise starve those of Horovod and Gloo, a factor of
    3 to 5 on small steps when every core has a worker.
    """
    return max(1, int(cpus) // max(1, workers_on_node)), 1


def check_name(run_name: str) -> None:
    """Refuse a run whose workers are alive under another driver.

    Raises:
        ConfigError: naming the run.
    """
    if not wait_for_name(run_name):
        raise ConfigError(f"run_name={run_name!r} is training on this cluster already; choose another run_name")


def wait_for_name(run_name: str) -> bool:
    """Whether none of its actors is alive; one that was ended a moment ago keeps its name a while."""
    deadline = time.monotonic() + NAME_SECONDS
    while time.monotonic() < deadline:
        names = [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)]
        if not any(name.startswith(f"dtrain:{run_name}:") for name in names):
            return True
        time.sleep(POLL_SECONDS)
    return False
