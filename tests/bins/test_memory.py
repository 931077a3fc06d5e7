"""What the bins cost in memory, measured from outside: in a process of its own, so nothing that ran before counts."""

from pathlib import Path

import pytest

from tests import warm_processes

# the greatest private memory while the bins are made, above what was there before
SCRIPT = """
import sys, threading, time
import numpy as np, torch
from dq_lightning.bins.make import make_bins
torch.set_num_threads(1)

def private():
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024

total, width = int(sys.argv[1]), int(sys.argv[2])
generator = np.random.default_rng(0)
values = (generator.standard_normal((total, width), dtype=np.float32) + 0.3)
make_bins(values[:3000])
before, peak, done = private(), [0], threading.Event()

def watch():
    while not done.wait(0.003):
        peak[0] = max(peak[0], private())

thread = threading.Thread(target=watch)
thread.start()
make_bins(values)
done.set()
thread.join()
print(peak[0] - before, values.nbytes)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc to measure memory with")
def test_memory_is_of_the_order_of_the_features(tmp_path):
    total, width = 17_000, 384
    (tmp_path / "script.py").write_text(SCRIPT)
    result = warm_processes.run([tmp_path / "script.py", total, width], warm_processes.environment())
    assert result.returncode == 0, result.stderr
    extra, features = map(int, result.stdout.split()[-2:])
    # a matrix of similarities would take 2.3 GB; the peak is short, and was seen at 4.4 to 7 times the features, of which
    # a copy in float64 is twice
    assert 8 * total * total > 75 * features
    assert 0 < extra < 9 * features
