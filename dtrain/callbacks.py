"""Owns which callbacks run where, and that what they decide holds on every rank.

Keras's deciding callbacks run on every rank, with the same logs. Those that write, and all that runs the user's code,
run on rank 0 alone; what such a hook does to `stop_training`, the optimizers, the weights or which layers are trained
is broadcast after it.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import keras

from dtrain.callback_checkpoint import CallbackState, save_states
from dtrain.collective import Collective
from dtrain.errors import ConfigError
from dtrain.keras_internals import (
    is_default,
    layers_of,
    profiles,
    recorded_assignments,
    schedule_of,
    seed_generators_of,
)
from dtrain.model import optimizers_of
from dtrain.types import Logs

T = TypeVar("T")

Hook = tuple[str, tuple[Any, ...]]
"""A hook's name and its arguments."""

_DECIDING = (
    keras.callbacks.EarlyStopping,
    keras.callbacks.ReduceLROnPlateau,
    keras.callbacks.SwapEMAWeights,
    keras.callbacks.TerminateOnNaN,
)

_FLAGS = ("stop_training", "stop_evaluating", "stop_predicting")


def runs_on_every_rank(callback: keras.callbacks.Callback) -> bool:
    """Whether a callback decides rather than writes, or opted in with `dtrain.on_every_rank`."""
    return type(callback) in _DECIDING or getattr(callback, "dtrain_on_every_rank", False)


class RankCallbacks:
    """The callbacks of a fit, an evaluate or a predict on one rank: call hooks as on a keras CallbackList.

    Args:
        callbacks: all of the user's; every rank is given the same list.
        model: this rank's model.
        collective: every hook is collective where a callback that runs on rank 0 alone takes part in it.
        add_history: keep Keras's History of it.
        params: as Keras hands them to `set_params`.
    """

    def __init__(
        self,
        callbacks: Sequence[keras.callbacks.Callback],
        model: keras.Model,
        collective: Collective,
        add_history: bool = False,
        **params: Any,
    ) -> None:
        self._model = model
        self._collective = collective
        self._only_first = [callback for callback in callbacks if not runs_on_every_rank(callback)]
        own = [c for c in callbacks if collective.rank == 0 or runs_on_every_rank(c)]
        self._list = keras.callbacks.CallbackList(own, add_history, model=model, **params)
        self._params = params
        self.leads = collective.rank == 0
        """Whether what is on rank 0 alone runs here."""
        self._given = callbacks
        self._half_done: tuple[Hook, list[Any]] | None = None  # and what it has assigned: not agreed upon yet
        self._owes_first = False  # of it, what runs on rank 0 alone
        self._without_state: list[keras.callbacks.Callback] = []  # that were told of
        self.completed = 0
        """How many hooks were called here, and the ranks agreed on what they did."""
        self._with_batches = {
            kind: any(_looks_at_batches(callback, kind) for callback in callbacks)
            for kind in ("train", "test", "predict")
        }

    def has_batch_hooks(self, kind: str) -> bool:
        """Whether a callback looks at each batch of "train", "test" or "predict"."""
        return self._with_batches[kind]

    def __call__(self, hook: str, *args: Any, logs: Logs | None = None) -> None:
        """Call `hook` of every callback that runs here; afterwards its effects hold on all ranks.

        Where a lost peer keeps the ranks from agreeing it is to be called once more: only that is then made up for.
        """
        if self._half_done is None or self._half_done[0] != (hook, args):
            with recorded_assignments() as assigned:
                getattr(self._list, hook)(*args, logs)
            self._half_done = (hook, args), assigned
        elif self._owes_first:
            with recorded_assignments() as assigned:
                self.make_up_for(hook, *args, logs=logs)
            self._half_done = (hook, args), assigned
        self._owes_first = False
        if self._collective.world_size > 1 and self._only_first and self._may_differ(hook):
            self._agree(hook, self._half_done[1])
        self._half_done = None
        self.completed += 1

    def call_here(self, hook: str, *args: Any, logs: Logs | None = None) -> None:
        """Call `hook` on this rank alone; its effects stay here."""
        getattr(self._list, hook)(*args, logs)

    @property
    def half_done(self) -> Hook | None:
        """The hook that was called here and that the ranks have yet to agree on."""
        return self._half_done[0] if self._half_done is not None else None

    def take_over(self, half_done: Hook | None, completed: int, is_behind: bool) -> None:
        """Go on as another rank would; `is_behind`: what runs on rank 0 alone runs here, and there it did not."""
        self.completed = completed
        self._half_done = (half_done, []) if half_done is not None else None
        self._owes_first = half_done is not None and is_behind

    def lead(self) -> None:
        """Run here from now on what runs on rank 0 alone, which has died. Only those begin anew."""
        every = [*self._given, self._model.history]
        self._list = keras.callbacks.CallbackList(every, model=self._model, **self._params)
        self.leads = True
        self._list.callbacks = self._only_first  # the others have begun here long ago
        self.call_here("on_train_begin")
        self._list.callbacks = every

    def make_up_for(self, hook: str, *args: Any, logs: Logs | None = None) -> None:
        """Call `hook` of what is on rank 0 alone: here the process that it was called in has died."""
        history = self._model.history
        is_in_history = hook == "on_epoch_end" and history.epoch[-1:] == list(args)
        for callback in (*self._only_first, *(() if is_in_history else (history,))):
            getattr(callback, hook)(*args, logs)

    def history(self) -> dict[str, list[float]]:
        """Keras's History of the fit so far."""
        history: dict[str, list[float]] = self._model.history.history
        return history

    def with_state(self) -> list[keras.callbacks.Callback]:
        """All whose state belongs to a fit: Keras's History and then the user's, in the order given."""
        return [self._model.history, *self._given]

    def is_on_first_only(self, callback: keras.callbacks.Callback) -> bool:
        """Whether a callback runs on rank 0 alone."""
        return any(callback is other for other in self._only_first)

    def told(self) -> list[CallbackState | None]:
        """The states of all that runs here, as far as they can be had; None in the places of the others."""
        return self._told(lambda callback: self._collective.rank == 0 or not self.is_on_first_only(callback))

    def told_of_first(self) -> Sequence[CallbackState | None]:
        """On rank 0, the states of what is complete there alone; None in the others' places. Elsewhere none."""
        if self._collective.rank > 0:
            return ()
        return self._told(lambda callback: callback is self._model.history or self.is_on_first_only(callback))

    def _told(self, is_told: Callable[[keras.callbacks.Callback], bool]) -> list[CallbackState | None]:
        found: list[CallbackState | None] = []
        for callback in self.with_state():
            state = None
            if is_told(callback):
                try:
                    (state,) = save_states([callback])
                except Exception as error:  # of the user's own; where there are checkpoints, it ends the fit there
                    self._warn_of_unknown_state(callback, error)
            found.append(state)
        return found

    def _warn_of_unknown_state(self, callback: keras.callbacks.Callback, error: Exception) -> None:
        if callback not in self._without_state:
            self._without_state.append(callback)
            print(
                f"the state of {type(callback).__name__} cannot be told ({type(error).__name__}: {error}): where this"
                " worker dies, it begins anew"
            )

    def _may_differ(self, hook: str) -> bool:
        """Whether `hook` may have had another effect on rank 0 than on others.

        What a callback on rank 0 puts into the logs may be what a deciding one stops at, and restores weights for,
        several hooks later: so all count but those of single batches, which are many.
        """
        return "batch" not in hook or any(_overrides(callback, hook) for callback in self._only_first)

    def _agree(self, hook: str, assigned: Sequence[Any]) -> None:
        variables = _variables_of(self._model)
        changed = [i for i, v in enumerate(variables) if any(v is other for other in assigned)]
        flags = {flag: bool(getattr(self._model, flag, False)) for flag in _FLAGS}
        frozen, schedules = [not layer.trainable for layer in layers_of(self._model)], _schedules_of(self._model)
        decision = {"flags": flags, "changed": changed, "frozen": frozen, "schedules": schedules}
        decision = self._collective.broadcast_json(decision, f"{hook}.decision")
        if decision["schedules"] != schedules:
            raise ConfigError(
                f"a callback gave an optimizer a schedule in {hook}, on rank 0 alone; assign numbers, or let model_fn"
                " make the optimizer with the schedule"
            )
        for flag, value in decision["flags"].items():
            setattr(self._model, flag, value)
        if decision["frozen"] != frozen:
            for layer, value in zip(layers_of(self._model), decision["frozen"], strict=True):
                layer.trainable = not value  # and of all in it, which come later
        values = [variables[i].numpy() for i in decision["changed"]]
        for index, value in zip(decision["changed"], self._collective.broadcast(values, f"{hook}.values"), strict=True):
            variables[index].assign(value)


def on_every_rank(callback: T) -> T:
    """Mark a callback (its class, or one object) to run on every rank instead of rank 0 alone.

    Its hooks get the same logs everywhere; they must do the same everywhere to model and optimizer.

    Example:
        >>> @dtrain.on_every_rank
        ... class StopAtOneTenth(keras.callbacks.Callback):
        ...     def on_epoch_end(self, epoch, logs=None):
        ...         self.model.stop_training = logs["loss"] < 0.1
    """
    callback.dtrain_on_every_rank = True  # type: ignore[attr-defined]
    return callback


def _variables_of(model: keras.Model) -> list[Any]:
    """What a callback on rank 0 may change for all. Random numbers stay each rank's own."""
    seeds = [generator.state for generator in seed_generators_of(model)]
    own = [variable for variable in model.variables if all(variable is not seed for seed in seeds)]
    return [*own, *(variable for optimizer in optimizers_of(model) for variable in optimizer.variables)]


def _schedules_of(model: keras.Model) -> list[str]:
    """Of each optimizer what tells the schedule of its learning rate from others, and from none."""
    found = []
    for optimizer in optimizers_of(model):
        schedule = schedule_of(optimizer)
        config = ""
        with contextlib.suppress(NotImplementedError):  # of one of the user's own
            config = str(schedule.get_config()) if schedule is not None else ""
        found.append(f"{type(schedule).__name__} {config}")
    return found


def _looks_at_batches(callback: keras.callbacks.Callback, kind: str) -> bool:
    """Whether a callback needs its hooks of single batches. Two of Keras's have them always and use them at times."""
    if type(callback) is keras.callbacks.ModelCheckpoint and callback.save_freq == "epoch":
        return False
    if type(callback) is keras.callbacks.TensorBoard and callback.update_freq == "epoch":
        return bool(callback.write_steps_per_second) or profiles(callback)
    return any(_overrides(callback, f"on_{kind}_batch_{place}") for place in ("begin", "end"))


def _overrides(callback: keras.callbacks.Callback, hook: str) -> bool:
    names = (hook, hook.replace("on_train_batch", "on_batch"))  # Keras calls the old name from the new one
    return not all(is_default(getattr(callback, name)) for name in names)
