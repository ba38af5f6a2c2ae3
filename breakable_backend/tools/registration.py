"""Which tools observe which graphs. A tool is imported when an option asks for it."""

from __future__ import annotations

from breakable_backend.recordings.observer import Observer, Subject, register
from breakable_backend.tools.journal import Journal
from breakable_backend.tools.profiling import Profiling
from breakable_backend.tools.sources import DepyfFiles


def compare(subject: Subject) -> Observer | None:
    if subject.options.debug != "compare":
        return None
    from breakable_backend.tools.compare import Compare

    return Compare(subject)


def debug_log(subject: Subject) -> Observer | None:
    if subject.options.debug != "eager" or not subject.compiled:
        return None
    from breakable_backend.tools.debug import DebugLog

    return DebugLog()


for factory in (Journal, Profiling, DepyfFiles, compare, debug_log):
    register(factory)
