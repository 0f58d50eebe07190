"""Who follows what: the clients of this process on one side, the runs that they watch on the other."""
