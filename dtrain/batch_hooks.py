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
        self._begun: int | None = None

    def begin(self, chunk: Chunk) -> None:
        if self.are_used and chunk.first_step % self._steps == 0 and self._begun != chunk.first_step:
            self._callbacks(f"on_{self._kind}_batch_begin", chunk.first_step)
            self._begun = chunk.first_step  # or a step that is undone, and trained again, would begin twice

    def end(self, chunk: Chunk, state: list[Array], own: dict[str, Array]) -> None:
        if not self.are_used:
            return
        end = chunk.first_step + chunk.num_steps
        self._last = _Execution(chunk.first_step, end, *newest(state, own))
        if end % self._steps == 0:
            self.finish()

    @property
    def is_due(self) -> bool:
        """Whether an execution is over and its hook was not called: the group broke in between."""
        return self._last is not None and self._last.end % self._steps == 0

    @property
    def place(self) -> tuple[int | None, tuple[int, int] | None]:
        """The first step of the execution that has begun; the first step and the end of what is finished of it."""
        return self._begun, (self._last.first_step, self._last.end) if self._last is not None else None

    def take_over(
        self, place: tuple[int | None, tuple[int, int] | None], states: list[Array], own: dict[str, Array]
    ) -> None:
        """Go on as another rank would, with these metrics."""
        self._begun, last = place
        self._last = _Execution(*last, *newest(states, own)) if last is not None else None

    def finish(self) -> None:
        """End the execution that is under way, if there is one: the epoch ends."""
        last = self._last
        if last is not None:
            logs = last_of(self._global_logs(self._kind, [last.state], [last.own], "batch"))
            # What Keras gives as the last step of an execution may be beyond the last of the epoch.
            step = (last.first_step // self._steps + 1) * self._steps - 1
            self._callbacks(f"on_{self._kind}_batch_end", step, logs=self._nested(logs))
            self._last = self._begun = None


def newest(state: list[Array], own: dict[str, Array]) -> tuple[list[Array], dict[str, Array]]:
    """Of what a call returned, that of its last step."""
    return [values[-1:] for values in state], {key: values[-1:] for key, values in own.items()}
