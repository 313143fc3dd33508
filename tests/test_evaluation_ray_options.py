"""What Ray is asked for, seen by a stand-in: needs neither Ray nor GPUs."""

import sys
import types

import pytest

from coupfast.evaluation.cluster import RayWorkers


@pytest.fixture
def ray(monkeypatch):
    """A Ray that has 4 CPUs and 2 GPUs, and notes what actors are asked for and where they are told to work."""
    module = types.ModuleType("ray")
    module.asked, module.devices = [], []

    def remote(**options):
        module.asked.append(options)
        return lambda actor: types.SimpleNamespace(remote=lambda make, device: module.devices.append(device))

    module.is_initialized = lambda: True
    module.cluster_resources = lambda: {"CPU": 4.0, "GPU": 2.0}
    module.kill = lambda actor: None
    module.remote = remote
    monkeypatch.setitem(sys.modules, "ray", module)
    return module


@pytest.mark.parametrize("gpus, devices", [(True, ["cuda:0"] * 2), (False, ["cpu"] * 2)])
def test_an_actor_asks_for_its_threads_and_for_one_gpu(ray, gpus, devices):
    RayWorkers(None, 2, gpus=gpus, threads=2).close()
    (asked,) = ray.asked
    assert (asked["num_cpus"], asked["num_gpus"]) == (2, int(gpus))
    # Ray shows an actor its own GPU as the first one.
    assert ray.devices == devices


def test_a_cluster_that_is_too_small_is_refused(ray):
    with pytest.raises(ValueError, match="3 workers need 6 CPUs, 3 GPUs, and the Ray cluster has 4, 2; use fewer --workers"):
        RayWorkers(None, 3, gpus=True, threads=2)
    with pytest.raises(ValueError, match="3 workers need 3 GPUs, and the Ray cluster has 2"):
        RayWorkers(None, 3, gpus=True, threads=1)
    assert ray.devices == []
