"""Forty bad inputs: see `fuzz.py`."""

import os
import subprocess
import sys


def test_bad_inputs_are_answered_in_one_line():
    line = [sys.executable, "-m", "tests.fuzz", "--tries", "40", "--seed", "3"]
    finished = subprocess.run(line, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert finished.returncode == 0, finished.stdout + finished.stderr
