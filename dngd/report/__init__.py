"""Run folders, and the accuracy benchmark's result -> one self-contained HTML page. Reads them itself, without the
training code."""

from dngd.report.accuracy_page import write_accuracy_page, write_accuracy_svg
from dngd.report.comparison import compare
from dngd.report.document import check_file, check_page
from dngd.report.page import write_page, write_report
from dngd.report.run_files import RunFiles, read_runs
from dngd.report.text import metric_words

__all__ = [
    "RunFiles",
    "check_file",
    "check_page",
    "compare",
    "metric_words",
    "read_runs",
    "write_accuracy_page",
    "write_accuracy_svg",
    "write_page",
    "write_report",
]
