"""Every private name of DSPy and of anyio that this project uses: which, why, and what of them is replaced.

`names` has those that are used, and the two that have to be replaced so that all threads stream. `in_runs` has those
that stand for something else in runs, `memos` what that keeps. No other module imports or calls a private name, so a
new version of either package is checked in one place.

It must not be known here what a run does, or what an event is.
"""
