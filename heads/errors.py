"""What can go wrong in this room, for a user: what was asked, what was found, what to do."""


class HeadError(Exception):
    """Base of every error of `heads` that a user can act on."""


class ConfigError(HeadError, ValueError):
    """A configuration key or value is not one the method or the training loop knows."""


class TaskError(HeadError, ValueError):
    """A cache does not hold the task, split or candidates that were asked for."""


class MissingStream(HeadError, ValueError):
    """A head reads a stream that the cache was built without."""


class CheckpointMismatch(HeadError, ValueError):
    """A saved head and what it is loaded into, or scored on, are not the same thing."""


class RunExists(HeadError, FileExistsError):
    """A run directory or score table is already there and would be overwritten."""


class TrainingDiverged(HeadError, ArithmeticError):
    """A loss or gradient is not finite; names the step."""


class HubError(HeadError, OSError):
    """The Hugging Face hub refused a run, or could not be reached."""
