"""A comparison as a page: words, tables and figures in one HTML file, and the same as JSON, SVG and PNG."""

from .summary import verdict
from .write import check_report, write_report

__all__ = ["check_report", "verdict", "write_report"]
