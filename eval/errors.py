"""What can be wrong with scores or runs, for a user: what was asked, what was found, what to do."""


class ScoreTableError(ValueError):
    """Scores, labels or a question about them that cannot give an honest number."""


class ScoreTableNotFound(ScoreTableError, FileNotFoundError):
    """There is no score table at the path."""

    def __str__(self) -> str:
        """The plain message; `OSError` would rearrange it."""
        return str(self.args[0])


class ScoreTableExists(ScoreTableError, FileExistsError):
    """A score table is already there and would be overwritten."""

    def __str__(self) -> str:
        """The plain message; `OSError` would rearrange it."""
        return str(self.args[0])


class RunError(ScoreTableError):
    """A run directory that a report cannot be made from."""


class EvalWarning(UserWarning):
    """A number that is computed as asked, but means less than it seems."""
