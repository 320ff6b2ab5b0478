"""Owns the Ray actor: a thin shell around a Replica that sets up its process and turns exceptions into values.

It never logs to MLflow and never commits anything. Ray is not imported here: worker_group.py makes an actor of it.
"""

import contextlib
import functools
import io
import os
import re
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from dtrain import slim_keras
from dtrain.callback_state import Hooks, export_state
from dtrain.checkpoint import FileRecord, Staging
from dtrain.data.given import unpickled
from dtrain.errors import CheckpointError, DtrainError, LostPeer
from dtrain.faults import Fault, Strikes
from dtrain.hardware import cpu
from dtrain.types import (
    Array,
    Batching,
    BatchPlan,
    Beat,
    Failure,
    FitPlan,
    Logs,
    Membership,
    Opened,
    Position,
    Predictions,
    Progress,
    Purpose,
    Segment,
    SegmentResult,
    WorkerInfo,
    WorkerSettings,
)

NO_RANK = -1
"""Of a process that waits."""
ANY_NODE = ""
LOW_PRIORITY = 10
STACK_FRAMES = 12
"""So many of the innermost frames are shown of a process that hangs."""


def _give_way() -> None:
    """Let this thread compute while others do not want to: on Linux each has a priority of its own.

    Not the lowest: while it holds Python's lock, others of the process wait for it.
    """
    if threading.current_thread() is not threading.main_thread():
        with contextlib.suppress(OSError):  # some sandboxes forbid it
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOW_PRIORITY)


def _reported(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return what a method raises as a Failure: the driver then sees the user's traceback, not Ray's."""

    @functools.wraps(method)
    def wrapper(self: "Worker", *args: Any, **kwargs: Any) -> Any:
        try:
            return method(self, *args, **kwargs)
        except (Exception, SystemExit) as error:  # the user's own sys.exit is no crash of the process
            return _failure(error)

    return wrapper


class Worker:
    """One rank's process.

    Args:
        run_name: the run it belongs to.
        rank: which rank it starts as; NO_RANK: it waits until it is to take one's place.
    """

    def __init__(self, run_name: str, rank: int) -> None:
        self._run_name = run_name
        self._rank = rank
        self._printed = _Tee(sys.stdout)
        self._replica: Any = None
        self._feeds: dict[str, Any] = {}
        self._collective: Any = None
        self._settings: WorkerSettings | None = None
        self._hooks = Hooks(())
        self._snapshots: dict[int, Any] = {}
        self._strikes = Strikes()
        sys.stdout = self._printed

    def __repr__(self) -> str:
        return f"dtrain:{self._run_name}:" + (f"rank{self._rank}" if self._rank != NO_RANK else "spare")

    def where(self) -> WorkerInfo:
        """Where this rank runs."""
        import ray

        context = ray.get_runtime_context()
        gpus = tuple(int(i) for i in context.get_accelerator_ids().get("GPU", ()))
        return WorkerInfo(self._rank, os.getpid(), socket.gethostname(), context.get_node_id(), gpus, cpu())

    @_reported
    def setup(self, by_node: Mapping[str, WorkerSettings]) -> None:
        """Prepare the process: environment, threads, seeds and Keras's settings, before any of the user's code.

        Args:
            by_node: what holds on each node of the cluster; under ANY_NODE, on one that was not there then.
        """
        settings = by_node.get(self.where().node_id) or by_node[ANY_NODE]
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1")
        os.environ["KERAS_BACKEND"] = "tensorflow"
        if not settings.use_gpu:
            os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
        slim_keras.import_keras()
        from dtrain.setup import set_up_tensorflow

        self._settings = settings
        set_up_tensorflow(settings)

    @_reported
    def take_place(self, membership: Membership, faults: Sequence[Fault] = ()) -> None:
        """Be a rank of a group that is yet to form: what the ranks would agree on is what this one says.

        Args:
            membership: its place.
            faults: what a test has planned for it.
        """
        from dtrain.collective import HorovodCollective, LocalCollective

        self._rank = membership.rank
        is_alone = membership.world_size == 1 and not (self._settings and self._settings.elastic)
        self._collective = LocalCollective() if is_alone else HorovodCollective(membership)
        if faults:
            from dtrain.struck_collective import StruckCollective

            self._strikes = Strikes(faults)
            self._collective = StruckCollective(self._collective, self._strikes)

    @_reported
    def renumber(self, membership: Membership) -> None:
        """Be another rank, of a group of another size that is yet to form."""
        if self._rank != membership.rank == 0:
            self._printed.take()  # what the first one has shown before
        self._rank = membership.rank
        self._collective.leave(membership)

    @_reported
    def join(self, membership: Membership, rendezvous: str, interface: str | None, timeout: float) -> None:
        """Form the group with the others; again when it broke. `interface` None: the one with this node's address."""
        self._strikes("form")
        if membership.world_size > 1:
            self._collective.join(membership, rendezvous, interface or _interface_of_node(), timeout)

    @_reported
    def enter(self, directory: str) -> bool:
        """Work in a folder, the driver's, where this node has it and Ray gave the worker none of its own.

        So files that the user's code writes are where they are with plain Keras. Returns whether it does.
        """
        import ray

        if "working_dir" not in ray.get_runtime_context().runtime_env:
            with contextlib.suppress(OSError):
                os.chdir(directory)
        return os.path.realpath(os.getcwd()) == os.path.realpath(directory)

    @_reported
    def make_model(self, pickled_model_fn: bytes) -> None:
        """Call the user's factory."""
        from dtrain.model import make_model
        from dtrain.replica import Replica

        assert self._settings is not None
        self._strikes("start")
        model_fn, config = unpickled("model_fn", pickled_model_fn)
        self._replica = Replica(
            make_model(model_fn, config),
            self._collective,
            self._settings.steps,
            self._strikes,
        )

    @_reported
    def open(self, purpose: Purpose, data: Any, plan: BatchPlan | Batching, first_epoch: int) -> Opened | None:
        """Open the data of the verb that comes next, and build the model from them where that is yet to be done.

        Returns:
            What rank 0 found; nothing from the others.
        """
        from dtrain.model import describe

        if purpose in self._feeds:
            self._feeds.pop(purpose).close()
        feed = self._feeds[purpose] = self._replica.open(data, plan, purpose, first_epoch)
        first = feed.first()
        is_new = self._replica.build(first, purpose)
        return feed.opened(first, describe(self._replica.model) if is_new else None) if self._rank == 0 else None

    @_reported
    def begin_fit(
        self, plan: FitPlan, callbacks: bytes, saved: Any = None, handover: Any = None, lost: Any = None
    ) -> float | None:
        """Get ready for segments.

        Args:
            plan: what to train.
            callbacks: the user's, pickled.
            saved: a `fit_state.SavedFit` to go on with.
            handover: instead, what another rank's `hand_over` returned, to take the place of one that has died.
            lost: then, of what that one alone knew, what it has told last: a `fit_state.Lost`.

        Returns:
            The learning rate that the fit begins with; None where there is not one number.
        """
        from dtrain.model import constant_rate

        self._snapshots.clear()
        hooks = self._unpack(callbacks)
        train, validation = self._feeds.pop("train"), self._feeds.pop("validation", None)
        if handover is not None:
            _raise_failure(handover)
            saved = lost.completed(handover.fit)
        self._replica.begin_fit(plan, train, validation, hooks.callbacks, hooks.verbose, saved)
        if handover is not None:
            self._replica.fit.take_over(handover, lost)
        return constant_rate(self._replica.model)

    @_reported
    def run(self, segment: Segment) -> SegmentResult:
        """Train a segment; of several ranks, the first tells the logs, and all of them what each alone has."""
        try:
            result: SegmentResult = self._replica.run(segment)
        finally:
            self._replica.rest()
        self._strikes("answer")
        return result if self._rank == 0 else replace(result, step_logs={})

    @_reported
    def standing(self) -> Any:
        """After a peer was lost: a `fit_state.Standing`."""
        return self._replica.fit.standing()

    @_reported
    def hand_over(self) -> Any:
        """What a rank that is behind this one, or new, has to know: a `fit_state.Handover`."""
        with self._telling():
            return self._replica.fit.hand_over()

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        """Inside, the user's callbacks may be asked for their states, which takes as long as it takes."""
        self._replica.beat("the states of callbacks")
        try:
            yield
        finally:
            self._replica.rest()

    @_reported
    def catch_up(self, handover: Any) -> None:
        _raise_failure(handover)
        self._replica.fit.catch_up(handover)

    @_reported
    def resize(self, handover: Any, lost: Any) -> dict[str, Array]:
        """After `renumber`: see `dtrain.rank_fit.RankFit.resize`."""
        _raise_failure(handover)
        try:
            own: dict[str, Array] = self._replica.fit.resize(handover, lost)
        finally:
            self._replica.rest()
        return own

    @_reported
    def go_on(self) -> SegmentResult | None:
        """In the new group, finish what there is of the segment that was interrupted."""
        try:
            result: SegmentResult | None = self._replica.fit.go_on()
        finally:
            self._replica.rest()
        return result

    @_reported
    def end_fit(self) -> tuple[dict[str, list[float]], list[dict[str, Any]]]:
        """Keras's history, and on rank 0 the state of the user's callbacks."""
        self._strikes("shutdown")
        try:
            history = self._replica.end_fit()
        finally:
            self._replica.rest()
        return history, self._callback_states()

    @_reported
    def evaluate(self, plan: BatchPlan | Batching, callbacks: bytes) -> Logs:
        hooks = self._unpack(callbacks)
        logs: Logs = self._replica.evaluate(plan, self._feeds.pop("evaluate"), hooks.callbacks, hooks.verbose)
        return logs

    @_reported
    def predict(self, plan: BatchPlan | Batching, callbacks: bytes) -> Predictions:
        hooks = self._unpack(callbacks)
        feed = self._feeds.pop("predict")
        predictions: Predictions = self._replica.predict(plan, feed, hooks.callbacks, hooks.verbose)
        return predictions

    @_reported
    def callback_states(self) -> list[dict[str, Any]]:
        """The state of the user's callbacks after the last verb, from rank 0; nothing from the others."""
        return self._callback_states()

    @_reported
    def on_batch(self, kind: str) -> Logs:
        """One step on the rows that were opened, all of them."""
        feed = self._feeds.pop("train" if kind == "train" else "evaluate")
        logs: Logs = self._replica.on_batch(kind, feed.source)
        return logs

    @_reported
    def read_state(self) -> Any:
        """The job's state, from rank 0; nothing from the others."""
        state = self._replica.read_state()
        return state if self._rank == 0 else None

    @_reported
    def rescue(self) -> Any:
        """The job's state from any rank, when the others are gone."""
        return self._replica.read_state_as_first()

    @_reported
    def write_state(self, state: Any) -> None:
        self._replica.write_state(state)

    @_reported
    def snapshot(self, key: int) -> Position:
        """Keep a copy of this rank's part of a checkpoint, until `write_snapshot` of that key. Where the fit stands."""
        for old in sorted(self._snapshots)[:-1]:  # of checkpoints that came to nothing; the newest may yet be written
            self._snapshots.pop(old, None)
        with self._telling():
            snapshot = self._snapshots[key] = self._replica.snapshot()
        position: Position = snapshot.position
        return position

    @_reported
    def write_snapshot(self, key: int, staging: Staging) -> tuple[FileRecord, ...] | CheckpointError:
        """Write what `snapshot` kept, while training goes on. The files' records, or why they cannot be written."""
        from dtrain import fit_state

        self._strikes("checkpoint")
        _give_way()
        snapshot = self._snapshots.pop(key)
        for other in [other for other in list(self._snapshots) if other < key]:  # which nobody will ask for any more
            self._snapshots.pop(other, None)
        try:
            return fit_state.write(snapshot, staging, self._rank)
        except CheckpointError as error:  # a full disk must not end the training
            return error

    def _unpack(self, pickled_hooks: bytes) -> Hooks:
        self._hooks = unpickled("callbacks", pickled_hooks)
        return self._hooks

    def _callback_states(self) -> list[dict[str, Any]]:
        return [export_state(callback) for callback in self._hooks.callbacks] if self._rank == 0 else []

    def heartbeat(self) -> Beat:
        """What this rank does; answers while it does it."""
        if self._replica is None:
            return Beat(0, "the start of the process", False, True)
        beat: Beat = self._replica.heartbeat()
        return beat

    def stack(self) -> str:
        """Where its main thread is; answers while a method runs."""
        threads = {thread.name: thread.ident for thread in threading.enumerate()}
        own = threading.get_ident()
        found = [
            f"{name}:\n{''.join(traceback.format_stack(frame)[-STACK_FRAMES:])}"
            for name, ident in threads.items()
            if ident != own and (frame := sys._current_frames().get(ident or 0)) is not None
            if any("dtrain" in line for line in traceback.format_stack(frame))
        ]
        return "\n".join(found)

    def let_go(self, address: str) -> int:
        """See `dtrain.lost_nodes.let_go`; answers while a method runs, which it may end."""
        from dtrain.lost_nodes import let_go

        return let_go(address)

    def progress(self) -> Progress:
        """How far this rank is, and what it printed since the last call; answers while a method runs."""
        progress = self._replica.progress if self._replica is not None else Progress("starting")
        return replace(progress, printed=self._printed.take())


def _raise_failure(handover: Any) -> None:
    """Where the other rank could not tell: that one has said why."""
    if isinstance(handover, Failure):
        raise LostPeer(handover.error)


_RAY_MARKS = (":actor_name:", ":task_name:", ":job_id:")
"""How lines begin that Ray prints into a worker's log for itself."""


class _Tee(io.TextIOBase):
    """Standard output that goes to the worker's log and is also kept, line by line, for the driver."""

    def __init__(self, log: TextIO) -> None:
        self._log = log
        self._lock = threading.Lock()
        self._text = ""

    def write(self, text: str) -> int:
        with self._lock:
            self._text += text
        return self._log.write(text)

    def flush(self) -> None:
        self._log.flush()

    def fileno(self) -> int:
        return self._log.fileno()

    def writable(self) -> bool:
        return True

    def take(self) -> tuple[str, ...]:
        """The finished lines since the last call."""
        with self._lock:
            *lines, self._text = self._text.split("\n")
        return tuple(line for line in lines if not line.startswith(_RAY_MARKS))


_CHANNELS_LAST_ONLY = re.compile(r"only support(s|ed for) (the )?ND?HWC")
"""What TensorFlow says of layers in channels_first: "The Conv2D op currently only supports the NHWC tensor format"."""
_USE_CHANNELS_LAST = (
    'TensorFlow cannot compute this layer in data_format="channels_first" on this CPU: make it with'
    ' data_format="channels_last", or all with keras.config.set_image_data_format("channels_last") at the top of'
    " model_fn, and put the channels of the data last; or train on GPUs with use_gpu=True"
)


def _failure(error: BaseException) -> Failure:
    with contextlib.suppress(Exception):
        from dtrain.collective import is_lost_peer

        lost_peer = is_lost_peer(error)
        if _CHANNELS_LAST_ONLY.search(str(error)):
            error.add_note(_USE_CHANNELS_LAST)
        return Failure(
            error="".join(traceback.format_exception_only(error)).strip(),
            traceback=_users_traceback(error),
            lost_peer=lost_peer,
            cause=error if isinstance(error, DtrainError) else None,
        )
    return Failure(repr(error), traceback.format_exc())


def _users_traceback(error: BaseException) -> str:
    """The traceback without the frames of dtrain that lead to the user's code."""
    ours = str(Path(__file__).parent)
    report = traceback.TracebackException.from_exception(error)
    frames = list(report.stack)
    first = next((i for i, frame in enumerate(frames) if not frame.filename.startswith(ours)), 0)
    report.stack = traceback.StackSummary.from_list(frames[first:])
    return "".join(report.format())


def _interface_of_node() -> str:
    import psutil
    import ray

    address = ray.util.get_node_ip_address()
    for name, addresses in psutil.net_if_addrs().items():
        if any(item.address == address for item in addresses):
            return name
    raise DtrainError(f"no network interface of {socket.gethostname()} has the node's address {address}")
