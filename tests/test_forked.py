"""A fork of a process whose threads have run says what to do instead of waiting for ever."""

import os
import subprocess
import sys

import pytest

CODE = """
import multiprocessing, sys, torch, coupfast
sys.path.insert(0, {tests!r})
from conftest import relu_classifier, small_score
torch.set_num_threads(2)
purifier = coupfast.Purifier(small_score(torch.float32), relu_classifier(torch.float32), num_steps=2)
x = torch.rand(4, 3, 8, 8)
here = purifier(x, seed=0)

def child(queue, threads):
    torch.set_num_threads(threads)
    try:
        queue.put(bool(torch.allclose(purifier(x, seed=0), here, atol=1e-5)))
    except RuntimeError as error:
        queue.put(str(error))

context = multiprocessing.get_context("fork")
for threads in (2, 1):
    queue = context.Queue()
    process = context.Process(target=child, args=(queue, threads))
    process.start()
    print(queue.get(timeout=100))
    process.join()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_fork_says_what_to_do():
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    code = CODE.format(tests=os.path.dirname(__file__))
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    several, one = done.stdout.strip().splitlines()
    assert "'spawn' or 'forkserver'" in several
    assert one == "True"
