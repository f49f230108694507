"""Run folders, and the accuracy benchmark's result -> one self-contained HTML page. Reads them itself, without the
training code."""

from dngd.report.accuracy_page import write_accuracy_page, write_accuracy_svg
from dngd.report.document import check_file, check_page
from dngd.report.page import write_report
from dngd.report.text import metric_words

__all__ = ["check_file", "check_page", "metric_words", "write_accuracy_page", "write_accuracy_svg", "write_report"]
