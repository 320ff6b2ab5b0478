"""Claims about what of the callbacks a checkpoint holds: a fit that goes on decides what it would have decided."""

import json
import random
from collections import OrderedDict, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import ml_dtypes
import numpy as np
import pytest
from models import blobs, make_classifier
from warm import differences

from dtrain.callback_checkpoint import CallbackState, matched, prepare_resume, restore_states, save_states
from dtrain.checkpoint import CheckpointStore, Manifest, load
from dtrain.errors import CheckpointError, ConfigError
from dtrain.state_tree import pack, unpack
from dtrain.types import Position

callbacks = keras.callbacks


def stored(states: list[CallbackState | None], folder: Path) -> list[CallbackState | None]:
    """The states as they come back from a checkpoint."""
    store = CheckpointStore(str(folder))
    staging = store.stage(1)
    files = [
        staging.write_json(
            "callbacks.json", [state and {"kind": state.kind, "values": state.values} for state in states]
        )
    ]
    for index, state in enumerate(states):
        files.append(staging.write_tensors(f"callback-{index}.safetensors", state.arrays if state else {}))
    store.commit(staging, Manifest(step=1, position=Position(0, 0), world_size=1, seed=0, files=tuple(files)))
    loaded = load(store.list()[-1])
    return [
        item and CallbackState(item["kind"], item["values"], loaded.tensors[f"callback-{index}.safetensors"])
        for index, item in enumerate(loaded.state["callbacks.json"])
    ]


# --- trees


class Holds(callbacks.Callback):  # type: ignore[misc]
    """Offers what it holds as its state."""

    def __init__(self, held: Any = None) -> None:
        super().__init__()
        self.held = held

    def get_state(self) -> Any:
        return self.held

    def set_state(self, state: Any) -> None:
        self.held = state


TREES: dict[str, Any] = {
    "nothing": None,
    "words and numbers": ["", "ä\ud800", True, False, 0, -(2**200), 0.1, -0.0, 5e-324, 1.7976931348623157e308],
    "no numbers": [float("nan"), -float("nan"), float("inf"), -float("inf")],
    "tuples": ((), (1, (2.5, [None, ()])), [(1,)]),
    "keys in an order of their own": {"b": 1, "a": {"z": 1, "y": 2}, "": 3},
    "keys like marks": {"$array": "0", "a": {"$tuple": [1]}, "$dict": {}},
    "scalars": [np.float32(0.1), np.float64(0.1), np.float16("nan"), np.int8(-3), np.uint64(2**64 - 1), np.bool_(True)],
    "arrays": {"a": np.arange(6.0).reshape(2, 3).T, "b": np.zeros((0, 2), "int8"), "c": np.array(np.inf, "float32")},
    "small floats": [np.array([1, -0.0, np.nan], ml_dtypes.bfloat16), ml_dtypes.bfloat16(0.3)],
    "complex": np.array([1 + 2j], "complex64"),
    "Python's random numbers": random.Random(3).getstate(),
    "NumPy's random numbers": np.random.default_rng(3).bit_generator.state,
    "NumPy's older ones": np.random.RandomState(3).get_state(legacy=False),
}


def bits(tree: Any) -> Any:
    """All that there is to know of a tree: types, order, dtypes, shapes and bytes."""
    if isinstance(tree, (np.ndarray, np.generic)):
        return type(tree), tree.dtype, tree.shape, tree.tobytes()
    if isinstance(tree, dict):
        return dict, [(key, bits(value)) for key, value in tree.items()]
    if isinstance(tree, (list, tuple)):
        return type(tree), [bits(item) for item in tree]
    return type(tree), np.float64(tree).tobytes() if isinstance(tree, float) else tree


@pytest.mark.parametrize("name", TREES)
def test_a_state_comes_back_to_the_last_bit(name: str, tmp_path: Path) -> None:
    saved = stored(save_states([Holds(TREES[name]), Holds(0)]), tmp_path)
    holds = [Holds(), Holds()]
    for callback in holds:
        callback.set_model(keras.Sequential())
    restore_states(holds, saved)
    assert bits(holds[0].held) == bits(TREES[name]) and holds[1].held == 0


@pytest.mark.parametrize("name", TREES)
def test_values_are_strict_json(name: str) -> None:
    arrays: dict[str, Any] = {}
    json.dumps(pack(TREES[name], "it", arrays), allow_nan=False)


def test_arrays_are_copied_on_both_ways() -> None:
    array, arrays = np.zeros(2), {}
    values = pack([array], "it", arrays)
    array += 1
    arrays["0"].flags.writeable = False
    (found,) = unpack(values, arrays)
    found += 2
    assert found.tolist() == [2, 2] and arrays["0"].tolist() == [0, 0]


REFUSED: dict[str, tuple[Any, str]] = {
    "a set": (
        {"seen": {1, 2}},
        r"callbacks\[0\]=Holds\.get_state\(\)\['seen'\] is of type set: .*get_state.*set_state",
    ),
    "an object in a list": ([0, (1, object())], r"get_state\(\)\[1\]\[1\] is of type object"),
    "a key that is no text": ({"a": {3: "x"}}, r"\['a'\] has the key 3 of type int: keys must be str"),
    "a dict of another kind": (OrderedDict(a=1), "is of type OrderedDict"),
    "a deque": (deque([1]), "is of type deque"),
    "bytes": (b"1", "is of type bytes"),
    "a complex number": (1j, "is of type complex"),
    "objects in an array": (np.array([None]), r"get_state\(\) has dtype object: it must be one of .*float32"),
    "an array of texts": (np.array(["a"]), "has dtype <U1"),
    "wide complex numbers": (np.complex128(1), "has dtype complex128"),
    "an array of another kind": (np.ma.masked_array([1.0], [True]), "is of type MaskedArray"),
    "a generator": (np.random.default_rng(1), "is of type Generator"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_stored_is_named_with_its_place_and_what_to_do(name: str) -> None:
    state, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message):
        save_states([Holds(state)])


@pytest.mark.parametrize("values", [{"$array": "7"}, {"$scalar": []}, {"$float": "0"}, {"$float": 3}, {"$dict": [[1]]}])
def test_what_was_not_packed_is_refused(values: Any) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        unpack(values, {})


# --- which callbacks


class Patient(callbacks.EarlyStopping):  # type: ignore[misc]
    pass


class Counts(callbacks.EarlyStopping):  # type: ignore[misc]
    """A subclass with a state of its own."""

    epochs = 0

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        super().on_epoch_end(epoch, logs)
        self.epochs += 1

    def get_state(self) -> Any:
        return {"epochs": self.epochs}

    def set_state(self, state: Any) -> None:
        self.epochs = state["epochs"]


STATELESS: list[Callable[[], Any]] = [
    lambda: callbacks.LearningRateScheduler(lambda epoch: 0.1),
    callbacks.TerminateOnNaN,
    callbacks.LambdaCallback,
    callbacks.RemoteMonitor,
    callbacks.Callback,
]


def test_callbacks_without_a_state_have_none() -> None:
    without = [make() for make in STATELESS]
    states = save_states(without)
    assert states == [None] * len(STATELESS)
    restore_states(without, states)


def test_a_state_names_its_class() -> None:
    given = [callbacks.EarlyStopping(), Patient(), Holds(), callbacks.ModelCheckpoint("a.keras")]
    kinds = [state.kind for state in save_states(given) if state]
    assert kinds == ["keras.callbacks.EarlyStopping", "Patient", "Holds", "keras.callbacks.ModelCheckpoint"]


class Keeps(callbacks.Callback):  # type: ignore[misc]
    def get_state(self) -> Any:
        return []


class Remembers(callbacks.EarlyStopping):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[float] = []


def renamed(kind: type, name: str) -> Any:
    return type(name, (kind,), {})()


def test_states_find_their_callbacks_in_any_order_and_what_is_left_is_told() -> None:
    saved = [callbacks.EarlyStopping(), Holds(1), Holds(2), renamed(callbacks.EarlyStopping, "A"), callbacks.Callback()]
    states = save_states(saved)
    given = [
        Holds(0),
        callbacks.ReduceLROnPlateau(),
        callbacks.EarlyStopping(),
        Holds(0),
        renamed(Counts, "A"),
        Keeps(),
    ]
    assert matched([Remembers()], save_states([Remembers()]))[1] == [
        "Remembers goes on as its Keras class does; for what it keeps itself it offers no get_state"
    ]
    found, notes = matched(given, states)
    assert found == [states[1], None, states[0], states[2], None, None]
    assert notes == [
        "keras.callbacks.ReduceLROnPlateau begins anew: no state of it was saved",
        "A begins anew: no state of it was saved",  # which offers more now
        "Keeps begins anew: it offers no get_state and set_state",
        "the state of a A was saved, which is no callback of this fit",
    ]


def test_a_callback_that_does_not_run_on_this_rank_is_left_alone() -> None:
    (state,) = save_states([Holds(1)])
    elsewhere, here = Holds(0), Holds(0)
    here.set_model(keras.Sequential())
    restore_states([elsewhere, here], [state, state])
    assert (elsewhere.held, here.held) == (0, 1)


def test_a_callback_that_keeps_its_model_elsewhere_gets_its_state() -> None:
    class Elsewhere(Holds):
        def set_model(self, model: Any) -> None:
            self.mine = model

    states = save_states([Elsewhere(1)])
    found = Elsewhere(0)
    found.set_model(keras.Sequential())
    restore_states([found], states)
    assert found.held == 1


# --- files

HEAD = "epoch,loss,val_loss\r\n"


@pytest.mark.parametrize(
    ("at_checkpoint", "killed_with", "resumed_from"),
    [
        (HEAD + "0,1,2\r\n", "1,1,2\r\n2,1,2\r\n", HEAD + "0,1,2\r\n"),
        (HEAD + "0,1,2\r\n", "1,1,", HEAD + "0,1,2\r\n"),
        (HEAD + "0,1,2\r\n", "", HEAD + "0,1,2\r\n"),
        ("", HEAD + "0,1,2\r\n", ""),
        (HEAD + "0,1,2\r\n1,1,2\r\n", "0,1,2\r\n", HEAD + "0,1,2\r\n1,1,2\r\n"),
        ('epoch;a\r\n0;"[1, 2]"\r\n', "1;2\r\n", 'epoch;a\r\n0;"[1, 2]"\r\n'),
    ],
    ids=["rows", "half a row", "nothing new", "the first rows", "an earlier fit's rows stay", "another separator"],
)
def test_rows_that_will_be_written_again_are_cut(
    tmp_path: Path, at_checkpoint: str, killed_with: str, resumed_from: str
) -> None:
    path = tmp_path / "log.csv"
    path.write_text(at_checkpoint, newline="")
    states = save_states([callbacks.CSVLogger(path)])
    path.write_text(at_checkpoint + killed_with, newline="")
    again = callbacks.CSVLogger(path)
    prepare_resume([again], states)
    assert again.append and path.read_bytes().decode() == resumed_from


@pytest.mark.parametrize("found", [None, "", HEAD, HEAD + "0,10000,20000\r\n1,1,1\r\n"])
def test_another_file_than_the_one_that_was_written_is_left_as_it_is(tmp_path: Path, found: str | None) -> None:
    path = tmp_path / "log.csv"
    path.write_text(HEAD + "0,1,2\r\n1,1,2\r\n", newline="")
    states = save_states([callbacks.CSVLogger(path)])
    path.unlink() if found is None else path.write_text(found, newline="")
    prepare_resume([callbacks.CSVLogger(path)], states)
    assert (path.read_bytes().decode() if path.exists() else None) == found


def test_a_logger_of_the_user_appends_afterwards_only_if_it_was_made_to(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    loggers = [callbacks.CSVLogger(path), callbacks.CSVLogger(path, append=True)]
    states = save_states(loggers)
    prepare_resume(loggers, states)
    for logger in loggers:
        logger.set_model(keras.Sequential())
        logger.on_train_begin()
    restore_states(loggers, states)
    assert [logger.append for logger in loggers] == [False, True]


def test_a_log_that_is_on_no_local_disk_is_appended_to() -> None:
    logger = callbacks.CSVLogger("memory://somewhere/log.csv")
    prepare_resume([logger], save_states([logger]))
    assert logger.append


# --- a fit that is cut in two


class Snapshots(callbacks.Callback):  # type: ignore[misc]
    """Takes a snapshot of model, optimizer and callbacks after an epoch, or after a batch of it."""

    def __init__(self, folder: Path, others: list[Any], epoch: int) -> None:
        super().__init__()
        self.folder, self.others, self.epoch = folder, others, epoch

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if epoch == self.epoch:
            self.states = stored(save_states(self.others), self.folder / "checkpoints")
            self.variables = [v.numpy() for v in variables_of(self.model)]


class Resumes(callbacks.Callback):  # type: ignore[misc]
    """Restores what was saved when all others have begun."""

    def __init__(self, others: list[Any], saved: Snapshots) -> None:
        super().__init__()
        self.others, self.saved = others, saved

    def on_train_begin(self, logs: Any = None) -> None:
        for variable, value in zip(variables_of(self.model), self.saved.variables, strict=True):
            variable.assign(value)
        restore_states(self.others, self.saved.states)


def variables_of(model: keras.Model) -> list[Any]:
    return [*model.weights, *model.optimizer.variables]


def built() -> keras.Model:
    model = make_classifier()
    model.optimizer.build(model.trainable_variables)
    return model


def deciding() -> list[Any]:
    """Callbacks all of which decide something in the sixteen epochs, some of it before epoch 5 and some after."""
    return [
        Scores(),
        callbacks.ReduceLROnPlateau("val_score", 0.5, patience=2, mode="max", cooldown=1),
        callbacks.ModelCheckpoint("best.keras", "val_score", save_best_only=True, mode="max"),
        callbacks.ModelCheckpoint("{epoch}-{batch}.weights.h5", "loss", save_freq=7, save_weights_only=True),
        callbacks.ModelCheckpoint("{epoch}-{batch}.keras", "loss", save_best_only=True, save_freq=4),
        callbacks.CSVLogger("log.csv"),
        callbacks.History(),
        Counts("val_score", patience=20, mode="max"),
        callbacks.EarlyStopping("val_score", patience=8, mode="max", restore_best_weights=True),
    ]


class Scores(callbacks.Callback):  # type: ignore[misc]
    """A score that goes up and down, in the logs as a float32 scalar."""

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        logs["val_score"] = np.float32([0.1, 0.2, 0.7, 0.4, 0.5, 0.6, 0.5, 0.3, 0.2, 0.6, 0.1, 0.1][epoch % 12])


KEPT = {
    *("wait", "stopped_epoch", "best", "best_epoch", "best_weights", "cooldown_counter", "epochs", "min_delta"),
    *("_batches_seen_since_last_saving", "_last_batch_seen", "_current_epoch", "history", "epoch", "keys", "append"),
}


def kept_by(found: list[Any]) -> list[dict[str, Any]]:
    return [{key: value for key, value in sorted(vars(c).items()) if key in KEPT} for c in found]


def fit(model: keras.Model, found: list[Any], validation_freq: int, **place: int) -> None:
    x, y = blobs(24)
    model.fit(
        x,
        y,
        8,
        verbose=0,
        shuffle=False,
        callbacks=found,
        validation_data=(x, y),
        validation_freq=validation_freq,
        **place,
    )


@pytest.mark.parametrize("validation_freq", [1, 3])
def test_a_fit_that_was_cut_in_two_decides_and_writes_what_the_whole_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, validation_freq: int
) -> None:
    whole, first, second = (tmp_path / name for name in ("whole", "first", "second"))
    for folder in (whole, first, second):
        folder.mkdir()
    monkeypatch.chdir(whole)
    straight, theirs = built(), deciding()
    fit(straight, theirs, validation_freq, epochs=16)
    assert theirs[-1].stopped_epoch == 10  # or there was nothing to decide

    cut = tmp_path / "cut"
    cut.mkdir()
    monkeypatch.chdir(cut)
    killed = deciding()
    saves = Snapshots(tmp_path, killed, epoch=4)
    fit(built(), [*killed, saves], validation_freq, epochs=7)  # two epochs more than the checkpoint knows
    resumed, ours = built(), deciding()
    prepare_resume(ours, saves.states)
    fit(resumed, [*ours, Resumes(ours, saves)], validation_freq, initial_epoch=5, epochs=16)

    assert differences(kept_by(ours), kept_by(theirs), 0) == []
    assert differences([v.numpy() for v in variables_of(resumed)], [v.numpy() for v in variables_of(straight)], 0) == []
    assert Path("log.csv").read_bytes() == (whole / "log.csv").read_bytes()
    assert sorted(path.name for path in cut.iterdir()) == sorted(path.name for path in whole.iterdir())
    best = [keras.models.load_model(folder / "best.keras").get_weights() for folder in (cut, whole)]
    assert differences(*best, 0) == []
