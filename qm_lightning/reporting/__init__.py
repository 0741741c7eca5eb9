"""The parts of a report: reading runs, putting seeds together, findings in words, plots, tables, the page."""
