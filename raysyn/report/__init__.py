"""The study on paper: the table, its figures, sample pictures, and one self-contained page."""

from raysyn.report.table import COLUMNS, print_table, row_metrics, write_tables
from raysyn.report.write import Samples, publish, write_report

__all__ = ["COLUMNS", "Samples", "print_table", "publish", "row_metrics", "write_report", "write_tables"]
