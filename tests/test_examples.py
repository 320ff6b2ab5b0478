"""Claims about the examples: each runs as it stands, in an empty folder."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_the_quickstart_is_short() -> None:
    text = (EXAMPLES / "quickstart.py").read_text()
    assert len(text.splitlines()) < 40 and ast.parse(text)


def test_the_quickstart_trains_evaluates_and_predicts_on_two_workers(tmp_path: Path) -> None:
    printed = run(EXAMPLES / "quickstart.py", tmp_path)
    assert "Epoch 5/5 - 32/32" in printed
    assert printed.splitlines()[-1].endswith("predictions (100, 10)")
    (folder,) = (tmp_path / "dtrain_runs").iterdir()
    assert (folder / "training_curves.png").is_file() and (tmp_path / "mlflow.db").is_file()


def test_the_quickstart_with_its_one_line_changed_back_is_plain_keras(tmp_path: Path) -> None:
    lines = (EXAMPLES / "quickstart.py").read_text().splitlines()
    (marked,) = [line for line in lines if "# plain Keras: " in line]
    ours, plain = marked.strip().split("  # plain Keras: ")
    assert ours == "model = dtrain.Trainer(make_model, num_workers=2)" and plain == "model = make_model()"
    script = tmp_path / "plain.py"
    script.write_text("\n".join(lines).replace(marked.strip(), plain).replace("import dtrain\n", ""))
    assert run(script, tmp_path).splitlines()[-1].endswith("predictions (100, 10)")
    assert not (tmp_path / "dtrain_runs").exists()


def run(script: Path, folder: Path) -> str:
    """What a script prints that is run in `folder`, as a user without a cluster would run it."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_TRACKING"))
    }
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    if done.returncode:
        pytest.fail(f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done.stdout
