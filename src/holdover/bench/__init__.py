"""Measuring, and recording one's own runs."""

from holdover.bench.recording import Recording, record

__all__ = ["Recording", "record"]
