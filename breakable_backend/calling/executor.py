"""What happens when a compiled function is called: find the key, then run plainly, record, or replay.

Call 1 of a key runs plainly and is the warm-up. Call 2 records. Call 3 and later replay. A key is everything that a
recording depends on: the addresses of static inputs, the numbers, the layouts that Dynamo left open, host scalars.
"""

from __future__ import annotations

import functools
import logging
import struct
import sys
import time
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from breakable_backend import _torch, locks
from breakable_backend.active import Call, in_call
from breakable_backend.active import call as current_call
from breakable_backend.active import handler as door
from breakable_backend.callers import Callers
from breakable_backend.calling import policy
from breakable_backend.calling.device_errors import blame
from breakable_backend.compiling.lowering import Lowered
from breakable_backend.compiling.partition import partition
from breakable_backend.drivers import LOCK_TIMEOUT, CaptureDriver
from breakable_backend.errors import CaptureError, PartitionError, Passing, first_line
from breakable_backend.failures import passing
from breakable_backend.faults import raise_if_ours
from breakable_backend.ir.effects import python_floats, written_inputs
from breakable_backend.ir.lifetimes import needed
from breakable_backend.ir.overlap import Fixed, Region, any_clash, any_touch
from breakable_backend.ir.program import Program, Reason
from breakable_backend.marks.marking import Scope
from breakable_backend.options import Options
from breakable_backend.recordings import buffers
from breakable_backend.recordings.observer import Observers, Subject, observers_of
from breakable_backend.recordings.plain import Plain, run_plain, write_plain
from breakable_backend.recordings.recording import Binding, Plan, Recorded, Recording, check_places, record
from breakable_backend.recordings.replay import Function, Replay

log = logging.getLogger(__name__)

MOVED = "moved to a larger pool"
"""Why recordings went that are made anew at the next call of their key."""

PUT_OFF: Mapping[Passing, str] = {
    "memory": "memory ran out",
    "busy": "another thread had what a capture needs",
    "disturbed": "something made the capture invalid, another thread most likely",
}
"""Why a recording is tried again later, as the report counts it."""

ShapeKey = tuple[Any, ...]


class Alignments(tuple[int, ...]):
    """How many bytes behind a multiple of ``buffers.ALIGNMENT`` each bridged input begins. In a key only if one is not there."""

    __slots__ = ()

    def __str__(self) -> str:
        return f"{', '.join(map(str, self))} bytes off {buffers.ALIGNMENT}"


class Key(NamedTuple):
    """What a recording depends on. A named tuple, since each call makes one, and a frozen dataclass takes longer."""

    addresses: tuple[int, ...]
    shapes: ShapeKey


@dataclass(eq=False)
class Entry:
    """One key: what was recorded for it, and how often it was called."""

    key: Key
    recording: Recording | None = None
    replay: Replay | None = None
    run: Function | None = None
    """What a call does. The first one looks whether all is in its place, so this is not always the function of the replay."""
    number: int = -1
    """Which recording of its program it is, from 0."""
    warm: bool = False
    """Whether a plain call went through."""
    calls: int = 0
    replays: int = 0
    captures: int = 0
    record_copies: int = 0
    warmup_seconds: float = 0.0
    record_seconds: float = 0.0
    why: str = ""
    """Why it was new: what told it from the keys before it."""
    last_call: int = 0
    trials: policy.Trials = field(default_factory=policy.Trials)
    """Recordings that failed for reasons that pass."""
    refused: str = ""
    """Why this key is not recorded; empty if it may be."""


@dataclass
class AddressSet:
    """The keys that share a set of static addresses, least recently used first."""

    pointers: list[int] = field(default_factory=list)
    """The addresses, each at its argument's index."""
    entries: OrderedDict[ShapeKey, Entry] = field(default_factory=OrderedDict)
    guards: list[weakref.ref[torch.Tensor]] = field(default_factory=list)
    """Weak references whose death takes the set with it."""
    fixed: Fixed = field(default_factory=Fixed)
    """Where the static inputs lie."""
    apart: tuple[list[int], list[Any]] = ([], [])
    """Where the other tensors lay when they were last found to share no memory that is written."""
    last_call: int = 0


@dataclass
class Statistics:
    """Counts since the function was compiled."""

    calls: int = 0
    captures: int = 0
    recordings: int = 0
    evictions: int = 0
    plain: Counter[str] = field(default_factory=Counter)
    """Plain calls, by why they were plain."""
    recorded: Counter[str] = field(default_factory=Counter)
    """Recordings, by why there was none."""
    finished_replays: int = 0
    finished_copies: int = 0
    """Replays and copies of recordings that are gone."""
    lowering_seconds: float = 0.0
    bound: int = 0
    """Calls of bound functions, which did not ask Dynamo's guards."""
    misfits: Counter[str] = field(default_factory=Counter)
    """Calls of bound functions that did not fit, by why."""


@dataclass(frozen=True)
class KeySnapshot:
    """One key, as it was at one moment."""

    entry: Entry
    """Which one: what it holds goes on changing."""
    recording: Recording | None
    replay: Replay | None
    """Both, or neither."""
    calls: int
    replays: int


@dataclass(frozen=True)
class Snapshot:
    """What an executor had at one moment, for tools, while calls go on."""

    executor: Executor
    program: Program
    statistics: Statistics
    notes: tuple[str, ...]
    keys: tuple[KeySnapshot, ...]
    """In the order in which they came."""


class Executor:
    """Runs one lowered graph. Thread-safe: calls that use the pool hold its lock.

    What tools read has a lock of its own, which calls hold only where they add to it or take from it: neither waits for a
    whole call of the other. A replay does not take it.
    """

    def __init__(self, lowered: Lowered, scope: Scope, options: Options, driver: CaptureDriver, name: str) -> None:
        self.lowered, self.options, self.driver, self.name = lowered, options, driver, name
        self.statistics = Statistics()
        self._changing = locks.lock()
        """Held while the dictionaries change, and what their entries hold."""
        self.sets: OrderedDict[tuple[int, ...], AddressSet] = OrderedDict()
        self.last: AddressSet | None = None
        """The one among them that was replayed last."""
        self.scope = scope
        self.bridged: set[str] = set()
        """Inputs written by captured segments that came at too many addresses to key them."""
        self.variety = policy.Variety()
        """Of the values of host scalars, and of the addresses of written inputs."""
        self.notes: list[str] = []
        """What the executor changed its mind about, for the report."""
        self.moves, self.most_moved = 0, 0
        """How often a key of this program outgrew the pool; and the bytes that it had then, at most."""
        self.tap: Callable[[Entry, list[Any]], None] | None = None
        """Shown what is replayed, before it is; measurements set it for a call."""
        self.dropped: OrderedDict[Key, str] = OrderedDict()
        """Why recordings went: of the last ``policy.MAX_DROPPED`` keys."""
        self.callers = Callers()
        self.observers: Observers = observers_of(Subject(name, options, log))
        self._plain_steps = self.observers if self.observers.sees_plain_steps else None
        self._written = written_inputs(lowered.module)
        self._cut()
        driver.tenants.append(weakref.ref(self, driver.tenants.remove))
        # Dynamo may drop an executor without a word; its graphs then go at once, and not with the next collection.
        weakref.finalize(self, _release_all, self.sets, self.statistics, driver).atexit = False

    def _cut(self) -> None:
        """Make the program, and from it how a key is read."""
        self.program: Program = partition(self.lowered, self.scope, min_kernels=self.options.min_kernels)
        self.capturable = bool(self.program.graph_segments)
        self._straight: Plain | None = None
        moving = [v for v in self.program.inputs if v.kind == "tensor" and v.value.layout is torch.strided]
        written = {value.index for value in self.program.inputs if value.name in self._written}
        self._moving = {value.index: value.index in written for value in moving} if written else {}
        self._fluid = [value.index for value in moving if written and _is_open(value.value)]
        self._lengths = [] if self._fluid else [Region.of(value.value, start=0).end for value in moving if written]
        self._keys = _KeyReader.of(self.program, self._keyed(), self.options.scalars == "key")
        self._read_key = self._keys.read
        self.observers.cut(self.program)

    def _keyed(self) -> frozenset[str]:
        written = self.program.written_by_graphs()
        tensors = {value.name for value in self.program.inputs if value.kind == "tensor"}
        return frozenset((written & tensors) - self.bridged)

    # calls

    def __call__(self, args: list[Any], known: AddressSet | None = None) -> list[Any]:
        """Run once.

        Args:
            args: the arguments of the lowered graph; cleared, so that what only this call needs can go early.
            known: the addresses that they have, if the caller has looked.

        Raises:
            CaptureError: called inside somebody else's capture, and an eager step cannot run there.
            ReplayError: an argument does not fit what was recorded.
            EagerOutputError: an eager step's result does not fit what was recorded.
            InternalError: a fault of this package.
        """
        self.statistics.calls += 1
        driver = self.driver
        if door.held.get() is not None and (handler := door.get()) is not None:
            self._count_plain("called inside capture")
            values = list(args)
            args.clear()
            return run_plain(self.program, values, handler, observer=self._plain_steps)
        if not self.capturable:
            return self._plain(args, "nothing to capture")
        if driver.is_capturing():
            self._refuse_foreign_capture()
            return self._plain(args, "called inside another capture")
        if (outer := current_call.get()) is not None and not outer.over:  # in_call(), without a call
            return self._plain(args, "called inside an eager step")
        if _torch.dispatch_mode_active():
            return self._plain(args, "a dispatch mode is active")
        # With a time limit, a lock that is free takes three times as long (0.7 us, H100).
        if not driver.lock.acquire(False) and not driver.lock.acquire(True, driver.patience):
            lose_patience(driver)
            return self._plain(args, f"the pool was busy for {LOCK_TIMEOUT:g} s", logging.WARNING)
        if driver.busy:  # with this thread, whose eager step has left the context of its call
            driver.lock.release()
            return self._plain(args, "called inside an eager step")
        # An object for each call (0.05 us): the context may be copied in an eager step, and the copy outlive the call.
        driver.busy, call = True, Call()
        current_call.set(call)
        try:
            stream = driver.begin()
            try:
                return self._locked(args, stream, driver, known)
            finally:
                driver.end(stream)
        except Exception as error:
            raise_if_ours(error, log)
            raise
        finally:
            call.over, driver.busy = True, False
            driver.lock.release()
            if driver.deferred:
                run_deferred(driver)

    def _locked(
        self, args: list[Any], stream: int, driver: CaptureDriver, known: AddressSet | None = None
    ) -> list[Any]:
        addresses, entry = self.last, None
        if addresses is not None and (addresses is known or self._keys.are_at(addresses.pointers, args)):
            entry = addresses.entries.get(self._keys.shapes(args))
        if entry is None:
            key = self._read_key(args)
            addresses = self.sets.get(key.addresses)
            entry = addresses.entries.get(key.shapes) if addresses is not None else None
        if self._moving and self._overlap(args, addresses):
            return self._plain(args, "arguments share memory, and one is written", logging.WARNING)
        if entry is None:
            entry = self._admit(key, args)
        entry.calls += 1
        entry.last_call = self.statistics.calls
        if entry.run is not None:
            entry.replays += 1
            assert addresses is not None
            self._touch(entry, addresses)
            driver.bring(args)
            if self.tap is not None:
                self.tap(entry, list(args))
            try:
                return entry.run(args, stream)
            except Exception as error:
                blame(error, driver, self.name, self._latest())
                raise
        if entry.refused:
            return self._plain(args, entry.refused, logging.WARNING)
        if entry.warm:
            if entry.trials.is_due(entry.calls):
                return self._record(entry, args, stream, driver)
            if addresses is not None:
                self._touch(entry, addresses)
            return self._plain(args, f"waits to be recorded again: {PUT_OFF[entry.trials.cause]}")
        self.callers.note()
        started = time.perf_counter()
        outputs = self._plain(args, "warm-up")
        entry.warmup_seconds = time.perf_counter() - started
        entry.warm = True
        return outputs

    def replay_at(self, args: list[Any], entry: Entry | None, run: Function | None) -> list[Any] | None:
        """``run``, for a caller that knows that ``args`` are at the addresses of ``entry``. None: not now, and nothing was done.

        ``args`` may lack static inputs that ``run`` does not name. What is around it is :meth:`__call__`'s, written once more:
        each function between would take 0.1 us of every call.
        """
        driver, outer = self.driver, current_call.get()
        if (
            door.held.get() is not None
            or (outer is not None and not outer.over)
            or driver.is_capturing()
            or self.tap is not None
            or entry is None
            or run is None
            or _torch.dispatch_mode_active()
            or not driver.lock.acquire(False)
        ):
            return None
        if driver.busy:
            driver.lock.release()
            return None
        driver.busy, call = True, Call()
        current_call.set(call)
        try:
            if entry.run is not run or self._keys.shapes(args) != entry.key.shapes:
                return None
            addresses = self.last
            if addresses is None or addresses.entries.get(entry.key.shapes) is not entry:
                addresses = self.sets[entry.key.addresses]
            stream = driver.begin()
            try:
                self.statistics.calls += 1
                entry.calls += 1
                entry.replays += 1
                entry.last_call = self.statistics.calls
                self._touch(entry, addresses)
                driver.bring(args)
                return run(args, stream)
            except Exception as error:
                blame(error, driver, self.name, self._latest())
                raise_if_ours(error, log)
                raise
            finally:
                driver.end(stream)
        finally:
            call.over = True
            driver.busy = False
            driver.lock.release()
            if driver.deferred:
                run_deferred(driver)

    def _latest(self) -> list[Recording]:
        """What was replayed last, and before that: the GPU may be that far behind."""
        entries = [entry for addresses in self.sets.values() for entry in addresses.entries.values()]
        entries.sort(key=lambda entry: -entry.last_call)
        return [entry.recording for entry in entries if entry.recording is not None][:2]

    def _plain(self, args: list[Any], why: str, level: int = logging.INFO) -> list[Any]:
        self._count_plain(why, level)
        with self.observers.span(f"plain, {why}"):
            try:
                if self._plain_steps is None:
                    return (self._straight or self._write_plain()).function(args)
                values = list(args)
                args.clear()
                return run_plain(self.program, values, observer=self._plain_steps, drawing=self.driver.drawing)
            except Exception as error:
                raise_if_ours(error, log)
                raise

    def _write_plain(self) -> Plain:
        """The function of plain calls, made for the first of them."""
        # Where two threads make one at once, or the program is cut anew meanwhile, either is right.
        made = write_plain(self.lowered, self.program, self.driver.drawing, f"{self.name} plain", self.observers.file)
        self._straight = made
        return made

    def _count_plain(self, why: str, level: int = logging.INFO) -> None:
        with self._changing:
            self.statistics.plain[why] += 1
        self.observers.plain(why, level)

    def _refuse_foreign_capture(self) -> None:
        if self.program.reasons:
            first = self.program.reasons[0]
            raise CaptureError(
                f"{self.name} was called inside another CUDA graph capture, but has an eager step: {first}",
                where=first.source,
                fix="call it outside that capture, or capture the parts around it",
            )

    # keys

    def _admit(self, key: Key, args: Sequence[Any]) -> Entry:
        """A place for a key that is new; a refused one if there is no room. May change how keys are read."""
        if self._changed_mind(args):
            key = self._read_key(args)
        now = self.statistics.calls
        addresses = self.sets.get(key.addresses)
        if addresses is not None:
            addresses.last_call = now
        keys = _held(addresses.entries) if addresses is not None else None
        admission = policy.admit(now, _held(self.sets), keys, self.options.max_recordings)
        if admission.refused:
            return Entry(key, refused=admission.refused)
        if admission.evicts_set:
            self._drop_set(next(iter(self.sets)), "it was evicted for other addresses", wait=False)
            self.statistics.evictions += 1
        if addresses is None:
            addresses = AddressSet(
                pointers=self._keys.pointers(key),
                guards=self._guards(key.addresses, args),
                fixed=self._fixed(args),
                last_call=now,
            )
            with self._changing:
                self.sets[key.addresses] = addresses
            self.last = None
        if admission.evicts_key:
            shapes, oldest_entry = next(iter(addresses.entries.items()))
            self._remember(oldest_entry, "it was evicted for other keys")
            with self._changing:
                del addresses.entries[shapes]
                gone = _emptied([oldest_entry], self.statistics)
            _release(gone, self.driver, wait=False)
            self.statistics.evictions += 1
        entry = Entry(key, why=self._why_new(key))
        with self._changing:
            addresses.entries[key.shapes] = entry
        return entry

    def _why_new(self, key: Key) -> str:
        if key in self.dropped:
            return self.dropped.pop(key)
        if not self.statistics.recordings:
            return "first of this program"
        if any(key.addresses != addresses and key.shapes in known.entries for addresses, known in self.sets.items()):
            return "static or written inputs at new addresses"
        return "new numbers, layouts, alignments or host scalars"

    def _remember(self, entry: Entry, why: str) -> None:
        if entry.recording is not None:
            self.observers.noted(f"recording {entry.number} goes: {why}")
            self.dropped[entry.key] = why
            if len(self.dropped) > policy.MAX_DROPPED:
                self.dropped.popitem(last=False)

    def _overlap(self, args: Sequence[Any], addresses: AddressSet | None) -> bool:
        """Whether an argument that is written lies in memory of another.

        Dynamo does not guard on that. A bridge would not see what is written through the other argument. Two static
        inputs may: they are used where they are. Most calls have their arguments where the last one had them.
        """
        data_ptr = torch.Tensor.data_ptr
        places = [data_ptr(args[index]) for index in self._moving]
        layouts = [(args[index].shape, args[index].stride()) for index in self._fluid]
        if addresses is not None and (places, layouts) == addresses.apart:
            return False
        fixed = addresses.fixed if addresses is not None else self._fixed(args)
        if self._fluid or any_touch(zip(places, self._lengths, strict=True), fixed):
            moving = (Region.of(args[index], written) for index, written in self._moving.items())
            if any_clash(moving, fixed):
                return True
        if addresses is not None:
            addresses.apart = places, layouts
        return False

    def _fixed(self, args: Sequence[Any]) -> Fixed:
        static = (value for value in self.program.inputs if value.kind == "static")
        return Fixed(Region.of(args[value.index], value.name in self._written) for value in static)

    def _touch(self, entry: Entry, addresses: AddressSet) -> None:
        addresses.last_call = self.statistics.calls
        if len(addresses.entries) > 1:
            addresses.entries.move_to_end(entry.key.shapes)
        if addresses is not self.last:  # which is the youngest
            self.last = addresses
            self.sets.move_to_end(entry.key.addresses)

    def _guards(self, addresses: tuple[int, ...], args: Sequence[Any]) -> list[weakref.ref[torch.Tensor]]:
        me, ending = weakref.ref(self), sys.is_finalizing  # at the end of a process modules lose their names

        def drop() -> None:
            if (executor := me()) is not None:
                executor._drop_set(addresses, "a static input had died", wait=False)
                executor.driver.settle()

        def died(_: Any) -> None:
            if not ending() and (executor := me()) is not None:
                executor.driver.deferred.append(drop)
                run_deferred(executor.driver)

        return [weakref.ref(args[v.index], died) for v in self.program.inputs if v.kind == "static"]

    def _changed_mind(self, args: Sequence[Any]) -> bool:
        """Count what varies from key to key; where that is too much, give up keying it. True if keys are now others."""
        keyed, scalars = self._keyed(), frozenset[str]()
        if self.options.scalars == "key":
            scalars = frozenset(value.name for value in self.program.inputs if value.kind == "scalar")
        changed = False
        for value in self.program.inputs:
            if value.name in keyed:
                changed |= self._count(
                    value.name, args[value.index].data_ptr(), policy.MAX_ADDRESSES, self._give_bridge
                )
            elif value.name in scalars:
                changed |= self._count(
                    value.name, _scalar_bytes(args[value.index]), policy.MAX_SCALAR_VALUES, self._give_up_scalar
                )
        if changed:
            self._drop_all("keys are read otherwise since then", wait=False)
            self._cut()
        return changed

    def _count(self, name: str, value: Any, limit: int, give_up: Callable[[str], None]) -> bool:
        if not self.variety.is_too_much(name, value, limit):
            return False
        give_up(name)
        return True

    def _give_bridge(self, name: str) -> None:
        self.bridged.add(name)
        self._note(
            f"{name} is written by captured segments and came at more than {policy.MAX_ADDRESSES} addresses: copied in and back"
        )

    def _give_up_scalar(self, name: str) -> None:
        self.scope = replace(self.scope, host_scalars=self.scope.host_scalars - {name})
        self._note(
            f"host scalar {name} had more than {policy.MAX_SCALAR_VALUES} values: the ops that read it run eagerly"
        )

    def _note(self, text: str) -> None:
        with self._changing:
            self.notes.append(text)
        self.observers.noted(text, logging.WARNING)

    # recording

    def _record(self, entry: Entry, args: list[Any], stream: int, driver: CaptureDriver) -> list[Any]:
        observers = self.observers
        observers.recording(driver.device)
        plan = Plan(
            keyed=self._keyed(),
            device_scalars=self.options.scalars == "device",
            fresh_outputs=self.options.outputs == "fresh",
            observer=observers,
            keep=observers.reads_values,
        )
        program, values = self.program, list(args)
        args.clear()
        started = time.perf_counter()
        if entry.trials.cause == "memory":
            driver.make_room()
        if driver.reuses_memory and not observers.reads_values:
            self._make_way(needed(program, Binding.of(program, values).symbols), driver)
        try:
            with observers.span("record"):
                auto_break, recut = self.options.auto_break, functools.partial(self._recut, self.scope)
                recorded = record(program, driver, values, plan, stream, auto_break=auto_break, recut=recut)
        except Exception as error:
            if cause := passing(error):  # in an eager step: a plain call may take less memory
                self._put_off(entry, cause, first_line(error))
            raise
        if recorded.put_off is not None:
            return self._put_off_call(entry, program, recorded)
        recording, outputs, failed = recorded.recording, recorded.outputs, recorded.failed
        entry.record_seconds = time.perf_counter() - started
        entry.record_copies = recorded.copies
        entry.captures = len(recording.graphs)
        entry.number = self.statistics.recordings
        with self._changing:
            self.statistics.recordings += 1
            self.statistics.recorded[entry.why] += 1
            self.statistics.captures += entry.captures
        if self._alive(entry) and recording.graphs:
            replay = observers.replay(recording, f"{self.name} replay {entry.number}", recorded.program)
            with self._changing:
                entry.recording, entry.replay, entry.run = recording, replay, _checked_once(entry, recording, replay)
            observers.recorded(entry.number, entry.why, recording, replay, entry.record_seconds)
        else:
            # A static input died while an eager step ran; or there is nothing to replay.
            graphs, owner = recording.graphs, [recording]
            del recorded, recording
            driver.release(graphs, owner)
        if failed:
            self._demote(program, failed)
        return outputs

    def _make_way(self, need: int, driver: CaptureDriver) -> None:
        """Where the pool is too small for what is recorded next: all else leaves it, and is recorded in a larger one when called.

        The old pool goes before the new one is made. That takes a wait for the GPU, once for each size that outgrows a pool.
        """
        if not driver.room.holds(need):
            before = driver.pool_bytes()
            for tenant in [tenant() for tenant in list(driver.tenants)]:
                if tenant is not None:
                    tenant.vacate(MOVED)
            self._tell_of_move(before, driver.pool_bytes())
        driver.room = driver.room.having(need)

    def _tell_of_move(self, before: int, kept: int) -> None:
        self.moves += 1
        self.most_moved = max(self.most_moved, before)
        text = (
            f"{MOVED}: {self.moves} time{'s' * (self.moves != 1)}, out of one of {self.most_moved / 2**20:,.1f} MiB at most, "
            f"of which {kept / 2**20:,.1f} MiB were held beside the new one at last"
        )
        with self._changing:
            self.notes = [note for note in self.notes if not note.startswith(MOVED)] + [text]
        self.observers.noted(text)

    def _put_off_call(self, entry: Entry, program: Program, recorded: Recorded) -> list[Any]:
        """What is left of a call whose recording failed for a reason that passes: it was a plain one."""
        put_off, failed = recorded.put_off, recorded.failed
        assert put_off is not None
        self._put_off(entry, put_off.cause, str(put_off.reason))
        self._count_plain(f"could not be recorded: {PUT_OFF[put_off.cause]}", logging.WARNING)
        with self._changing:
            self.statistics.finished_copies += recorded.copies
        if entry.trials.blames_the_segment:
            failed = {**failed, **put_off.suspects}
            entry.trials = entry.trials.settled()
        if failed:
            self._demote(program, failed)
        return recorded.outputs

    def _put_off(self, entry: Entry, cause: Passing, reason: str) -> None:
        entry.trials = entry.trials.failed(entry.calls, cause, reason)
        pause = entry.trials.next_call - entry.calls
        after = "at its next call" if pause == 1 else f"after {pause} calls"
        self.observers.noted(f"a key could not be recorded, and is tried again {after}: {reason}", logging.WARNING)

    def _alive(self, entry: Entry) -> bool:
        addresses = self.sets.get(entry.key.addresses)
        return addresses is not None and addresses.entries.get(entry.key.shapes) is entry

    def _recut(self, scope: Scope, failed: Mapping[str, Reason], apart: Collection[str]) -> Program:
        """The program, cut anew around nodes that could not be captured."""
        scope = replace(scope, forced={**scope.forced, **failed})
        return partition(self.lowered, scope, min_kernels=self.options.min_kernels, apart=apart)

    def _demote(self, program: Program, failed: Mapping[str, Reason]) -> None:
        """Keep nodes that could not be captured eager, for the keys that come after this one."""
        if program is not self.program:
            return
        for reason in dict.fromkeys(failed.values()):
            at = f", at {reason.source}" if reason.source else ""
            self.observers.noted(f"runs eagerly from now on: {reason}{at}", logging.WARNING)
        keyed = self._keyed()
        self.scope = replace(self.scope, forced={**self.scope.forced, **failed})
        self._cut()
        if self._keyed() != keyed:
            # What was recorded would not be found again.
            self._drop_all("keys are read otherwise since then", wait=False)

    # release

    def _drop_set(self, addresses: tuple[int, ...], why: str, *, wait: bool = True) -> None:
        """Forget a set. ``wait``: free it now, and wait for the GPU where it is still in use."""
        with self._changing:
            dropped = self.sets.pop(addresses, None)
            if dropped is self.last:
                self.last = None
        if dropped is not None:
            entries = list(dropped.entries.values())
            for entry in entries:
                self._remember(entry, why)
            dropped.guards.clear()
            with self._changing:
                gone = _emptied(entries, self.statistics)
            _release(gone, self.driver, wait=wait)

    def _drop_all(self, why: str = "reset was called", *, wait: bool = True) -> None:
        for addresses in list(self.sets):
            self._drop_set(addresses, why, wait=wait)
        if wait:
            self.driver.release(())  # the pool may have outlived its last graph

    def vacate(self, why: str) -> None:
        """Free what is recorded now; keys stay, and are recorded again when called."""
        entries = [entry for addresses in self.sets.values() for entry in addresses.entries.values()]
        for entry in entries:
            if entry.recording is not None:
                self.observers.noted(f"recording {entry.number} goes: {why}")
                entry.why = why
        with self._changing:
            gone = _emptied(entries, self.statistics)
        _release(gone, self.driver, wait=True)

    def reset(self) -> None:
        """Free graphs, buffers and this function's part of the pool; the next call of each key is its first again.

        Waits for a call that another thread is in; during a call of its own thread (from an eager step) it takes effect
        when that ends.
        """
        when_idle(self.driver, self._drop_all)

    def leave(self, why: str) -> None:
        """As :meth:`reset`, and waits for nothing: what the GPU is still at is freed when that ends."""
        self.driver.deferred.append(functools.partial(self._drop_all, why, wait=False))
        run_deferred(self.driver)
        self.driver.settle()

    # tools

    def snapshot(self) -> Snapshot:
        """What there is now. It keeps what was recorded alive: not to be kept."""
        with self._changing:
            # A replay moves its entry to the end without the lock. That changes an ordered dict's order, and not its dict.
            sets = list(dict.values(self.sets))
            entries = [entry for addresses in sets for entry in dict.values(addresses.entries)]
            return Snapshot(
                self,
                self.program,
                replace(
                    self.statistics,
                    plain=Counter(self.statistics.plain),
                    recorded=Counter(self.statistics.recorded),
                    misfits=Counter(self.statistics.misfits),
                ),
                tuple(self.notes),
                tuple(KeySnapshot(e, e.recording, e.replay, e.calls, e.replays) for e in entries),
            )


def _checked_once(entry: Entry, recording: Recording, replay: Replay) -> Function:
    """``replay``, whose first call looks whether all that it takes is in its place."""

    def first(args: list[Any], stream: int) -> list[Any]:
        check_places(recording, args)
        entry.run = replay.function
        return replay.function(args, stream)

    return first


def lose_patience(driver: CaptureDriver) -> None:
    """A call has waited for the lock in vain: until somebody has had it, no other call waits for it at all."""
    if driver.patience:
        driver.patience = 0.0
        driver.deferred.append(functools.partial(setattr, driver, "patience", LOCK_TIMEOUT))


def when_idle(driver: CaptureDriver, do: Callable[[], None]) -> None:
    """Do something once no call is under way: wait for another thread's; a call of this thread does it when it ends."""
    driver.deferred.append(do)
    if not in_call() and driver.lock.acquire(timeout=LOCK_TIMEOUT):
        driver.lock.release()
    run_deferred(driver)


def run_deferred(driver: CaptureDriver) -> None:
    """Release what waits to be released, unless a call is under way: then the end of that call does it.

    A static input can die at any moment and in any thread, also in the middle of a call that replays its recording.
    """
    while driver.deferred and not in_call() and driver.lock.acquire(blocking=False):
        try:
            if driver.busy:
                return  # with this thread
            if driver.deferred:  # still: before the lock was ours, another thread may have done it
                driver.deferred.popleft()()
        finally:
            driver.lock.release()


def _held(things: Mapping[Any, AddressSet | Entry]) -> policy.Held:
    oldest = next(iter(things.values()), None)
    return policy.Held(len(things), oldest.last_call if oldest is not None else 0)


def _emptied(entries: Sequence[Entry], statistics: Statistics) -> list[tuple[Recording, Replay]]:
    """What was recorded for ``entries``, taken from them, and its counts."""
    gone = []
    for entry in entries:
        recording, replay = entry.recording, entry.replay
        entry.recording = entry.replay = entry.run = None
        if recording is not None and replay is not None:
            statistics.finished_replays += entry.replays
            statistics.finished_copies += entry.record_copies + replay.tally.copies
            gone.append((recording, replay))
    return gone


def _release(gone: list[tuple[Recording, Replay]], driver: CaptureDriver, *, wait: bool) -> None:
    """Free what was recorded."""
    graphs = [graph for recording, _ in gone for graph in recording.graphs]
    owner: list[Any] = [*gone]
    gone.clear()  # the owner's alone from here on
    driver.release(graphs, owner, wait=wait)  # with nothing left, the pool goes too


def _release_all(sets: OrderedDict[tuple[int, ...], AddressSet], statistics: Statistics, driver: CaptureDriver) -> None:
    while sets:
        _, addresses = sets.popitem()
        addresses.guards.clear()
        _release(_emptied(list(addresses.entries.values()), statistics), driver, wait=False)
    driver.settle()


class _KeyReader:
    """Reads a key off the arguments, as quickly as Python can."""

    def __init__(
        self,
        addressed: list[int],
        numbers: Sequence[int],
        open_layouts: Sequence[int],
        scalars: Sequence[int],
        bridged: Sequence[int],
    ) -> None:
        self.addressed, self.numbers, self.open_layouts, self.scalars = addressed, numbers, open_layouts, scalars
        self.bridged = bridged

    @classmethod
    def of(cls, program: Program, keyed: frozenset[str], scalars_in_key: bool) -> _KeyReader:
        inputs = [value for value in program.inputs if value.index >= 0]
        return cls(
            [value.index for value in inputs if value.kind == "static" or value.name in keyed],
            [value.index for value in inputs if value.kind == "number"],
            [value.index for value in inputs if isinstance(value.value, torch.Tensor) and _is_open(value.value)],
            [value.index for value in inputs if value.kind == "scalar" and scalars_in_key],
            [
                value.index
                for value in inputs
                if value.kind == "tensor" and value.name in program.read_by_graphs() - keyed
            ],
        )

    def read(self, args: Sequence[Any]) -> Key:
        data_ptr = torch.Tensor.data_ptr
        return Key(tuple([data_ptr(args[index]) for index in self.addressed]), self.shapes(args))

    def pointers(self, key: Key) -> list[int]:
        """The addresses of ``key``, each at its argument's index."""
        at = dict(zip(self.addressed, key.addresses, strict=True))
        return [at.get(index, 0) for index in range(max(at, default=-1) + 1)]

    def are_at(self, pointers: list[int], args: list[Any]) -> bool:
        """Whether the key of ``args`` has the addresses that ``pointers`` were made from."""
        return not self.addressed or _torch.are_at(args, pointers, self.addressed)

    def shapes(self, args: Sequence[Any]) -> ShapeKey:
        """The part of a key that is no addresses."""
        shapes: ShapeKey = tuple([args[index] for index in self.numbers]) if self.numbers else ()
        if self.open_layouts:
            shapes += tuple((args[i].shape, args[i].stride(), args[i].dtype, args[i].device) for i in self.open_layouts)
        if self.scalars:
            shapes += tuple(_scalar_bytes(args[index]) for index in self.scalars)
        # A bridge is aligned as the value that it was made for. To look takes 0.1 us for each bridged input.
        for index in self.bridged:
            if args[index].data_ptr() % buffers.ALIGNMENT:
                begins = [args[index].data_ptr() % buffers.ALIGNMENT for index in self.bridged]
                return (*shapes, Alignments(begins))
        return shapes


def _is_open(tensor: torch.Tensor) -> bool:
    return any(isinstance(size, torch.SymInt) for size in (*tensor.shape, *tensor.stride()))


def _scalar_bytes(tensor: torch.Tensor) -> tuple[torch.dtype, bytes]:
    """A host scalar's value, bit for bit: ``-0.0`` is not ``0.0``, and a NaN equals itself."""
    if tensor.dtype is torch.float64:
        return tensor.dtype, struct.pack("d", tensor.item())
    plain = tensor.detach().resolve_conj().resolve_neg()
    return tensor.dtype, bytes(plain.reshape(1).view(torch.uint8).tolist())


def scope_for(lowered: Lowered, scope: Scope, options: Options) -> Scope:
    """``scope`` with the host scalars of ``lowered``: 0-d inputs on the host where the capture device is another, and floats.

    Raises:
        PartitionError: with ``auto_break=False``, a node that cannot be captured and is not marked.
    """
    if scope.device.type != "cpu":
        scalars = [
            node.name
            for node in lowered.module.graph.find_nodes(op="placeholder")
            if isinstance(value := node.meta.get("val"), torch.Tensor)
            and value.device.type == "cpu"
            and value.dim() == 0
        ]
        scope = replace(scope, host_scalars=frozenset(scalars))
    elif options.scalars == "key":
        floats = python_floats(lowered.module.graph).values()
        scope = replace(scope, host_scalars=frozenset(held.name for held in floats))
    if not options.auto_break:
        program = partition(lowered, scope, min_kernels=options.min_kernels)
        for reason in program.reasons:
            if reason.rule not in ("marked", "region", "min_kernels"):
                raise PartitionError(
                    f"{reason.op} cannot be captured: {reason.text}",
                    where=reason.source,
                    fix="mark it (mark_eager, eager_region), or let it run eagerly: auto_break=True",
                )
    return scope
