"""One Ray and one set of plain processes for the whole session: starting them is what costs."""

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")  # the session's Ray runs workers in this environment

import pytest
from ranks import Ranks


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What starts Ray, ranks or whole programs is slow: `make test-fast` leaves it out."""
    slow = {"local_ray", "ranks", "environment"}
    programs = {"test_cli.py", "test_examples.py", "test_cluster_local.py", "test_horovod_build.py", "test_mlflow.py"}
    for item in items:
        if slow & set(getattr(item, "fixturenames", ())) or item.path.name in programs:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Plain processes that play up to 3 ranks."""
    pool = Ranks(3)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """A local Ray with room for more workers than this machine has cores; Trainers use it as they find it."""
    import logging

    import ray

    ray.init(address="local", num_cpus=8, namespace="dtrain", log_to_driver=False, logging_level=logging.WARNING)
    yield
    ray.shutdown()


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run in an empty folder, so that ./dtrain_runs and ./mlflow.db are the test's own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
