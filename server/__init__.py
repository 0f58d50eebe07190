"""The hub: runs agents, keeps the log of each run and lets any number of clients follow it."""
