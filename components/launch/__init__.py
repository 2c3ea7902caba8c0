"""Start the trainer, on this machine or as a job on a cluster, and prove what it left behind."""


class LaunchError(RuntimeError):
    """A launched task could not start or did not succeed; the message is one line: what, where, how to mend."""
