"""Owns what is traced: K training or evaluation steps of one rank in a single call.

Keras's own `train_step` and `test_step` do the work; while they are traced, gradients (optimizer.py), losses
(losses.py) and scalar means (metrics.py) are made those of the whole mini-batch. With one rank nothing is patched:
the step is plain Keras.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import keras
import numpy as np
import tensorflow as tf

from dtrain import lookups
from dtrain.batch_norm import synchronized_moments
from dtrain.collective import Collective
from dtrain.data.source import keras_batch, leaves, map_tree
from dtrain.errors import ConfigError
from dtrain.fit_state import Knowledge
from dtrain.keras_internals import layers_of, recorded_assignments, seed_generators_of
from dtrain.local_sgd import average
from dtrain.losses import exact_losses
from dtrain.metrics import MetricState, Source, flat_logs, nested_logs, places_in, shared_means
from dtrain.model import named_variables, optimizers_of
from dtrain.optimizer import Reduction, reduce, reduced_gradients
from dtrain.types import Array, Shapes, StepOptions, Tree
from dtrain.undo import Records, Skips, Undo

Kind = Literal["train", "test"]

_RANDOM = {
    *("RandomUniform", "RandomUniformInt", "RandomStandardNormal", "TruncatedNormal", "ParameterizedTruncatedNormal"),
    *("RandomShuffle", "RandomGamma", "RandomPoisson", "RandomPoissonV2", "Multinomial"),
    *("RngReadAndSkip", "RngSkip", "StatefulUniform", "StatefulStandardNormalV2", "StatefulTruncatedNormal"),
    *("StatefulUniformInt", "StatefulUniformFullInt", "StatefulRandomBinomial"),
}
"""TensorFlow's operations that draw on a state of the process, or on a variable that is no Keras variable."""
_RANDOM_STATE = "StateVar"
"""What TensorFlow calls that variable."""


class Steps:
    """K steps in one call, traced once for any K and any number of rows.

    Args:
        model: built and compiled.
        collective: the ranks that make the same calls.
        metrics: the model's metric state.
        kind: "train" calls the model's `train_step`, "test" its `test_step`.
        options: what steps are to be like.
    """

    def __init__(
        self,
        model: keras.Model,
        collective: Collective,
        metrics: MetricState,
        kind: Kind,
        options: StepOptions,
    ) -> None:
        self._model = model
        self._collective = collective
        self._metrics = metrics
        self._kind = kind
        self._options = options
        self._functions: dict[Any, Any] = {}
        self._records: Records | None = None
        self._assigned: list[keras.Variable] = []  # by the newest step that a rank took by itself
        self._is_local = kind == "train" and options.sync_every > 1 and collective.world_size > 1
        skips = kind == "train" and options.skip_nan
        self._undo = Undo(model, metrics) if kind == "train" and (collective.world_size > 1 or skips) else None
        self._skips = Skips(self._undo, metrics) if self._undo is not None and skips else None
        if self._undo is not None:
            self._undo.covers_all = skips or self._is_local
        self._has_warned = False
        self._unsaved: list[tuple[tf.Variable, Array]] = []
        self.is_custom = any(
            getattr(type(model), name) is not getattr(keras.Model, name) for name in (f"{kind}_step", "compute_metrics")
        )
        """The model has a step of its own, which alone knows what it returns and builds."""
        self.returned: dict[str, Source | None] | None = None
        """What a custom step returns, in order: which metrics' results, and (None) numbers of its own.

        None itself: the results of all metrics, as Keras's own steps return, or nobody knows yet."""
        self._places: dict[str, tuple[str, ...]] = {}
        self._frozen: list[bool] | None = None  # which layers were when a step was first traced
        self._traced_as: list[bool] | None = None  # the same of the other ranks, where this one came later

    @property
    def own_logs(self) -> list[str]:
        """What a custom step returns besides the results of metrics."""
        return [name for name, source in (self.returned or {}).items() if source is None]

    @property
    def results(self) -> dict[str, Source] | None:
        """The results of metrics that a custom step returns; None: of all."""
        if self.returned is None:
            return None
        return {name: source for name, source in self.returned.items() if source is not None}

    def nested(self, logs: Mapping[str, Any]) -> dict[str, Any]:
        """Logs as a custom step nests them, which decides on their order: CallbackList sorts, and flattens then."""
        return nested_logs(logs, self._places)

    def __call__(
        self, data: Tree, share: float, whole: bool, shapes: Shapes | None = None
    ) -> tuple[list[Array], dict[str, Array]]:
        """Run the steps of a chunk. Collective.

        Args:
            data: leaves of shape (K, rows, ...), K at least 1.
            share: this rank's part of each mini-batch.
            whole: every rank has the whole mini-batch; rank 0's gradients and metrics count, the others' do not.
            shapes: what is known of leaves behind the rows, by path; None there is traced once for all sizes. What is
                traced depends on this and not on what came before, or a fit that is gone on with could differ.

        Returns:
            The metric variables after each step, each of shape (K, ...), or (1, ...) where they are too large to be
            kept for every step; and what a custom step returned, times this rank's share, each of shape (K,).
        """
        flat = [tensor for _, tensor in leaves(data)]
        structure = map_tree(lambda _: 0, data)
        specs = [
            tf.TensorSpec([None, None, *_known(tensor.shape[2:], (shapes or {}).get(path))], tensor.dtype)
            for path, tensor in leaves(data)
        ]
        key = (whole, str(structure), *specs)
        function = self._functions.get(key)
        if function is None:
            function = self._functions[key] = self._make(specs, structure, whole)
        # A sum of g and zeros is g to the last bit; a sum of N times g / N is not.
        counted = float(self._collective.rank == 0) if whole else share
        recorded = function(flat, tf.constant(counted, tf.float64))
        self._warn_of_unsaved_variables()
        return self._as_returned([value.numpy() for value in recorded])

    def undo(self) -> tuple[int, list[Array], dict[str, Array]]:
        """After a call that a lost peer has ended: put back what the step under way has changed.

        Returns:
            How many steps of the call were finished, and of these what the call would have returned.
        """
        finished = self._undo.restore() if self._undo is not None else 0
        if not finished or self._records is None:
            return 0, [], {}
        states, logs = self._as_returned(self._records.first(finished, finished))
        if not self._metrics.records_steps:  # the one that is kept may be of the step that was undone
            states = [np.asarray(value)[None] for value in self._metrics.read()]
        return finished, states, logs

    @property
    def skipped(self) -> dict[int, bool]:
        """See `dtrain.undo.Skips.read`, of the newest call."""
        return self._skips.read() if self._skips is not None else {}

    @property
    def knowledge(self) -> Knowledge:
        """What a step has shown of itself, for a rank that has yet to see one."""
        return Knowledge(self.returned, self._places, self._frozen)

    @knowledge.setter
    def knowledge(self, known: Knowledge) -> None:
        self.returned, self._places, self._traced_as = known.returned, dict(known.places), known.frozen

    def _as_returned(self, recorded: list[Array]) -> tuple[list[Array], dict[str, Array]]:
        """Records as a call returns them: metric variables, and what a custom step returned."""
        num_states = len(self._metrics.variables)
        return recorded[:num_states], dict(zip(self.own_logs, recorded[num_states:], strict=True))

    def _make(self, specs: Sequence[tf.TensorSpec], structure: Tree, whole: bool) -> Any:
        def run(flat: Sequence[tf.Tensor], share: tf.Tensor) -> Any:
            steps = self._run_eagerly if self._model.run_eagerly else self._run
            return steps(flat, structure, share, whole)

        if self._undo is not None:
            self._undo.prepare()
        if self._model.run_eagerly:
            return run
        self._records = self._records or self._new_records()
        signature = [list(specs), tf.TensorSpec([], tf.float64)]
        # Horovod's operations have no XLA version, so compile()'s jit_compile cannot reach around them.
        function = tf.function(run, input_signature=signature, autograph=False, jit_compile=False)
        with self._frozen_as_others():
            self._frozen = self._frozen or [not layer.trainable for layer in layers_of(self._model)]
            self._unsaved += self._not_saved_of(function.get_concrete_function().variables)
        if self._undo is not None and self._undo.prepare():  # there is more to undo than was known before
            return self._make(specs, structure, whole)
        return function

    @contextlib.contextmanager
    def _frozen_as_others(self) -> Iterator[None]:
        """Inside, those layers are frozen that were when the other ranks traced the step: their graphs stay."""
        own = [layer.trainable for layer in layers_of(self._model)]
        try:
            for layer, frozen in zip(layers_of(self._model), self._traced_as or (), strict=False):
                layer.trainable = not frozen
            yield
        finally:
            for layer, trainable in zip(layers_of(self._model), own if self._traced_as else (), strict=False):
                layer.trainable = trainable

    def _new_records(self) -> Records:
        states = [(tf.as_dtype(variable.dtype), tf.TensorShape(variable.shape)) for variable in self._metrics.variables]
        return Records(states, len(self.own_logs))

    def _run(self, flat: Sequence[tf.Tensor], structure: Tree, share: tf.Tensor, whole: bool) -> Any:
        if self._collective.rank > 0:  # what draws by TensorFlow's own operations draws other numbers on each rank
            graph = tf.compat.v1.get_default_graph()
            graph.seed = ((graph.seed or 0) + self._collective.rank * 0x9E3779B9) % 2**31
        num_steps = tf.shape(flat[0])[0]
        assert self._records is not None
        self._records.clear(num_steps if self._metrics.records_steps else 1, num_steps)
        if self._skips is not None:
            self._skips.begin(num_steps)

        def body(step: tf.Tensor) -> tuple[tf.Tensor]:
            with tf.control_dependencies(self._begun(step)):
                data = _packed(structure, [tensor[step] for tensor in flat])
                returned = flat_logs(self._one_step(keras_batch(data), share, whole))
            if self._skips is not None:
                self._skips.settle(step)
            self._warn_of_unsaved_random_numbers()
            self._record(step, returned, share)
            return (step + 1,)

        tf.while_loop(lambda step: step < num_steps, body, (tf.constant(0),), parallel_iterations=1)
        if self._is_local:
            average(self._model, self._collective, share, self._assigned)
        return self._records.read()

    def _begun(self, step: Any) -> list[tf.Operation]:
        """What must have run before a step does. Where ranks train by themselves a call is undone whole."""
        undo = self._undo
        if undo is None:
            return []
        if not self._is_local:
            return [undo.begin_step(step)]
        return [tf.cond(tf.equal(step, 0), lambda: undo.begin_step(0), tf.no_op)]

    def _record(self, step: Any, returned: dict[str, Any], share: tf.Tensor) -> None:
        assert self._records is not None
        own = [tf.reshape(tf.cast(returned[key], tf.float64), []) * share for key in self.own_logs]
        self._records.write(step if self._metrics.records_steps else 0, self._metrics.read(), step, own)

    def _warn_of_unsaved_random_numbers(self) -> None:
        """Say once, where the user sees it, that a step that was just traced draws on states that no checkpoint has.

        What is inside of functions that the step calls is not seen.
        """
        types = {operation.type for operation in tf.compat.v1.get_default_graph().get_operations()}
        found = sorted(types & _RANDOM)
        if found and not self._has_warned and self._collective.rank == 0:
            self._has_warned = True
            print(
                f"the model draws random numbers by TensorFlow's own operations ({', '.join(found)}), whose state is"
                " in no checkpoint: a fit that is gone on with draws others; keras.random with a SeedGenerator is saved"
            )

    def _not_saved_of(self, variables: Sequence[tf.Variable]) -> list[tuple[tf.Variable, Array]]:
        """Those that no checkpoint has, as they are now: they may be constants, so only one that changes matters."""
        own = [part.variables for part in (self._undo, self._skips, self._records) if part is not None]
        saved = [variable.value for variable in (*named_variables(self._model).values(), *self._metrics.variables)]
        known = {id(variable.handle) for variable in (*saved, *(variable for part in own for variable in part))}
        return [
            (variable, variable.numpy())
            for variable in variables
            if not variable.name.startswith(_RANDOM_STATE) and id(variable.handle) not in known
        ]

    def _warn_of_unsaved_variables(self) -> None:
        """Say once, after the first call, which of them the steps have changed."""
        unsaved, self._unsaved = self._unsaved, []
        changed = [variable.name for variable, before in unsaved if variable.numpy().tobytes() != before.tobytes()]
        if changed and self._collective.rank == 0:
            print(
                f"a step changes variables that are in no checkpoint ({', '.join(changed[:3])}): a fit that is gone on"
                " with has them as model_fn makes them; make them, or the layer or optimizer that they belong to, an"
                " attribute of the model"
            )

    def _run_eagerly(self, flat: Sequence[tf.Tensor], structure: Tree, share: tf.Tensor, whole: bool) -> Any:
        """The same, step by step in Python; what a custom step returns is found out on the way."""
        num_steps = flat[0].shape[0]
        for step in range(num_steps):
            if self._undo is not None and not (self._is_local and step):
                self._undo.prepare()
                self._undo.begin_step(step)
            data = keras_batch(_packed(structure, [tensor[step] for tensor in flat]))
            is_known = self.returned is not None or not self.is_custom
            take = self._one_step if is_known else self._first_step
            returned = flat_logs(take(data, share, whole))
            if not is_known or self._records is None:
                self._records = self._new_records()
            if step == 0:
                self._records.clear(num_steps if self._metrics.records_steps else 1, num_steps)
            if self._skips is not None:
                if step == 0:
                    self._skips.begin(num_steps)
                self._skips.settle(step)
            self._record(step, returned, share)
        if self._is_local:
            average(self._model, self._collective, share, self._assigned)
        assert self._records is not None
        return self._records.read()

    def _one_step(self, data: Tree, share: tf.Tensor, whole: bool) -> dict[str, Any]:
        step = getattr(self._model, f"{self._kind}_step")
        if hasattr(step, "python_function"):  # a tf.function: its trace may be of another step, not over ranks
            step = tf.autograph.to_graph(step.python_function)
        if self._collective.world_size == 1:
            with lookups.by_rows():
                return dict(step(data))
        before = self._metrics.read()
        rows = next(tensor.shape[0] for _, tensor in leaves(data if isinstance(data, tuple) else (data,)))
        with lookups.by_rows(), self._over_ranks(share, whole, rows):
            logs = dict(step(data))
        if whole and self._collective.rank > 0:
            self._metrics.assign(before)
        return logs

    @contextlib.contextmanager
    def _over_ranks(self, share: tf.Tensor, whole: bool, rows: int | None) -> Iterator[None]:
        """Inside, a step's gradients, losses and metrics are this rank's part of the whole mini-batch's."""
        if self._is_local:
            with recorded_assignments() as self._assigned, shared_means(share):
                yield
            return
        with contextlib.ExitStack() as stack:
            assigned = stack.enter_context(recorded_assignments())
            given = self._collective, share, whole, self._statistics(), assigned, self._options
            reduction = Reduction(*given, rows=rows)
            stack.enter_context(reduced_gradients(optimizers_of(self._model), reduction))
            stack.enter_context(shared_means(share))
            if not whole:
                stack.enter_context(exact_losses(reduction))
                stack.enter_context(synchronized_moments(reduction))
            yield
            if self._kind == "train":
                if not reduction.reduced and self._model.trainable_variables:
                    raise ConfigError(
                        f"{type(self._model).__name__}.train_step updated no weights through an optimizer that is an"
                        " attribute of the model, so nothing was reduced over the workers; call self.optimizer.apply,"
                        " or freeze all layers"
                    )
                if self._undo is not None:
                    self._undo.covers_all |= reduction.reduced > 1 or reduction.has_statistics
                    self._undo.assigned_early += reduction.assigned_early
                reduce([], "statistics", reduction)  # what was assigned after the optimizer, or without one

    def _statistics(self) -> list[Any]:
        seeds = [generator.state for generator in seed_generators_of(self._model)]
        counted = [*seeds, *self._metrics.variables]
        return [
            variable
            for variable in self._model.non_trainable_variables
            if tf.as_dtype(variable.dtype).is_floating and all(variable is not other for other in counted)
        ]

    def probe(self, batch: Tree) -> bool:
        """Find out what a step of the model's own returns, and let it build what it builds, by tracing it once.

        The graph is thrown away, and no variable changes; Python in the step runs once more. Keras's own steps need
        none of it. Where steps run eagerly the first one tells.

        Args:
            batch: (x,), (x, y) or (x, y, sample_weight); every leaf is (rows, ...).

        Returns:
            Whether there was anything to find out.
        """
        if self._model.run_eagerly:
            return False

        def trace(*tensors: tf.Tensor) -> None:
            data = keras_batch(_packed(batch, tensors))
            self._first_step(data, tf.constant(1.0, tf.float64), False)

        specs = [tf.TensorSpec([None, *leaf.shape[1:]], leaf.dtype) for _, leaf in leaves(batch)]
        tf.function(trace, autograph=False).get_concrete_function(*specs)
        return True

    def _first_step(self, data: Tree, share: tf.Tensor, whole: bool) -> dict[str, Any]:
        """A step, and find out what it returns: of which metric a value is, tells who made it, or else its name."""
        with recorded_assignments() as assigned, self._metrics.recorded_results() as results:
            logs = self._one_step(data, share, whole)
        self._metrics.take_up()
        by_name = self._metrics.updated(assigned)
        self.returned = {
            name: next((source for found, source in results if found is value), by_name.get(name))
            for name, value in flat_logs(logs).items()
        }
        self._places = places_in(logs)
        for name in self.own_logs:
            shape = tf.convert_to_tensor(flat_logs(logs)[name]).shape
            if shape.rank is not None and shape.num_elements() != 1:
                raise ConfigError(
                    f"{type(self._model).__name__}.{self._kind}_step returned {name!r} of shape {shape}; of what"
                    " is no metric's result only single numbers can be put on record: return its mean, say"
                )
        return logs


def _known(found: tf.TensorShape, declared: Sequence[int | None] | None) -> tuple[int | None, ...]:
    """The shape to trace for: the declared one, where what was found is one of it."""
    return tuple(declared) if declared is not None and found.is_compatible_with(declared) else tuple(found)


def _packed(structure: Tree, tensors: Sequence[tf.Tensor]) -> Tree:
    """Tensors in the order of `leaves` in a structure's places; what is None there stays."""
    left = iter(tensors)
    return map_tree(lambda _: next(left), structure)


def concatenate(parts: Sequence[Sequence[Array]]) -> list[Array]:
    """Join the states of consecutive calls along the steps."""
    return [np.concatenate(group) for group in zip(*parts, strict=True)]
