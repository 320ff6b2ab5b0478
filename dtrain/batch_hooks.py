"""Owns when the hooks of single batches are called: where Keras calls them, around each execution of some steps."""

from collections.abc import Callable
from dataclasses import dataclass

from dtrain.callbacks import RankCallbacks
from dtrain.data.loader import Chunk
from dtrain.metrics import last_of
from dtrain.step import Kind
from dtrain.types import Array, Logs


@dataclass(frozen=True)
class _Execution:
    """An execution that is under way, or whose hook is due: its first step, and the metrics after its newest."""

    first_step: int
    end: int
    state: list[Array]
    own: dict[str, Array]


class BatchHooks:
    """Calls the hooks of single batches, if there are any.

    Args:
        kind: "train" or "test".
        callbacks: whose hooks.
        steps: of an execution; the last of an epoch may have fewer. No chunk reaches over its end.
        global_logs: a Replica's.
        nested: puts logs as the step returned them.
    """

    def __init__(
        self,
        kind: Kind,
        callbacks: RankCallbacks,
        steps: int,
        global_logs: Callable[..., dict[str, Array]],
        nested: Callable[[Logs], Logs],
    ) -> None:
        self.are_used = callbacks.has_batch_hooks(kind)
        self._kind: Kind = kind
        self._callbacks = callbacks
        self._steps = steps
        self._global_logs = global_logs
        self._nested = nested
        self._last: _Execution | None = None

    def begin(self, chunk: Chunk) -> None:
        if self.are_used and chunk.first_step % self._steps == 0:
            self._callbacks(f"on_{self._kind}_batch_begin", chunk.first_step)

    def end(self, chunk: Chunk, state: list[Array], own: dict[str, Array]) -> None:
        if not self.are_used:
            return
        end = chunk.first_step + chunk.num_steps
        self._last = _Execution(chunk.first_step, end, state, own)
        if end % self._steps == 0:
            self.finish()

    @property
    def due(self) -> tuple[int, int] | None:
        """The first step and the end of what was finished and whose hook is due: the group broke in between."""
        last = self._last
        return (last.first_step, last.end) if last is not None and last.end % self._steps == 0 else None

    def take_over(self, due: tuple[int, int] | None, state: list[Array], own: dict[str, Array]) -> None:
        """Go on as another rank would, with these metrics."""
        self._last = _Execution(*due, state, own) if due is not None else None

    def finish(self) -> None:
        """End the execution that is under way, if there is one: the epoch ends."""
        last = self._last
        if last is not None:
            logs = last_of(self._global_logs(self._kind, [last.state], [last.own], "batch"))
            # What Keras gives as the last step of an execution may be beyond the last of the epoch.
            step = (last.first_step // self._steps + 1) * self._steps - 1
            self._callbacks(f"on_{self._kind}_batch_end", step, logs=self._nested(logs))
            self._last = None
