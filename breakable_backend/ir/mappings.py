"""Where memory on the host lies in a file: processes, and one process twice, may map one file at several addresses."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

TABLE = Path("/proc/self/maps")
"""The mappings of this process, on Linux."""


@dataclass(frozen=True, order=True)
class _Mapping:
    start: int
    end: int
    place: int
    """A number for the byte at ``start``: the same for each mapping of that byte, and far from those of other files."""


def places_in_files(addresses: Iterable[int]) -> dict[int, int]:
    """Those of some addresses that lie in a shared mapping of a file, each with a number for its byte in the file.

    Shared memory, of ``torch.multiprocessing`` too, is such a file. Where there is no table of mappings, nothing is
    found.
    """
    mappings = sorted(_shared_mappings())
    found = {}
    for address in addresses:
        before = bisect_right(mappings, address, key=lambda mapping: mapping.start)
        if before and address < mappings[before - 1].end:
            mapping = mappings[before - 1]
            found[address] = mapping.place + address - mapping.start
    return found


def _shared_mappings() -> Iterator[_Mapping]:
    try:
        lines = TABLE.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        span, rights, offset, device, inode = line.split()[:5]
        if rights[3] == "s" and inode != "0":
            start, end = (int(number, 16) for number in span.split("-"))
            file = int(device.replace(":", ""), 16) << 64 | int(inode)
            yield _Mapping(start, end, (file + 1 << 64) + int(offset, 16))
