"""Store a stage's teacher outputs, or compute them every time? What either costs, from rates and arithmetic.

Training from stored outputs takes the longer of the student's time and that of reading, as both happen at once.
"""

from __future__ import annotations

from dataclasses import dataclass

HOUR, GB = 3600.0, 1e9


@dataclass(frozen=True)
class Rates:
    """Of one device, per image. read: bytes/s that reach it from the store, 0 = not known."""

    student_s: float  # forward and backward, heads included
    teachers_s: float  # forward of all
    read: float = 0.0


@dataclass(frozen=True)
class Advice:
    """bytes_per_view: of one stored view of an image, all teachers.  images: that training sees.  samples: stored ones,
    each in `views` views."""

    rates: Rates
    bytes_per_view: int
    images: int
    samples: int
    views: int

    @property
    def stored_bytes(self) -> int:
        return self.bytes_per_view * self.samples * self.views

    @property
    def live_hours(self) -> float:
        """Device hours with live teachers."""
        return self.images * (self.rates.student_s + self.rates.teachers_s) / HOUR

    @property
    def making_hours(self) -> float:
        """Device hours of storing: each view once through the teachers."""
        return self.samples * self.views * self.rates.teachers_s / HOUR

    def stored_hours(self, read: float) -> float:
        """Device hours of training from the store at so many bytes/s for each device, its making included."""
        return self.images * max(self.rates.student_s, self.bytes_per_view / read) / HOUR + self.making_hours

    @property
    def even_rate(self) -> float:
        """bytes/s for each device below which live teachers are as fast, the making of the store left aside."""
        return self.bytes_per_view / (self.rates.student_s + self.rates.teachers_s)

    @property
    def free_rate(self) -> float:
        """bytes/s for each device from which reading costs no time."""
        return self.bytes_per_view / self.rates.student_s

    def saved_hours(self, read: float = 0.0) -> float:
        """Device hours saved, negative if lost; at the measured rate, or the given one."""
        return self.live_hours - self.stored_hours(read or self.rates.read or self.free_rate)

    def verdict(self) -> str:
        """One line: store or recompute, and why."""
        saved = self.saved_hours()
        if self.images <= self.samples * self.views:
            return "recompute: training sees each stored view once at most"
        measured = f"at the {self.rates.read / GB:,.2f} GB/s measured here for each device"
        if saved <= 0 and 0 < self.rates.read < self.even_rate:
            return f"recompute: {measured} reading is slower than teachers"
        if saved <= 0:
            return "recompute: making the features takes longer than training from them saves"
        if self.rates.read:
            return f"store: saves {saved:,.3g} device hours {measured}"
        return (
            f"store if each device reads {self.even_rate / GB:,.2f} GB/s at least: saves up to {saved:,.3g} device "
            f"hours, all of them from {self.free_rate / GB:,.2f} GB/s"
        )
