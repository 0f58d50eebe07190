"""How a command of the command line ends when it does not succeed."""

import typer

FAILED, WRONG_USAGE, CANCELLED, NO_HUB, LEFT = 1, 2, 3, 4, 130
"""Exit codes. `LEFT`: by a second Ctrl-C; 128 + SIGINT, as shells have it."""


def failure(message: str, code: int = WRONG_USAGE) -> typer.Exit:
    """Print what went wrong; gives what to raise."""
    typer.echo(f"agentcast: {message}", err=True)
    return typer.Exit(code)
