"""The path of a call: find its key, then run plainly, record, or replay.

Call 1 of a key is plain, and is the warm-up. Call 2 records. Call 3 and later calls replay.
"""

from __future__ import annotations

import logging
import time
from typing import Any

from breakable_backend import _torch, active
from breakable_backend.calling.compiled_graph import PUT_OFF, CompiledGraph, log
from breakable_backend.calling.device_errors import blame
from breakable_backend.calling.keys import AddressSet, Entry
from breakable_backend.calling.release import lose_patience, run_deferred
from breakable_backend.drivers import LOCK_TIMEOUT, CaptureDriver
from breakable_backend.errors import CaptureError
from breakable_backend.internal_errors import raise_if_ours
from breakable_backend.recordings.host_syncs import Finder, has_unknown_ops
from breakable_backend.recordings.plain import run_plain
from breakable_backend.recordings.replay import Function, Replay

IN_EAGER_STEP = "called inside an eager step"


class Executor(CompiledGraph):
    """Runs one lowered graph. Several threads may call it: a call that uses the pool holds its lock.

    What tools read has a separate lock, which calls hold only while they change it. So tools do not wait for a whole
    call, nor calls for tools. A replay does not take this lock.
    """

    def __call__(
        self, args: list[Any], known: AddressSet | None = None, entry: Entry | None = None, run: Function | None = None
    ) -> Any:
        """Run once.

        Args:
            args: the arguments of the lowered graph. The list is cleared, so that what only this call needs can be
                freed early.
            known: the addresses of the arguments, if the caller has read them.
            entry: their key, if the caller knows it; together with ``run``.
            run: what calls of that key ran when the caller looked. If they still do, and nothing is in the way, it is
                run, and ``args`` may lack static inputs that it does not use. Otherwise nothing is done, and None is
                returned.

        Returns:
            the outputs of the lowered graph.

        Raises:
            CaptureError: called inside somebody else's capture, where an eager step cannot run.
            ReplayError: an argument does not fit what was recorded.
            EagerOutputError: the result of an eager step does not fit what was recorded.
            InternalError: a fault of this package.
        """
        driver, outer = self.driver, active.call.get()
        if run is None:
            self.statistics.calls += 1
        if (
            not self.capturable
            or (outer is not None and not outer.over)  # active.in_call(), without the function call
            or (active.handler.held.get() is not None and active.handler.get() is not None)
            or driver.is_capturing()
            or _torch.dispatch_mode_active()
            # With a time limit, taking a free lock takes three times as long (0.7 us, H100).
            or not (driver.lock.acquire(False) or (run is None and driver.lock.acquire(True, driver.patience)))
        ):
            return self._without_pool(args) if run is None else None
        if driver.busy:  # the busy call is this thread's; its eager step runs in another context
            driver.lock.release()
            return self._plain(args, IN_EAGER_STEP) if run is None else None
        # An object for each call (0.05 us), since an eager step may copy the context, and the copy may outlive the
        # call.
        driver.busy, call = True, active.Call()
        active.call.set(call)
        try:
            stream = driver.begin()
            try:
                return self._locked(args, stream, driver, known, entry, run)
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
        self,
        args: list[Any],
        stream: int,
        driver: CaptureDriver,
        known: AddressSet | None = None,
        entry: Entry | None = None,
        run: Function | None = None,
    ) -> Any:
        """A call that holds the pool's lock."""
        keys, reader = self.keys, self.reader
        addresses = keys.last
        if entry is not None:
            if run is None or entry.run is not run or reader.shapes(args) != entry.key.shapes:
                return None
            if addresses is None or addresses.entries.get(entry.key.shapes) is not entry:
                addresses = keys.sets[entry.key.addresses]
            self.statistics.calls += 1
        else:
            if addresses is not None and (addresses is known or reader.are_at(addresses.pointers, args)):
                entry = addresses.entries.get(reader.shapes(args))
            if entry is None:
                key = reader.read(args)
                addresses = keys.sets.get(key.addresses)
                entry = addresses.entries.get(key.shapes) if addresses is not None else None
            if self.sharing.moving and self.sharing.is_written(args, addresses):
                return self._plain(args, "arguments share memory, and one is written", logging.WARNING)
            if entry is None:
                entry = self.new_entry(key, args)
        entry.calls += 1
        entry.last_call = now = self.statistics.calls
        if entry.run is None or addresses is None:
            return self._not_replayed(entry, addresses, args, stream)
        entry.replays += 1
        keys.touch(entry, addresses, now)
        driver.note_arguments(args)
        try:
            return entry.run(args, stream)
        except Exception as error:
            blame(error, driver, self.name, keys.latest())
            raise

    def _not_replayed(self, entry: Entry, addresses: AddressSet | None, args: list[Any], stream: int) -> list[Any]:
        """A call of a key without a recording: it is plain, or it records."""
        if entry.refused:
            return self._plain(args, entry.refused, logging.WARNING)
        if not entry.warmed_up:
            self.callers.note()
            started = time.perf_counter()
            outputs = self._warm_up(args)
            entry.warmup_seconds = time.perf_counter() - started
            entry.warmed_up = True
            return outputs
        if entry.trials.is_due(entry.calls):
            return self.record(entry, args, stream)
        if addresses is not None:
            self.keys.touch(entry, addresses, self.statistics.calls)
        return self._plain(args, f"waits to be recorded again: {PUT_OFF[entry.trials.cause]}")

    def _without_pool(self, args: list[Any]) -> list[Any]:
        """A call that cannot use the pool, or does not need it."""
        handler = active.handler.get()
        if handler is not None:
            why = "called inside capture"
            self.count_plain(why)
            values, observers = list(args), self.observers if self.observers.sees_plain_steps else None
            args.clear()
            return run_plain(self.program, values, handler, observer=observers)
        if not self.capturable:
            return self._plain(args, "nothing to capture")
        if self.driver.is_capturing():
            if self.program.reasons:
                first = self.program.reasons[0]
                raise CaptureError(
                    f"{self.name} was called inside another CUDA graph capture, but has an eager step: {first}",
                    where=first.source,
                    fix="call it outside that capture, or capture the parts around it",
                )
            return self._plain(args, "called inside another capture")
        if active.in_call():
            return self._plain(args, IN_EAGER_STEP)
        if _torch.dispatch_mode_active():
            return self._plain(args, "a dispatch mode is active")
        lose_patience(self.driver)
        return self._plain(args, f"the pool was busy for {LOCK_TIMEOUT:g} s", logging.WARNING)

    def _warm_up(self, args: list[Any]) -> list[Any]:
        """The plain call before a recording. It shows which unknown ops cannot be captured."""
        program = self.program
        inside = self.options.auto_break and has_unknown_ops(program)
        if self.observers.sees_plain_steps or not (inside or self.hands_back):
            return self._plain(args, "warm-up")
        finder = Finder(self.driver.devices, inside=inside)
        outputs = self._plain(args, "warm-up", run=self.watched_function(finder))
        if found := finder.eager(program, self.lowered.module.graph):
            self.run_eagerly(program, found, logging.INFO)
        return outputs

    def plain(self, args: list[Any], why: str) -> list[Any]:
        """A call that is plain whatever was recorded."""
        self.statistics.calls += 1
        return self._plain(args, why)

    def _plain(self, args: list[Any], why: str, level: int = logging.INFO, run: Replay | None = None) -> list[Any]:
        """Make a call as eager does, without capture and without bridges."""
        self.count_plain(why, level)
        with self.observers.span(f"plain, {why}"):
            try:
                if not self.observers.sees_plain_steps:
                    return (run or self._plain_function or self.plain_function()).function(args, 0)
                values = list(args)
                args.clear()
                return run_plain(self.program, values, observer=self.observers, drawing=self.driver.drawing)
            except Exception as error:
                raise_if_ours(error, log)
                raise
