"""Jobs: whole runs, from collecting data to a report."""
