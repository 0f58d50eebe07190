"""What goes wrong when agents are registered or loaded."""


class RegistryError(Exception):
    """An agent cannot be registered, or a registry cannot be loaded.

    `subject` is the agent or the spec that it is about, `problem` what is wrong, `remedy` what to do.
    """

    def __init__(self, subject: str, problem: str, remedy: str) -> None:
        super().__init__(subject, problem, remedy)
        self.subject = subject
        self.problem = problem
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.subject}: {self.problem}. {self.remedy[:1].upper()}{self.remedy[1:]}."
