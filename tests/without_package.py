"""A process in which neither our package nor the folder it lies in can be imported."""

import os
import subprocess
import sys
from pathlib import Path


PRELUDE = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in str(finder).lower()]
try:
    import modeling_dino
    sys.exit("the package can be imported")
except ImportError:
    pass
"""


def run_without_package(code: str, folder: Path, *argv, **environment: str) -> None:
    """Runs `code` in `folder`, with `argv`; its modules come from the Hub's cache in that folder."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    finished = subprocess.run(
        [sys.executable, "-I", "-c", PRELUDE + code, *map(str, argv)],
        cwd=folder, capture_output=True, text=True, env=inherited | {"HF_HOME": str(folder / "home")} | environment,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
