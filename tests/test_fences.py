"""Claims about who imports whom, read from the source without importing it.

A room imports rooms of its own storey or below. An outside library is imported by its owners alone.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "dtrain"

STOREYS = {
    "words": "config types errors faults",
    "leaves": "model keras_internals data data.source data.sampler data.loader collective rendezvous storage"
    " lease checkpoint runs tracking journal mlflow_run progress plots description history setup"
    " driver_tensorflow horovod_build _horovod_cmake data.blocks data.files data.columns"
    " data.parquet_files data.checks data.tf_records data.ray_blocks callback_state schedules data.given data.stream"
    " state_tree wire callback_checkpoint interrupts fit_state slim_keras hardware",
    "one rank": "replica rank_fit under_way rank_state batch_hooks undo struck_collective feeds step optimizer losses"
    " metrics batch_norm lookups callbacks accumulation local_sgd",
    "many": "worker_group rooms spares newcomers outcomes worker telemetry cluster lost_nodes",
    "decisions": "controller regrouping findings checkpointer recoveries heartbeat policy",
    "faces": "trainer weights fit_run resume arguments named cli doctor testing",
}
"""From the ground up. `dtrain` itself only says where names are, and stands above all."""

OWNERS = {
    "ray": "cluster worker_group rooms spares newcomers outcomes worker telemetry lost_nodes data.ray_*",
    "tensorflow": "driver_tensorflow replica undo struck_collective feeds step optimizer losses metrics batch_norm"
    " lookups collective setup accumulation local_sgd wire data.tf_*",
    "keras": "model keras_internals replica rank_fit undo rank_state step optimizer losses metrics batch_norm callbacks"
    " setup schedules accumulation local_sgd",
    "keras.src": "keras_internals",
    "horovod": "collective doctor",
    "mlflow": "mlflow_run",
    "fsspec": "storage checkpoint runs data.files",
    "pyarrow": "data.columns data.parquet_files",
    "rich": "progress doctor cli",
    "typer": "cli",
    "matplotlib": "plots",
}

COLLECTIVES = {"init", "shutdown", "grouped_allreduce", "allreduce", "allgather", "alltoall", "broadcast", "Sum"}
"""All that may be used of Horovod."""

FREE = {"numpy", "ml_dtypes", "cloudpickle", "psutil"}
"""Small libraries that any room may use."""

HEIGHTS = {room: height for height, rooms in enumerate(STOREYS.values()) for room in rooms.split()}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: room_of(path))
def test_a_room_imports_no_higher_storey(path: Path) -> None:
    room = room_of(path)
    assert room in HEIGHTS, f"{room} has no storey: give it one in design and here"
    ours = imports_of(path) - {"dtrain.__version__"}
    rooms = [_room_in(name.removeprefix("dtrain.")) for name in ours if name.startswith("dtrain.")]
    too_high = [other for other in rooms if HEIGHTS[other] > HEIGHTS[room]]
    assert too_high == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: room_of(path))
def test_a_library_is_imported_by_its_owners_alone(path: Path) -> None:
    room = room_of(path)
    strangers = []
    for name in imports_of(path):
        top = name.split(".")[0]
        if top == "dtrain" or top in sys.stdlib_module_names or top in FREE:
            continue
        assert top in OWNERS, f"{room} imports {name}, which has no owner: give it one"
        strangers += [name for library, owners in OWNERS.items() if _is_in(name, library) and not _owns(room, owners)]
    assert strangers == []


def test_the_package_itself_imports_nothing_when_it_is_imported() -> None:
    tops = {name.split(".")[0] for name in imports_of(PACKAGE / "__init__.py")}
    assert tops <= sys.stdlib_module_names


def test_of_horovod_only_the_collectives_are_used() -> None:
    """Its elastic, object and HTTP parts unpickle what the network sends: see SECURITY.md."""
    path = PACKAGE / "collective.py"
    assert {name for name in imports_of(path) if _is_in(name, "horovod")} == {"horovod.tensorflow"}
    attributes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)]
    used = {node.attr for node in attributes if ast.unparse(node.value) in ("hvd", "self._hvd")}
    assert used and used <= COLLECTIVES


def test_the_reader_sees_what_python_would_import(tmp_path: Path) -> None:
    source = tmp_path / "room.py"
    source.write_text(
        "import a.b as c\n"
        "from d import e\n"
        "from dtrain import trainer\n"
        "if TYPE_CHECKING:\n    import f\nelse:\n    import g\n"
        "def lazy():\n    from h.i import j\n    if typing.TYPE_CHECKING:\n        import k\n"
        "class K:\n    try:\n        import l\n    except ImportError:\n        pass\n"
    )
    assert sorted(imports_of(source)) == ["a.b", "d", "dtrain.trainer", "g", "h.i", "l"]


def room_of(path: Path) -> str:
    """data/source.py is data.source."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def imports_of(path: Path) -> set[str]:
    """The modules that a file imports anywhere, at its top or later; those for type checkers alone do not count."""
    return {name for node in _running(ast.parse(path.read_text())) for name in _names(node)}


def _running(node: ast.AST) -> Iterator[ast.AST]:
    yield node
    if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
        children: list[ast.AST] = list(node.orelse)
    else:
        children = list(ast.iter_child_nodes(node))
    for child in children:
        yield from _running(child)


def _names(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are absolute here"
        # `from dtrain import cluster` imports a room.
        return [f"dtrain.{alias.name}" for alias in node.names] if node.module == "dtrain" else [node.module or ""]
    return []


def _room_in(name: str) -> str:
    """The room that a dotted name below dtrain is, or is in."""
    return name if name in HEIGHTS else name.rpartition(".")[0]


def _is_in(name: str, library: str) -> bool:
    return name == library or name.startswith(f"{library}.")


def _owns(room: str, owners: str) -> bool:
    return any(room.startswith(owner[:-1]) if owner.endswith("*") else room == owner for owner in owners.split())
