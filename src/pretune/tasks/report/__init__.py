"""task=report: runs side by side, as a table, a figure and a page."""
