"""Owns what is made of calls to workers that did not end well: a Failure of each, and one error of all."""

from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import (
    ObjectLostError,
    RayActorError,
    RayError,
    RayTaskError,
    RuntimeEnvSetupError,
    WorkerCrashedError,
)

from dtrain.errors import WorkerDied, WorkerError
from dtrain.types import Failure, WorkerInfo

NOT_STARTED = (
    "the process did not start within {:g} s; why is in Ray's logs on that node,"
    " /tmp/ray/session_latest/logs/{{raylet,runtime_env_setup}}*"
)
_IMPORT_FAILED = "failed to import on the worker"
"""What Ray says of an actor whose class cannot be unpickled."""
_NO_DTRAIN = (
    "the process could not import dtrain; install the same dtrain on every node, and let no file of runtime_env's"
    " hide it"
)


def have_answered(calls: Sequence[Any]) -> bool:
    """Whether all calls have ended, well or not. Does not wait."""
    return len(ray.wait(list(calls), num_returns=len(calls), timeout=0)[0]) == len(calls)


def outcome_of(call: Any) -> Any:
    """What a call that has ended returned, or a Failure."""
    try:
        return ray.get(call, timeout=60)
    except (RayActorError, RayTaskError) as error:
        if _IMPORT_FAILED in str(error):
            return Failure(_NO_DTRAIN, traceback=str(error))
        if isinstance(error, RayTaskError):
            # A rank that died before it could hand over is gone for the others: what they were to be given is not.
            is_lost = isinstance(error.cause, (RayActorError, ObjectLostError))
            traceback = getattr(error, "traceback_str", "")  # not where what it was given could not be had
            return Failure(error=str(error.cause), traceback=traceback, lost_peer=is_lost)
        if error.actor_init_failed:
            return Failure("the process started, but the worker in it could not", traceback=str(error))
        return Failure(error=_why_it_died(error), traceback="", died=True)
    except WorkerCrashedError as error:
        return Failure(error=_why_it_died(error), traceback="", died=True)
    except RuntimeEnvSetupError as error:
        return Failure(f"Ray could not set up runtime_env: {error.error_message}", traceback="")
    except RayError as error:
        return Failure(error=f"{type(error).__name__}: {error}", traceback="")


def _why_it_died(error: Exception) -> str:
    if "memory pressure" in str(error) or "running low on memory" in str(error):
        return "the process was killed for lack of memory; use a smaller batch_size, or nodes with more memory"
    return (
        "the process died (killed, or crashed in native code); its output is in Ray's logs,"
        " /tmp/ray/session_latest/logs/worker-*"
    )


def error_from(
    failures: Mapping[int, Failure], num_ranks: int, workers: Sequence[WorkerInfo], are_stopped: bool = True
) -> Exception:
    """One error for all that was reported: of a worker that is to blame, the lowest rank's.

    Args:
        failures: by rank.
        num_ranks: how many there are.
        workers: where they run, if it is known yet.
        are_stopped: the others are; it is said.
    """
    rank = min(failures, key=lambda rank: (failures[rank].lost_peer, failures[rank].died, rank))
    failure = failures[rank]
    if failure.cause is not None and not failure.lost_peer:
        return failure.cause
    host = workers[rank].host if workers else None
    others = sorted(set(range(num_ranks)) - {rank}) if are_stopped else []
    stopped = f"; rank {others[0]} was stopped" if len(others) == 1 else ""
    if len(others) > 1:
        stopped = f"; ranks {', '.join(map(str, others))} were stopped"
    message = f"rank {rank} on {host or 'an unknown host'}: {failure.error}{stopped}"
    kind = WorkerDied if failure.died or failure.lost_peer else WorkerError
    return kind(message, rank, host, failure.traceback)
