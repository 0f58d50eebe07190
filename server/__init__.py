"""The hub: runs agents, keeps the log of each run and lets any number of clients follow it."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("agentcast")
except PackageNotFoundError:  # a source tree that was not installed
    __version__ = "0.0.0"
