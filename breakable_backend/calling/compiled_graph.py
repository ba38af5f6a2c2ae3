"""The state of an executor, and how it changes: its program, its keys, and what was recorded for them."""

from __future__ import annotations

import functools
import logging
import threading
import time
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import torch

from breakable_backend import _torch
from breakable_backend.callers import Callers
from breakable_backend.calling import eviction
from breakable_backend.calling.keys import AddressSet, Entry, Key, KeyReader, Keys, Spectator, occupancy, scalar_bytes
from breakable_backend.calling.release import release, release_all, run_deferred, watch, when_idle
from breakable_backend.calling.sharing import SharedMemory
from breakable_backend.calling.snapshot import KeySnapshot, Snapshot, Statistics, uncounted
from breakable_backend.compiling.lowering import Lowered
from breakable_backend.compiling.partition import partition
from breakable_backend.drivers import CaptureDriver
from breakable_backend.errors import Passing, first_line
from breakable_backend.failure_kinds import passing
from breakable_backend.ir.effects import written_inputs
from breakable_backend.ir.last_uses import needed
from breakable_backend.ir.program import Program, Reason
from breakable_backend.ir.source_lines import short_line
from breakable_backend.marks.rules import Scope
from breakable_backend.options import Options
from breakable_backend.recordings.checks import check_places
from breakable_backend.recordings.host_syncs import Finder
from breakable_backend.recordings.observer import Observers
from breakable_backend.recordings.plain import plain_recording
from breakable_backend.recordings.recorder import PutOff, Recorded, record
from breakable_backend.recordings.recording import Recording
from breakable_backend.recordings.replay import Function, Replay, emit
from breakable_backend.recordings.returned_arguments import has_suspects
from breakable_backend.recordings.specialised import Plan, SpecialisedProgram

log = logging.getLogger("breakable_backend.calling.executor")
"""One log for all of an executor. Its name is in docs/tools.md."""

MOVED = "moved to a larger pool"
"""Why recordings were freed that are made again at the next call of their key."""

PUT_OFF: Mapping[Passing, str] = {
    "memory": "too little memory is free",
    "busy": "another thread had what a capture needs",
    "disturbed": "something made the capture invalid, another thread most likely",
}
"""Why a recording is tried again later, as the report counts it."""

REFILLED = "memory was freed and filled again between calls"

READ_OTHERWISE = "keys are read otherwise since then"


class CompiledGraph:
    """One lowered graph. Changes need the driver's lock, which :meth:`reset` and :meth:`leave` take themselves."""

    reads_keys: type[KeyReader] = KeyReader

    def __init__(
        self, lowered: Lowered, scope: Scope, options: Options, driver: CaptureDriver, name: str, observers: Observers
    ) -> None:
        self.lowered, self.options, self.driver, self.name = lowered, options, driver, name
        self.observers = observers
        self.statistics = Statistics()
        self.keys = Keys()
        self.scope = scope
        self.bridged: set[str] = set()
        """Inputs that captured segments write, and that came at too many addresses for the key."""
        self.variety = eviction.Variety()
        """Counts the values of host scalars, and the addresses of written inputs."""
        self.notes: list[str] = []
        """Changes of the program since it was first cut, for the report."""
        self.moves, self.most_moved = 0, 0
        """How often a key of this program outgrew the pool; and the bytes of the largest pool that was outgrown."""
        self.callers = Callers()
        self.hands_back = has_suspects(lowered.module.graph)
        """Whether it is worth checking what ops return; see ``recordings.returned_arguments``."""
        self.cut_program()
        driver.tenants.append(weakref.ref(self, driver.tenants.remove))
        # Dynamo may drop an executor at any time. Its graphs are then freed at once, and not at the next garbage
        # collection.
        weakref.finalize(self, release_all, self.keys, self.statistics, driver).atexit = False

    # the program

    def cut_program(self) -> None:
        """Cut the program, and derive from it how a key is read."""
        self.program: Program = partition(self.lowered, self.scope, min_kernels=self.options.min_kernels)
        self.capturable = bool(self.program.graph_segments)
        self._plain_function: Replay | None = None
        self.sharing = SharedMemory(self.program, written_inputs(self.lowered.module))
        self.reader = self.reads_keys.of(self.program, self.keyed(), self.options.scalars == "key")
        self.observers.cut(self.program)

    def recut(self, scope: Scope, failed: Mapping[str, Reason], apart: Collection[str]) -> Program:
        """The program, cut anew around nodes that could not be captured."""
        scope = replace(scope, forced={**scope.forced, **failed})
        return partition(self.lowered, scope, min_kernels=self.options.min_kernels, apart=apart)

    def keyed(self) -> frozenset[str]:
        """Inputs that captured segments write, and whose addresses are part of the key."""
        written = self.program.written_by_graphs()
        tensors = {value.name for value in self.program.inputs if value.kind == "tensor"}
        return frozenset((written & tensors) - self.bridged)

    def plain_function(self) -> Replay:
        """The function of plain calls, made for the first of them."""
        if self._plain_function is None:
            # If two threads make it at the same time, or the program is cut anew meanwhile, either one is right.
            self._plain_function = self.watched_function(None)
        return self._plain_function

    def watched_function(self, finder: Finder | None) -> Replay:
        """:meth:`plain_function`, with ``finder`` watching its ops."""
        recording = plain_recording(self.lowered, self.program, self.driver.drawing, finder)
        return emit(recording, name=f"{self.name} plain", file=self.observers.file)

    def _give_up_variety(self, args: Sequence[Any]) -> bool:
        """Count what varies from key to key, and stop keying what varies too much. Returns whether keys have changed."""
        keyed, bound = self.keyed(), eviction.MAX_SCALAR_VALUES
        given_up = []
        for value in self.program.inputs:
            if value.name in keyed:
                place = args[value.index].data_ptr()
                if self.variety.is_too_much(value.name, place, eviction.MAX_ADDRESSES):
                    self.bridged.add(value.name)
                    given_up.append(
                        f"{value.name} is written by captured segments and came at more than {eviction.MAX_ADDRESSES} "
                        "addresses: copied in and back"
                    )
            elif (
                value.kind == "scalar"
                and self.options.scalars == "key"
                and self.variety.is_too_much(value.name, scalar_bytes(args[value.index]), bound)
            ):
                self.scope = replace(self.scope, host_scalars=self.scope.host_scalars - {value.name})
                many = f"host scalar {value.name} had more than {bound} values"
                given_up.append(
                    f"{many}: the ops that read it run eagerly; pass it as a tensor on {self.driver.device}, or compile with "
                    "options={'scalars': 'device'}"
                )
        moving, why = self._moving(args)
        if moving:
            self.lowered = replace(self.lowered, static=self.lowered.static - moving)
            self.note_copied_in(moving, why)
        for text in given_up:
            self._note(text)
        if moving or given_up:
            self._drop_all(READ_OTHERWISE, wait=False)
            self.cut_program()
        return bool(moving or given_up)

    def note_copied_in(self, moving: Collection[int], why: str) -> None:
        """Note that static inputs, which are read in place by default, are copied in."""
        names = [value.name for value in self.program.inputs if value.index in moving]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        if names:
            self._note(f"{', '.join(names[:3])}{more}: read in place, and {why}: copied in")

    def _note(self, text: str) -> None:
        """Note a change of the program, for the report and the log."""
        with self.keys.changing:
            self.notes.append(text)
        self.observers.noted(text, logging.WARNING)

    def _moving(self, args: Sequence[Any]) -> tuple[set[int], str]:
        """The indices of static inputs that came at other addresses and are to be copied in, and why.

        FSDP frees weights and gathers them anew: the same storage is at another address. A weight that has moved so before
        a recording was replayed is copied in at once. Of any other tensor the addresses are counted. Several instances
        of a module are several tensors.
        """
        statics = [value for value in self.program.inputs if value.kind == "static"]
        places = {value.index: {args[value.index].data_ptr()} for value in statics}
        refilled = set[int]()
        for known in self.keys.sets.values():
            of_use = any(entry.replays for entry in known.entries.values())
            for value, guard, storage in zip(statics, known.guards, known.storages, strict=True):
                tensor, before = guard(), known.pointers[value.index]
                if tensor is None or tensor is not args[value.index]:
                    continue
                places[value.index].add(before)
                if not of_use and before != tensor.data_ptr() and storage.cdata == _torch.storage_key(tensor):
                    refilled.add(value.index)
        if refilled:
            return refilled, REFILLED
        if max(map(len, places.values()), default=0) <= eviction.MAX_ADDRESSES:
            return refilled, ""
        moved = {index for index, known in places.items() if len(known) > 1}
        return moved, f"a tensor came at more than {eviction.MAX_ADDRESSES} addresses"

    def run_eagerly(self, program: Program, failed: Mapping[str, Reason], level: int = logging.WARNING) -> None:
        """Keep nodes that could not be captured eager, for later keys too."""
        if program is not self.program:
            return
        for reason in dict.fromkeys(failed.values()):
            at = f", at {short_line(reason.source)}" if reason.source else ""
            self.observers.noted(f"runs eagerly from now on: {reason}{at}", level)
        before = self.keyed(), self.program.passed_on
        self.scope = replace(self.scope, forced={**self.scope.forced, **failed})
        self.cut_program()
        if (self.keyed(), self.program.passed_on) != before:
            # What was recorded before would not be found again.
            self._drop_all(READ_OTHERWISE, wait=False)

    # its keys

    def new_entry(self, key: Key, args: Sequence[Any]) -> Entry:
        """The entry of a new key; a refused one if there is no room. This may change how keys are read."""
        if self._give_up_variety(args):
            key = self.reader.read(args)
        now = self.statistics.calls
        addresses = self.keys.sets.get(key.addresses)
        if addresses is not None:
            addresses.last_call = now
        places = occupancy(addresses.entries) if addresses is not None else None
        admission = eviction.admit(now, occupancy(self.keys.sets), places, self.options.max_recordings)
        if admission.refused:
            return Entry(key, refused=admission.refused)
        if admission.evicts_set:
            self._drop_set(next(iter(self.keys.sets)), "it was evicted for other addresses", wait=False)
            self.statistics.evictions += 1
        if addresses is None:
            pointers, fixed = self.reader.pointers(key), self.sharing.fixed(args)
            guards, storages = self._guards(key.addresses, args), list(map(_torch.retains, self._statics(args)))
            addresses = AddressSet(pointers, guards=guards, storages=storages, fixed=fixed, last_call=now)
            self.keys.add_set(key, addresses)
        if admission.evicts_key:
            self._release([self.keys.take_oldest(addresses)], "it was evicted for other keys", wait=False)
            self.statistics.evictions += 1
        entry = Entry(key, why=self.why_new(key))
        self.keys.add(addresses, entry)
        return entry

    def why_new(self, key: Key) -> str:
        return self.keys.why_new(key, first=not (self.statistics.recordings or self.keys.entries()))

    def _guards(self, addresses: tuple[int, ...], args: Sequence[Any]) -> list[weakref.ref[torch.Tensor]]:
        me = weakref.ref(self)

        def drop() -> None:
            if (graph := me()) is not None:
                graph._drop_set(addresses, "a static input had died", wait=False)
                graph.driver.settle()

        return watch(self._statics(args), self.driver, drop)

    def _statics(self, args: Sequence[Any]) -> list[torch.Tensor]:
        return [args[value.index] for value in self.program.inputs if value.kind == "static"]

    # their recordings

    def plan(self) -> Plan:
        """How arguments enter captured segments."""
        return Plan(
            keyed=self.keyed(),
            device_scalars=self.options.scalars == "device",
            fresh_outputs=self.options.outputs == "fresh",
            observer=self.observers,
            keep=self.observers.reads_values,
            auto_break=self.options.auto_break,
            recut=functools.partial(self.recut, self.scope),
        )

    def record(self, entry: Entry, args: list[Any], stream: int) -> list[Any]:
        """Make a call and record it for ``entry``. Returns the call's result."""
        driver, observers, program = self.driver, self.observers, self.program
        observers.recording(driver.device)
        plan, values = self.plan(), list(args)
        args.clear()
        started = time.perf_counter()
        if entry.trials.cause == "memory":
            driver.make_room()
        if driver.reuses_memory and not (plan.keep or plan.apart):
            self._make_way(needed(program, SpecialisedProgram.of(program, values).symbols))
        try:
            with observers.span("record"):
                recorded = record(program, driver, values, plan, stream)
        except Exception as error:
            if cause := passing(error):  # the exception is an eager step's: a plain call may take less memory
                self._put_off(entry, cause, first_line(error))
            raise
        if recorded.put_off is not None:
            return self._put_off_call(entry, program, recorded, recorded.put_off)
        recording, outputs, failed = recorded.recording, recorded.outputs, recorded.failed
        entry.record_seconds = time.perf_counter() - started
        entry.record_copies = recorded.copies
        entry.captures = len(recording.graphs)
        entry.number = self.statistics.recordings
        with self.keys.changing:
            self.statistics.recordings += 1
            self.statistics.recorded[entry.why] += 1
            self.statistics.captures += entry.captures
        if self.keys.is_there(entry) and recording.graphs:
            replay = observers.replay(recording, f"{self.name} replay {entry.number}", recorded.program)
            with self.keys.changing:
                entry.recording, entry.replay, entry.run = recording, replay, checked_once(entry, recording, replay)
            observers.recorded(entry.number, entry.why, recording, replay, entry.record_seconds)
        else:
            # A static input died during an eager step, or there is nothing to replay.
            graphs, owner = recording.graphs, [recording]
            del recorded, recording
            driver.release(graphs, owner)
        if failed:
            self.run_eagerly(program, failed)
        return outputs

    def count_plain(self, why: str, level: int = logging.INFO) -> None:
        with self.keys.changing:
            self.statistics.plain[why] += 1
        self.observers.plain(why, level)

    def _put_off_call(self, entry: Entry, program: Program, recorded: Recorded, put_off: PutOff) -> list[Any]:
        """The end of a call whose recording failed for a passing reason: it was a plain call."""
        failed = recorded.failed
        self._put_off(entry, put_off.cause, str(put_off.reason))
        self.count_plain(f"could not be recorded: {PUT_OFF[put_off.cause]}", logging.WARNING)
        with self.keys.changing:
            self.statistics.finished_copies += recorded.copies
        if entry.trials.blames_the_segment:
            failed = {**failed, **put_off.suspects}
            entry.trials = entry.trials.settled()
        if failed:
            self.run_eagerly(program, failed)
        return recorded.outputs

    def _put_off(self, entry: Entry, cause: Passing, reason: str) -> None:
        entry.trials = entry.trials.failed(entry.calls, cause, reason)
        pause = entry.trials.next_call - entry.calls
        after = "at its next call" if pause == 1 else f"after {pause} calls"
        self.observers.noted(f"a key could not be recorded, and is tried again {after}: {reason}", logging.WARNING)

    def _make_way(self, need: int) -> None:
        """If the pool is too small for the next recording, free everything in it. All keys then get a larger pool.

        The old pool is freed before the new one is made. This takes a wait for the GPU, once for each size that
        outgrows a pool.
        """
        driver = self.driver
        if not driver.pool_size.holds(need):
            before = driver.pool_bytes()
            for tenant in [tenant() for tenant in list(driver.tenants)]:
                if tenant is not None:
                    tenant.vacate(MOVED)
            self._note_move(before, driver.pool_bytes())
        driver.pool_size = driver.pool_size.having(need)

    def _note_move(self, before: int, kept: int) -> None:
        self.moves += 1
        self.most_moved = max(self.most_moved, before)
        text = (
            f"{MOVED}: {self.moves} time{'s' * (self.moves != 1)}, out of one of {self.most_moved / 2**20:,.1f} MiB at most, "
            f"of which {kept / 2**20:,.1f} MiB were held beside the new one at last"
        )
        with self.keys.changing:
            self.notes = [note for note in self.notes if not note.startswith(MOVED)] + [text]
        self.observers.noted(text)

    # their end

    def _release(self, entries: Sequence[Entry], why: str, *, wait: bool) -> None:
        """Free what was recorded for keys that are dropped."""
        for entry in entries:
            if entry.recording is not None:
                self.observers.noted(f"recording {entry.number} goes: {why}")
                self.keys.remember(entry.key, why)
        release(entries, self.statistics, self.keys, self.driver, wait=wait)

    def _drop_set(self, addresses: tuple[int, ...], why: str, *, wait: bool) -> None:
        """Drop a set of keys. ``wait``: free it now, and wait for the GPU if it is still in use."""
        if entries := self.keys.take_set(addresses):
            self._release(entries, why, wait=wait)

    def _drop_all(self, why: str = "reset was called", *, wait: bool = True) -> None:
        for addresses in list(self.keys.sets):
            self._drop_set(addresses, why, wait=wait)
        if wait:
            self.driver.release(())  # free the pool too, if it has outlived its last graph

    def vacate(self, why: str) -> None:
        """Free what is recorded now. Keys stay, and are recorded again when they are called."""
        for entry in self.keys.entries():
            if entry.recording is not None:
                self.observers.noted(f"recording {entry.number} goes: {why}")
                entry.why = why
        release(self.keys.entries(), self.statistics, self.keys, self.driver, wait=True)

    def reset(self) -> None:
        """Free graphs, buffers and this function's part of the pool. The next call of each key is its first again.

        This waits for another thread's call. During a call of its own thread (from an eager step) it takes effect when
        that call ends.
        """
        when_idle(self.driver, self._drop_all)

    def leave(self, why: str) -> None:
        """As :meth:`reset`, without waiting: what the GPU still uses is freed later."""
        self.driver.deferred.append(functools.partial(self._drop_all, why, wait=False))
        run_deferred(self.driver)
        self.driver.settle()

    # tools

    def snapshot(self) -> Snapshot:
        """A snapshot of the present state."""
        keys = []
        with self.keys.changing:
            for addresses in list(dict.values(self.keys.sets)):  # in the order of ``Keys.entries``
                statics = tuple(ref() for ref in addresses.guards)
                keys += [KeySnapshot.of(entry, statics) for entry in dict.values(addresses.entries)]
            statistics, notes = self.statistics.copy(), tuple(self.notes)
            return Snapshot(
                self.name, self.options, self.driver, self.lowered, self.program, statistics, notes, tuple(keys)
            )

    @contextmanager
    def showing(self, spectator: Spectator) -> Iterator[None]:
        """Show ``spectator`` what this thread replays of the present recordings, before each replay."""
        thread = threading.get_ident()

        def mine(entry: Entry, args: list[Any]) -> None:
            if threading.get_ident() == thread:
                spectator(entry, args)

        with self.keys.changing:
            shown = self.keys.entries()
            for entry in shown:
                entry.show(mine)
        try:
            yield
        finally:
            with self.keys.changing:
                for entry in shown:
                    entry.hide(mine)

    def uncounted(self) -> AbstractContextManager[None]:
        """Leave all counts unchanged inside the block."""
        entries = self.keys.entries()
        tallies = (entry.replay.tally for entry in entries if entry.replay is not None)
        return uncounted(self.statistics, *entries, *tallies)


def checked_once(entry: Entry, recording: Recording, replay: Replay) -> Function:
    """``replay``, whose first call checks that everything it reads is at its recorded address."""

    def first(args: list[Any], stream: int) -> list[Any]:
        check_places(recording, args)
        entry.run = replay.function
        return replay.function(args, stream)

    return first
