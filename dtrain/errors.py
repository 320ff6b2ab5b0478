"""Owns every error that dtrain raises on purpose.

    DtrainError
    ├── ConfigError       an argument or a setting is wrong; nothing was started (also a ValueError)
    ├── DataError         the data cannot be used as given (also a ValueError)
    ├── WorkerError       a worker died or raised; carries rank, host and the remote traceback
    │   ├── NotFinite     the loss is NaN or infinite; carries the first rank on which it was
    │   ├── ReplicasDiffer the weights are not the same on all workers; carries the first rank that is to blame
    │   └── WorkerDied    its process ended, or could not be reached: not the user's code raised
    ├── CheckpointError   a checkpoint is missing, damaged or of another model
    │   └── TakenOver     another driver trains the run by now
    ├── TrackingError     MLflow refused what it was asked
    └── LostPeer          a rank cannot go on because another failed; users see that one's error, or WorkerDied

A message names the argument, the value, the rule and the fix. All of them survive pickling.
"""


class DtrainError(Exception):
    """Base of every error that dtrain raises on purpose."""


class ConfigError(DtrainError, ValueError):
    """An argument or a setting is wrong; nothing was started."""


class DataError(DtrainError, ValueError):
    """The data cannot be used as given."""


class CheckpointError(DtrainError):
    """A checkpoint is missing, damaged, or of another model."""


class TakenOver(CheckpointError):
    """Another driver trains the run by now: this one may write nothing more."""


class TrackingError(DtrainError):
    """MLflow refused what it was asked."""


class LostPeer(DtrainError):
    """This rank cannot go on because another one failed."""


class WorkerError(DtrainError):
    """A worker died or raised.

    Args:
        message: what happened and what to do, in a sentence or two.
        rank: the worker's rank, if it is known.
        host: the worker's host name, if it is known.
        remote_traceback: the traceback on the worker; empty when the process died without one.
    """

    def __init__(
        self,
        message: str,
        rank: int | None = None,
        host: str | None = None,
        remote_traceback: str = "",
    ) -> None:
        super().__init__(message, rank, host, remote_traceback)
        self.message = message
        self.rank = rank
        self.host = host
        self.remote_traceback = remote_traceback

    def __str__(self) -> str:
        if not self.remote_traceback:
            return self.message
        return f"{self.remote_traceback.rstrip()}\n\n{self.message}"


class NotFinite(WorkerError):
    """The loss became NaN or infinite, and `FailureConfig(on_nan="stop")` holds."""


class ReplicasDiffer(WorkerError):
    """The weights or the optimizer are not the same on all workers any more."""


class WorkerDied(WorkerError):
    """A worker's process ended, or its group broke for a reason that nobody tells: a fit may survive that."""
