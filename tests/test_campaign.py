"""Twenty tries of the campaign of faults: see `campaign.py`."""

import os
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_campaign_of_faults_finds_no_problem():
    line = [sys.executable, "-m", "tests.campaign", "--forked", "--tries", "20", "--seed", "17"]
    finished = subprocess.run(line, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert finished.returncode == 0, finished.stdout + finished.stderr
