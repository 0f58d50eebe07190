"""What agents take and give: the contract that types make, how input is checked against it, media and earlier turns.

Nothing is imported here: `checking` is needed by clients, too, which do without DSPy.
"""
