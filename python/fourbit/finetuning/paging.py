"""What the optimizer's pager does in a run, for its log and its report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # torch, which ``--help`` does not wait for
    from fourbit.optim import PagedAdamW, PagingReport


def is_paged(report: PagingReport) -> bool:
    """Whether state moves anywhere."""
    return any(pager != "resident" for pager in report.pagers.values())


class PagingLog:
    """The figures of a log entry: what was moved since the last one.

    Args:
        optimizer: of the run.
    """

    def __init__(self, optimizer: PagedAdamW) -> None:
        self.optimizer = optimizer
        self._before = (0, 0, 0.0)

    def entry(self) -> dict[str, float]:
        """Bytes and seconds since the last call, and bytes now; nothing where nothing moves."""
        report = self.optimizer.paging_report()
        if not is_paged(report):
            return {}
        now = (report.bytes_in, report.bytes_out, report.seconds_waiting)
        bytes_in, bytes_out, seconds = (a - b for a, b in zip(now, self._before, strict=True))
        self._before = now
        return {
            "paging_bytes_in": bytes_in,
            "paging_bytes_out": bytes_out,
            "paging_seconds_waiting": seconds,
            "paging_resident_bytes": report.resident_bytes,
        }


def totals(optimizer: PagedAdamW) -> dict[str, Any]:
    """What a `FinetuneReport` says of the optimizer: its pager, and what it did in this call."""
    report = optimizer.paging_report()
    if not is_paged(report):
        return {
            "pager": "resident",
            "paging_bytes_in": 0,
            "paging_bytes_out": 0,
            "paging_seconds_waiting": 0.0,
        }
    return {
        "pager": ", ".join(dict.fromkeys(report.pagers.values())),
        "paging_bytes_in": report.bytes_in,
        "paging_bytes_out": report.bytes_out,
        "paging_seconds_waiting": report.seconds_waiting,
    }
