"""Owns the job's weights as the driver sees them: on the workers, in the local model, kept for later, or lost.

They outlive the workers: whoever ends these asks `keep` first, and whoever starts new ones calls `deliver`. Where
workers died with them, `fall_back` goes on from the newest checkpoint. How workers start and end is decided elsewhere.
"""

import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from dtrain import cluster, fit_state
from dtrain.checkpoint import load
from dtrain.data.source import keras_batch
from dtrain.driver_tensorflow import import_tensorflow
from dtrain.errors import CheckpointError, ConfigError, DtrainError
from dtrain.types import Tree
from dtrain.worker_group import WorkerGroup

if TYPE_CHECKING:
    import keras

    from dtrain.model import State

log = logging.getLogger("dtrain")


class Weights:
    """The weights, and the optimizer's state, of one Trainer's job.

    Args:
        model_fn: makes the model; called here where a local model is asked for.
        config: handed to `model_fn`, unless it is None.
    """

    def __init__(self, model_fn: "Callable[..., keras.Model]", config: Mapping[str, Any] | None) -> None:
        self._model_fn, self._config = model_fn, config
        self._example: Tree = None  # the first row of the data: what models are built from
        self._model: keras.Model | None = None
        self._model_as_made: tuple[Any, ...] = ()  # how model_fn compiled it
        self._model_is_current = False  # it has the workers' weights
        self._beside: State = {}  # what belongs to these and is not in the local model
        self._pending: State | None = None  # what the workers get as soon as there are any
        self._delivered: State | None = None  # what the workers got, and have not trained since
        self._began_with: State | None = None  # what they got before the training that is in progress, or the last
        self._are_lost = False  # the workers died with them
        self._checkpoint: str | None = None
        self._is_of: tuple[str, str] | None = None  # a checkpoint that was taken over, and the digest of its model

    def see(self, example: Tree) -> None:
        """The first row of data that the model is built from; that with targets is kept."""
        if self._example is None or len(example) > len(self._example):
            self._example = example

    def change(self) -> None:
        """The workers are about to train: the local model is no longer current."""
        self._model_is_current = False
        self._began_with, self._delivered = self._delivered, None

    def begin_again(self) -> None:
        """What the workers got before the training that is in progress is what new ones are to get."""
        self._pending = self._pending or self._began_with

    def committed(self, checkpoint: str) -> None:
        """The newest checkpoint: what goes on from there if the workers are lost."""
        self._checkpoint, self._began_with = checkpoint, None

    def local_model(self, group: WorkerGroup | None) -> "keras.Model":
        """A keras.Model in this process with the weights as they are now."""
        import_tensorflow()
        from dtrain.keras_internals import compiled_parts
        from dtrain.model import build_variables, describe, make_model, pick, write_state

        if self._model is None:
            self._model = make_model(self._model_fn, self._config)
            self._model_as_made = ()
        if self._model.built or self._example is not None:
            build_variables(self._model, keras_batch(self._example))
        if self._model.built and not self._model_as_made:
            self._model_as_made = compiled_parts(self._model)
        state = self._pending
        if state is None and not self._model_is_current and group is not None and group.description is not None:
            state = group.call("read_state")[0]
        if state is not None and self._model.built:
            waiting = write_state(self._model, _without_random(state))
            if self._is_of is not None:
                self._compare(describe(self._model).structure)
            self._beside = {**pick(state, ("seeds",)), **waiting}
            self._model_is_current = True
        return self._model

    def check_local_model(self) -> None:
        """Refuse what would have no effect: compiling or freezing the local model, which the workers do not see.

        Raises:
            ConfigError: with what to do instead.
        """
        if self._model is None or not self._model_as_made:
            return
        from dtrain.keras_internals import compiled_parts

        if any(now is not then for now, then in zip(compiled_parts(self._model), self._model_as_made, strict=False)):
            raise ConfigError(
                "trainer.model was compiled anew, or its layers frozen or thawed, after model_fn had made it; the"
                " workers hold models of their own: do that in the model_fn of another Trainer, and hand it these"
                " weights with set_weights(trainer.get_weights())"
            )

    def take_model(self, model: "keras.Model", group: WorkerGroup | None) -> None:
        """Give the workers the local model's weights, now or when they start."""
        self._take(self._state_of(model), group)

    def take_checkpoint(self, url: str, group: WorkerGroup | None) -> None:
        """Give the workers a checkpoint's weights, now or when they start.

        Raises:
            CheckpointError: it is missing, damaged, or of another model; the weights are as they were.
        """
        loaded = load(url)
        if group is not None and not group.closed:
            self.keep(group)
        kept = self._pending, self._is_of
        self._is_of = loaded.checkpoint.url, loaded.manifest.model_digest
        try:
            self._take(fit_state.state_of(loaded), group)
        except CheckpointError:
            self._pending, self._is_of = kept
            raise

    def deliver(self, group: WorkerGroup | None) -> None:
        """Give the workers what waits for them."""
        state, self._pending = self._pending, None
        if state is None or group is None or group.closed:
            self._pending = state
            return
        try:
            group.call("write_state", cluster.put(state))
        except CheckpointError:
            raise  # refused once is refused for good
        except BaseException:
            self._pending = state
            raise
        self._delivered = state
        if group.description is not None:
            self._compare(group.description.structure)

    def keep(self, group: WorkerGroup) -> None:
        """Take the weights from workers that are about to end."""
        if self._pending is not None:
            return
        if self._model_is_current and self._model is not None:
            self._pending = self._state_of(self._model)
            return
        if group.description is None:  # it was never built and has nothing to lose
            self._are_lost = False
            return
        with suppress(DtrainError):
            if not group.closed:
                self._pending = group.call("read_state")[0]
        if self._pending is None:
            self._pending = group.rescued
        self._are_lost = self._pending is None

    def outlive(self, group: WorkerGroup | None) -> bool:
        """Take the weights from a group that has failed, if they are anywhere. Whether they are, or there were none."""
        if group is not None:
            self.keep(group)
        return not self._are_lost

    def fall_back(self) -> None:
        """Where workers died with the weights, go on from the newest checkpoint, or from the factory's weights."""
        if not self._are_lost:
            return
        self._model_is_current = False
        if self._checkpoint is None:
            log.warning("the workers died with the weights, and there is no checkpoint: starting again from model_fn's")
            self._model, self._beside = None, {}
        else:
            log.warning("the workers died with the weights: going on from %s", self._checkpoint)
            self.take_checkpoint(self._checkpoint, None)
        self._are_lost = False

    def _compare(self, structure: str) -> None:
        """Say it, once, where a checkpoint's weights fit a model that is not the one that they were trained in."""
        if self._is_of is None:
            return
        (url, digest), self._is_of = self._is_of, None
        if digest and structure and digest != structure:
            log.warning(
                "%s is of another model, with weights of the same shapes: settings of layers, the optimizer or the loss"
                " are not those of model_fn",
                url,
            )

    def _state_of(self, model: "keras.Model") -> "State":
        """The local model's state, and what belongs to it of the workers'; its own random numbers are nobody's."""
        from dtrain.model import leave_out, read_state

        return {**leave_out(read_state(model), ("random", "seeds")), **self._beside}

    def _take(self, state: "State", group: WorkerGroup | None) -> None:
        self._pending, self._model_is_current = state, False
        self.deliver(group)


def _without_random(state: "State") -> "State":
    """A state without the process's own random numbers, which are not the model's."""
    return {name: value for name, value in state.items() if not name.startswith("random/")}
