"""What a stored run says, row by row: times, ratios, shares of the hardware's limits."""

from __future__ import annotations

from typing import Any

import store
from store import Record


def seconds(record: Record, clock: str = "") -> float:
    """The median on one clock; by default device time where there is one, else host time."""
    return record[clock or clock_of(record)]["median"]


def spread(record: Record) -> float:
    """Half the distance between the quartiles, relative to the median."""
    timing = record[clock_of(record)]
    return (timing["q3"] - timing["q1"]) / 2 / timing["median"]


def clock_of(*records: Record) -> str:
    """The clock to compare records by: ``"device"`` if all were timed there, else ``"wall"``."""
    return "device" if all("device" in record for record in records) else "wall"


def ratio(slow: Record | None, fast: Record | None, clock: str = "") -> float | None:
    """How many times faster one right variant is than another."""
    if not (slow and fast and "wall" in slow and "wall" in fast):
        return None
    clock = clock or clock_of(slow, fast)
    return seconds(slow, clock) / seconds(fast, clock)


class Row:
    """One case: its variants, measured by turns."""

    def __init__(self, records: list[Record], header: Record) -> None:
        self.records = {record["variant"]: record for record in records}
        self.header = header
        self.op, self.shape, self.dtype, self.layout, self.mode = store.case_of(records[0])
        self.siblings: list[Row] = [self]
        """All rows of the same part."""

    @property
    def title(self) -> str:
        return " ".join(filter(None, (self.shape, self.dtype, self.layout)))

    @property
    def sizes(self) -> list[int]:
        """[B, C, ...] of a shape such as 8x64x256x256."""
        return [int(number) for number in self.shape.split("x")]

    @property
    def fastgan(self) -> Record | None:
        """The fastest of fastgan's variants."""
        return self.fastest("fastgan")

    @property
    def covered(self) -> bool:
        """Whether an implementation of fastgan's own ran, not its reference path."""
        own = [r for r in self.records.values() if r["kind"] == "fastgan"]
        return any(record.get("impl") != "reference" for record in own)

    @property
    def broken(self) -> bool:
        """Whether fastgan itself was wrong or failed."""
        own = [r for r in self.records.values() if r["kind"] == "fastgan"]
        return any("wrong" in record or "failed" in record for record in own)

    def in_layout(self, layout: str) -> Row | None:
        """The row of the same computation in another memory layout."""
        wanted = (self.op, self.shape, self.dtype, layout, self.mode)
        for row in self.siblings:
            if (row.op, row.shape, row.dtype, row.layout, row.mode) == wanted:
                return row
        return None

    def timed(self, *kinds: str) -> list[Record]:
        """The variants of these kinds that were right."""
        return [r for r in self.records.values() if r["kind"] in kinds and "wall" in r]

    def fastest(self, *kinds: str, clock: str = "") -> Record | None:
        timed = self.timed(*kinds)
        clock = clock or clock_of(*timed)
        return min(timed, key=lambda record: seconds(record, clock), default=None)

    def speedup(self, *kinds: str, clock: str = "") -> float | None:
        """How many times faster fastgan is than the fastest of these kinds."""
        other, own = self.fastest(*kinds, clock=clock), self.fastest("fastgan", clock=clock)
        return ratio(other, own, clock)

    def speedup_over(self, variant: str, own: str = "fastgan") -> float | None:
        """How many times faster one variant is than another."""
        return ratio(self.records.get(variant), self.records.get(own))

    def share_of_copy(self, record: Record | None) -> float | None:
        """Fewest bytes over the time, over the bandwidth of a copy in the same run."""
        if record is None or "gb_per_s" not in record:
            return None
        return record["gb_per_s"] / self.header["ceilings"]["copy_gb_per_s"]


def rows_of(part: Record) -> list[Row]:
    """The rows of one part's file, in the order of measurement."""
    grouped: dict[tuple[str, ...], list[Record]] = {}
    for record in part["records"]:
        grouped.setdefault(store.case_of(record), []).append(record)
    header: dict[str, Any] = {field: part[field] for field in part if field != "records"}
    rows = [Row(records, header) for records in grouped.values()]
    for row in rows:
        row.siblings = rows
    return rows
