"""What runs: the agent contract, the event vocabulary and the bridges from DSPy to it.

This package knows nothing of sockets, buses or servers; `agentcast.server` imports it, never the other way round.
"""
