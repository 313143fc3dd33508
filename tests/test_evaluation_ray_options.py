"""What Ray is asked for, seen by a stand-in: needs neither Ray nor GPUs."""

import sys
import types

import pytest

from coupfast.evaluation.cluster import RayWorkers
from coupfast.evaluation.ledger import Outcome
from coupfast.evaluation.pools import ATTEMPTS, UnitFailed
from coupfast.evaluation.units import Unit
from coupfast.evaluation.worker import Task


class Actor:
    """What `ray.remote` makes of a class, once made: takes tasks, and is alive until it is killed."""

    def __init__(self, ray, device):
        ray.devices.append(device)
        ray.actors.append(self)
        self.execute = types.SimpleNamespace(remote=lambda task: ray.call("submit") or object())


@pytest.fixture
def ray(monkeypatch):
    """A Ray that has 4 CPUs and 2 GPUs, and notes what actors are asked for and where they are told to work.

    Attributes:
        answers: What the next tasks give, in order; errors are raised.
        gone: Functions of Ray that from now on raise this error instead.
    """
    module = types.ModuleType("ray")
    module.asked, module.devices, module.actors, module.answers, module.gone = [], [], [], [], {}

    def call(function):
        if function in module.gone:
            raise module.gone[function]

    def remote(**options):
        module.asked.append(options)
        return lambda actor: types.SimpleNamespace(remote=lambda make, device: call("create") or Actor(module, device))

    def wait(references, *, num_returns, timeout):
        call("wait")
        return references[:num_returns], references[num_returns:]

    def get(reference):
        answer = module.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def kill(actor):
        call("kill")
        module.actors.remove(actor)

    # As Ray 2.60 has them: only the death of an actor is a RayActorError.
    error = type("RayError", (Exception,), {})
    module.exceptions = types.SimpleNamespace(RayError=error)
    for name in ("RayActorError", "OutOfMemoryError", "ObjectLostError", "NodeDiedError", "WorkerCrashedError"):
        setattr(module.exceptions, name, type(name, (error,), {}))
    module.exceptions.ActorDiedError = type("ActorDiedError", (module.exceptions.RayActorError,), {})
    module.exceptions.OwnerDiedError = type("OwnerDiedError", (module.exceptions.ObjectLostError,), {})
    module.is_initialized = lambda: True
    module.cluster_resources = lambda: {"CPU": 4.0, "GPU": 2.0}
    module.remote, module.wait, module.get, module.kill, module.call = remote, wait, get, kill, call
    monkeypatch.setitem(sys.modules, "ray", module)
    return module


def pass_on(name, images):
    pytest.fail("nobody has said anything")


TASK = Task(Unit("clean", 0, (0,)), {})
OUTCOME = Outcome(TASK.unit.name, {}, {}, 1, 0, 0.1)
LOST = ("ActorDiedError", "OutOfMemoryError", "ObjectLostError", "OwnerDiedError", "NodeDiedError", "WorkerCrashedError")


@pytest.mark.parametrize("name", LOST)
def test_a_worker_is_replaced_whatever_took_it_or_its_answer(ray, name, caplog):
    pool = RayWorkers(None, 2, gpus=False, threads=2)
    first = list(ray.actors)
    ray.answers += [getattr(ray.exceptions, name)("gone"), OUTCOME]
    pool.submit(TASK)
    assert pool.next(pass_on) == (OUTCOME, "1")
    assert f"worker 1 died ({name}); doing unit clean-00000 again" in caplog.text
    # Two places, two actors: one that lost no more than an answer has made room.
    assert len(ray.actors) == 2 and first[0] in ray.actors and first[1] not in ray.actors
    pool.close()
    assert ray.actors == []


@pytest.mark.parametrize("name", LOST)
def test_a_unit_that_takes_all_its_workers_with_it_is_named(ray, name):
    pool = RayWorkers(None, 2, gpus=False, threads=2)
    ray.answers += [getattr(ray.exceptions, name)("no memory")] * ATTEMPTS
    pool.submit(TASK)
    with pytest.raises(UnitFailed, match=f"the worker of unit clean-00000 died {ATTEMPTS} times: no memory") as failure:
        pool.next(pass_on)
    assert failure.value.name == "clean-00000"
    pool.close()
    assert ray.actors == []


@pytest.mark.parametrize("function", ["submit", "create", "wait"])
def test_ray_itself_is_gone(ray, function):
    pool = RayWorkers(None, 2, gpus=False, threads=2)
    pool.submit(TASK)
    ray.answers.append(ray.exceptions.NodeDiedError("the node"))
    ray.gone = {function: ConnectionError("no answer from 10.0.0.1"), "kill": ConnectionError("no answer")}
    message = r"unit clean-00000 failed: Ray does not .*\(ConnectionError: no answer from 10.0.0.1\); has it stopped\?"
    with pytest.raises(UnitFailed, match=message):
        pool.next(pass_on)
    if function == "submit":
        with pytest.raises(UnitFailed, match=message):
            pool.submit(TASK)
    pool.close()


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
