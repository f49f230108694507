"""Run folders -> one self-contained HTML page. Reads the folders' files itself, without the training code."""

from dngd.report.page import write_report

__all__ = ["write_report"]
