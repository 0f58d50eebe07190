"""What speaks to the outside: sockets, HTTP, and the limits at the door."""
