"""Where runs live: the log of each run, and the way that news of it reaches every process."""
