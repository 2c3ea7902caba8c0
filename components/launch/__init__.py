"""Start the trainer, on this machine or as a job on a cluster, and prove what it left behind."""


class LaunchError(RuntimeError):
    """A launched task could not start or did not succeed; the message is one line: what, where, how to mend.

    `code` is the exit code to end with: 1, or 130/143 for a task that a signal stopped.
    """

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code
