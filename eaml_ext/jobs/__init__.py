"""Jobs: whole runs, from the collection of data to a report."""
