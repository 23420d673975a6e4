"""Configurations that were measured: records, where they are kept, and which one a call gets.

The only reader and writer of `tuned/` and of the cache's folder of the same name.  Measures nothing.
"""

from __future__ import annotations

from hsgen.tuned.records import (
    LAUNCH,
    MAX_ALTERNATES,
    SCHEMA,
    Alternate,
    Bucket,
    Environment,
    KernelChoice,
    Order,
    Problem,
    Provenance,
    RecordError,
    Time,
    Tuned,
    dump,
    read,
)

__all__ = [
    "LAUNCH",
    "MAX_ALTERNATES",
    "SCHEMA",
    "Alternate",
    "Bucket",
    "Environment",
    "KernelChoice",
    "Order",
    "Problem",
    "Provenance",
    "RecordError",
    "Time",
    "Tuned",
    "dump",
    "read",
]
