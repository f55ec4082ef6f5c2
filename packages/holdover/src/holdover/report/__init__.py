"""What a run did: record your own loop, and see it as a page, as a table and as a trace."""

from typing import TYPE_CHECKING

from holdover.lazy import attributes

_WHERE = {
    "Recording": "holdover.report.recording",
    "build_page": "holdover.report.page",
    "record": "holdover.report.recording",
}

if TYPE_CHECKING:
    from holdover.report.page import build_page as build_page
    from holdover.report.recording import Recording as Recording
    from holdover.report.recording import record as record
else:
    __getattr__, __dir__ = attributes(__name__, _WHERE)

__all__ = [*_WHERE]
