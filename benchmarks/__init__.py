"""What agentcast costs, measured on the machine at hand, side by side with peers: `python -m benchmarks`.

Whatever is measured runs in a process of its own (`hub`, `peers`), on a core of its own where the system lets us pin
it; the one that watches and keeps the time is this one, with plain sockets, so that it is not what is measured.
"""
