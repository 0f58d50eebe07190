"""Where runs live: the log of each run, and how its updates reach every process."""
