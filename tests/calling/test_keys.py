"""Keys, the memory that arguments share, and the end of what was recorded: by themselves, without a model."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from breakable_backend.active import calling
from breakable_backend.calling import eviction
from breakable_backend.calling.keys import AddressSet, Alignments, Entry, Key, KeyReader, Keys
from breakable_backend.calling.release import release, release_all, run_deferred, watch, when_idle
from breakable_backend.calling.snapshot import Statistics
from breakable_backend.drivers.tape import TapeDriver
from breakable_backend.recordings import copies


@pytest.fixture
def tape() -> TapeDriver:
    return TapeDriver(torch.device("cpu"))


def added(keys: Keys, *key: Any) -> Entry:
    """A new entry of ``keys``, in a new set if need be."""
    entry = Entry(Key(*key))
    if entry.key.addresses not in keys.sets:
        keys.add_set(entry.key, AddressSet())
    keys.add(keys.sets[entry.key.addresses], entry)
    return entry


def test_reader() -> None:
    """A key has the addresses, the numbers, the open layouts and the scalars, each where the reader was told to look."""
    reader = KeyReader([1], [0], [2], [3], [])
    args = [7, torch.zeros(2), torch.zeros(3, 4), torch.tensor(0.5)]
    key = reader.read(args)
    assert key.addresses == (args[1].data_ptr(),)
    assert key.shapes == (7, ((3, 4), (4, 1), torch.float32, torch.device("cpu")), key.shapes[2])
    assert reader.are_at(reader.pointers(key), args)
    assert not reader.are_at(reader.pointers(key), [7, torch.zeros(2), *args[2:]])


def test_alignments() -> None:
    """Where a bridged input begins is in the key only if one does not begin at a multiple of the alignment."""
    reader, aligned = KeyReader([], [], [], [], [0]), torch.zeros(64)
    assert reader.shapes([aligned]) == ()
    assert reader.shapes([aligned[1:]]) == (Alignments([aligned[1:].data_ptr() % copies.ALIGNMENT]),)


def test_order_of_use() -> None:
    """Sets, and keys in a set, lie in the order of their last use; the oldest is taken first."""
    keys = Keys()
    first, second, other = added(keys, (1,), (5,)), added(keys, (1,), (6,)), added(keys, (2,), (5,))
    keys.touch(first, keys.sets[1,], 3)
    assert [*keys.sets] == [(2,), (1,)]
    assert keys.last is keys.sets[1,] and keys.last.last_call == 3
    assert keys.take_oldest(keys.sets[1,]) is second
    assert keys.is_there(first) and not keys.is_there(second)
    assert keys.take_set((1,)) == [first] and keys.last is None
    assert keys.take_set((1,)) == [] and keys.entries() == [other]


def test_why_new() -> None:
    """A new key is told from those before it; one that went says why it went, once."""
    keys = Keys()
    assert keys.why_new(Key((1,), (5,)), first=True) == "first of this program"
    added(keys, (1,), (5,))
    assert keys.why_new(Key((2,), (5,)), first=False) == "static or written inputs at new addresses"
    assert keys.why_new(Key((1,), (6,)), first=False).startswith("new numbers")
    keys.remember(Key((1,), (6,)), "it was evicted")
    assert keys.why_new(Key((1,), (6,)), first=False) == "it was evicted"
    assert keys.why_new(Key((1,), (6,)), first=False).startswith("new numbers")


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of keys that went the last are remembered."""
    monkeypatch.setattr(eviction, "MAX_DROPPED", 2)
    keys = Keys()
    for number in range(3):
        keys.remember(Key((), (number,)), str(number))
    assert [keys.why_new(Key((), (number,)), first=True) for number in range(3)] == ["first of this program", "1", "2"]


def test_spectators() -> None:
    """Whoever is shown replays sees each before it runs; once nobody is, the function is what it was."""
    ran: list[Any] = []

    def run(args: list[Any], stream: int) -> list[Any]:
        ran.append(args)
        return args

    entry = Entry(Key((), ()), run=run)
    one, two = (functools.partial(lambda who, entry, args: ran.append((who, args)), who) for who in "ab")
    entry.show(one)
    entry.show(two)
    assert entry.function is run and entry.run is not None
    assert entry.run([1], 0) == [1]
    assert ran == [("a", [1]), ("b", [1]), [1]]
    entry.hide(one)
    entry.hide(two)
    entry.hide(two)
    assert entry.run is run


def test_death(tape: TapeDriver) -> None:
    """What dies in the middle of a call is dropped when that ends; else at once."""
    dropped: list[str] = []
    first, second = torch.zeros(1), torch.zeros(1)
    refs = watch([first], tape, lambda: dropped.append("first")) + watch(
        [second], tape, lambda: dropped.append("second")
    )
    del first
    assert dropped == ["first"]
    with calling():
        del second
        assert dropped == ["first"]
    run_deferred(tape)
    assert dropped == ["first", "second"] and [ref() for ref in refs] == [None, None]


def test_when_idle(tape: TapeDriver) -> None:
    """What waits for the end of calls is done at once where none is under way."""
    done: list[int] = []
    when_idle(tape, functools.partial(done.append, 1))
    with calling():
        when_idle(tape, functools.partial(done.append, 2))
        assert done == [1]
    run_deferred(tape)
    assert done == [1, 2]


def test_release(tape: TapeDriver) -> None:
    """A release takes what was recorded, leaves the key, and keeps no count twice."""
    keys, statistics = Keys(), Statistics()
    entry = added(keys, (1,), (5,))
    entry.replays = 3
    release([entry], statistics, keys, tape, wait=True)
    assert statistics.finished_replays == 0, "nothing was recorded"
    assert keys.entries() == [entry]
    release_all(keys, statistics, tape)
    assert keys.entries() == []
