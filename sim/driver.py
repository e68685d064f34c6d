"""Time, by SimPy: one process for the arrivals, one for each replica, one that looks at the fleet. Request path.

SimPy's clock is the run's clock: integer nanoseconds. At equal times arrivals come first, as they do in the
real engine's stepped clock, so that both see the same order of events.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any, TypeAlias, cast

import simpy

from lab.assembly import ControlPlane
from lab.control.clock import ControlTimer, MeasuredControl
from lab.control.core import EngineCore
from lab.control.loop import IDLE, serve
from lab.control.plan import StepPlan, StepResult
from lab.control.request import Request
from sim.executor import SimExecutor
from sim.links import Link, Network
from sim.moves import Failure, Moves

NEVER = 1 << 62

LostStep: TypeAlias = tuple[int, str, int]
"""A step that a failure cut off: replica, digest, and how long it would have taken in nanoseconds."""

Progress = Callable[[EngineCore, int], None]


class Clock(simpy.Environment):
    """SimPy's clock, which goes on without an event where nothing else is due until then."""

    def pass_time(self, wait: int) -> bool:
        """Let time pass at once; False if anything is due before or then."""
        then = self._now + wait
        if self._queue and self._queue[0][0] <= then:
            return False
        self._now = then
        return True

    def horizon(self) -> int:
        """When the next event is due."""
        return int(self._queue[0][0]) if self._queue else NEVER


class MeasuredOver(MeasuredControl):
    """The control plane's own time by the wall clock, around an executor that models all else."""

    def __init__(self, executor: SimExecutor) -> None:
        super().__init__()
        self._executor = executor

    def plan_ns(self, plan: StepPlan) -> int:
        took = super().plan_ns(plan)
        self._executor.plan_ns(plan)
        return took


class Watched:
    """An executor whose plans somebody else wants to see."""

    def __init__(self, executor: SimExecutor) -> None:
        self.capacity, self.close = executor.capacity, executor.close
        self._executor = executor
        self._plan: StepPlan | None = None

    def execute(self, plan: StepPlan) -> StepResult:
        self._plan = plan
        return self._executor.execute(plan)

    def taken(self) -> StepPlan | None:
        """The plan that has been given since this was asked last."""
        plan, self._plan = self._plan, None
        return plan


class Simulation:
    """A fleet of replicas behind a gateway, fed from a list of requests in order of arrival.

    `executor` is the first replica's data plane; further replicas get one of the same kind.
    """

    def __init__(
        self,
        control: ControlPlane,
        executor: SimExecutor,
        requests: Sequence[Request],
        progress: Progress | None = None,
        *,
        api_ns: int = 0,
        measured_control: bool = False,
        executors: Sequence[SimExecutor] = (),
        link: Link | Network | None = None,
        failures: Sequence[Failure] = (),
        lost_steps: list[LostStep] | None = None,
    ) -> None:
        """`api_ns`: from a request's arrival until the gateway hears of it. `measured_control`: planning takes what it
        takes here and now, and no two runs are equal. `executors`: of each replica of a topology, where they aren't
        alike. `link`: what KV moves over from replicas that prefill to those that decode. `failures`: replicas that are
        lost during the run. `lost_steps` gets the steps that they cut off."""
        self._env = Clock()
        self._api_ns, self._measured_control = api_ns, measured_control
        self._gateway, self._fleet = control.gateway, control.fleet
        self._executor, self._executors = executor, executors
        self._requests = requests
        self._next = 0
        self._progress = progress
        self._idle: dict[int, simpy.Event] = {}
        self._serving = 0
        self._done = self._env.event()
        self._moves = Moves(self._env, control.gateway, control.fleet, link, self._wake, self._end_if_over)
        self._failures = failures
        self._lost_steps: list[LostStep] = [] if lost_steps is None else lost_steps
        self._coming = 0
        """Lost replicas that will be replaced and aren't ready."""

    @property
    def now(self) -> int:
        return int(self._env.now)

    def run(self) -> None:
        """Until every request has ended. Raises what a policy or the cost model raises."""
        self._env.process(self._arrivals())
        for core in self._fleet.cores:
            self._serve(core)
        for failure in self._failures:
            self._env.process(self._fails(failure))
        if self._fleet.spec.most > self._fleet.spec.replicas:
            self._env.process(self._looks())
        try:
            self._env.run(until=self._done)
        except BaseException:
            self._moves.interrupt(self.now)
            raise

    def _arrivals(self) -> Generator[simpy.Event, Any, None]:
        env, requests = self._env, self._requests
        while self._next < len(requests):
            wait = self._due() - env.now
            if wait > 0:
                yield env.timeout(wait)
            awake: dict[int, None] = {}
            while self._next < len(requests) and self._due() <= env.now:
                request = requests[self._next]
                self._next += 1
                awake[self._gateway.submit(request, int(env.now)).replica] = None
            if self._next == len(requests):
                awake = dict.fromkeys(sorted(self._idle))  # a last chance for what was left waiting
            for index in awake:
                self._wake(index)
        self._end_if_over()

    def _due(self) -> int:
        """When the next request reaches the gateway."""
        return self._requests[self._next].arrival + self._api_ns

    def _end_if_over(self) -> None:
        over = self._next == len(self._requests) and self._serving == len(self._idle)
        if over and self._moves.active and not (self._moves.moving or self._more_to_come):
            self._moves.give_up(self.now)  # nobody is left to take them
        over = over and not self._moves.active
        if over and not self._done.triggered:
            self._done.succeed()

    @property
    def _more_to_come(self) -> bool:
        """Whether a replica may yet start."""
        spec = self._fleet.spec
        return bool(self._coming) or spec.most > spec.replicas

    def _wake(self, index: int) -> None:
        event = self._idle.pop(index, None)
        if event is not None:
            event.succeed()

    def _serve(self, core: EngineCore) -> None:
        if self._fleet.role(core.replica) == "prefill":
            core.relocation.taker = lambda live, now: self._moves.begin(live, core, now)
        # Executors keep what a run has told them, so replicas don't share one.
        alike = self._executors[self._fleet.slots[core.replica]] if self._executors else self._executor
        executor = alike if core.replica == 0 else alike.another(core.replica)
        self._serving += 1
        self._env.process(self._replica(core, executor))

    def _replica(self, core: EngineCore, executor: SimExecutor) -> Generator[simpy.Event, Any, None]:
        env, index = self._env, core.replica
        price = executor.decode_time
        timer: ControlTimer = executor
        if self._measured_control:
            price, timer = None, MeasuredOver(executor)
        coast = None if price is None else lambda now: core.coast(price, now, self._until(index, now))
        watched = (
            Watched(executor) if self._moves.layerwise and self._fleet.role(index) == "prefill" else None
        )
        for wait in serve(core, watched or executor, timer, lambda: cast("int", env._now), coast):
            if watched is not None and (plan := watched.taken()) is not None:
                self._moves.computing(core, plan, int(env.now), wait)
            if self._moves.pending:
                self._moves.reserve(index, int(env.now))
            if wait == IDLE:
                over = self._next == len(self._requests) and not self._moves.active and not self._coming
                leaves = self._fleet.draining(index) and not self._moves.concern(core)
                if core.has_work and (over or leaves):
                    raise core.stalled()
                if leaves:
                    self._fleet.left(index, int(env.now))
                    break
                # Idle to the end: the scaling policy may still send it away while others are busy.
                awake = self._idle[index] = env.event()
                self._end_if_over()
                yield awake
                if self._fleet.lost(index):
                    break
                continue
            if env.pass_time(wait):
                if self._progress is not None:
                    self._progress(core, int(env.now))
                continue
            yield env.timeout(wait)
            if self._next < len(self._requests) and self._due() == env.now:
                # The arrival process is due at this very instant; let it go first.
                yield env.timeout(0)
            if self._fleet.lost(index):
                self._lost_steps.append((index, core.digest, wait))
                break
            if self._progress is not None:
                self._progress(core, int(env.now))
        self._serving -= 1
        self._end_if_over()

    def _until(self, index: int, now: int) -> int:
        """Until when nothing but its own steps concerns a replica."""
        return now if self._moves.waits_for(index) else self._env.horizon()

    def _fails(self, failure: Failure) -> Generator[simpy.Event, Any, None]:
        """A replica is lost; what it had goes back to the router, and another takes its place."""
        env = self._env
        yield env.timeout(failure.at)
        now = int(env.now)
        core = self._fleet.fail(failure.replica, now)
        if core is None:
            return  # it had gone already
        again = failure.back is not None
        self._coming += again
        self._moves.lost(core, now)
        if core.replica in self._idle:
            self._wake(core.replica)
        if failure.back is not None:
            yield env.timeout(failure.back)
            index, ready = self._fleet.replace(core.replica, int(env.now))
            yield env.timeout(ready - int(env.now))
            self._coming -= 1
            fresh = self._fleet.started(index, int(env.now))
            if fresh is not None:  # the scaling policy may have called it off
                self._serve(fresh)
                self._moves.somebody_is_up(int(env.now))
        self._end_if_over()

    def _looks(self) -> Generator[simpy.Event, Any, None]:
        """The scaling policy's turn, once an interval."""
        env, interval = self._env, self._fleet.scaling.interval
        while True:
            yield env.timeout(interval)
            for index, ready in self._fleet.look(int(env.now)):
                env.process(self._start(index, ready - int(env.now)))
            for index in [index for index in self._idle if self._fleet.draining(index)]:
                self._wake(index)
            if self._moves.active:
                self._moves.somebody_is_up(int(env.now))  # recalled

    def _start(self, index: int, cold: int) -> Generator[simpy.Event, Any, None]:
        yield self._env.timeout(cold)
        core = self._fleet.started(index, int(self._env.now))
        if core is not None:
            self._serve(core)
            self._moves.somebody_is_up(int(self._env.now))
