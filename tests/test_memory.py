"""The account of storages, on cases that can be counted by hand."""

import os
import subprocess
import sys

import pytest
import torch

from coupfast.engine import memory
from coupfast.engine.memory import AllocationAccount, available_bytes

KIB = 1024


def test_counts_what_lives_at_once():
    x = torch.zeros(256)  # 1 KiB
    with AllocationAccount([x]) as account:
        a = x + 1
        b = a * 2
        del a
        c = b.view(16, 16)  # a view is no new storage
        x.view(2, 128)
        assert account.live == KIB
        d = c + 1
    assert account.peak == 2 * KIB
    assert account.live == 2 * KIB
    del b, c, d
    assert account.live == 0


def test_sees_what_autograd_keeps():
    x = torch.zeros(256, requires_grad=True)
    with AllocationAccount([x]) as account:
        y = x.exp().exp()  # both results are needed again
        z = y.sum()
        del y
        assert account.live == 2 * KIB + 4
        z.backward()
        del z
    assert account.live == KIB  # the gradient
    del x


def test_a_new_storage_at_an_old_address_is_counted():
    with AllocationAccount() as account:
        for _ in range(50):
            x = torch.zeros(256)
            assert account.live == KIB
            del x
            assert account.live == 0
    assert account.peak == KIB


def test_available_memory_is_some_and_not_more_than_there_is():
    assert 2**20 < available_bytes(torch.device("cpu")) < 2**50


def test_processes_share_the_hosts_memory(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda: 1200)
    monkeypatch.setattr(memory, "_sharers", 1)
    assert available_bytes(torch.device("cpu")) == 1200
    memory.share_memory(3)
    assert available_bytes(torch.device("cpu")) == 400


def test_memory_that_the_allocator_holds_unused_is_available(monkeypatch):
    """Otherwise earlier work would change later plans, and with them how a batch is split."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 500)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 200)
    assert available_bytes(torch.device("cuda", 1)) == 400


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems have no /proc/self/status")
@pytest.mark.parametrize("engine", ["eager", "cpu"])
def test_resident_memory_of_a_large_case(engine):
    """What the operating system gives to a process of its own, beside the plan: some hundred MiB of kept activations."""
    code = """
import sys, torch, coupfast
torch.set_num_threads(1)
score, classifier = coupfast.load_score("cifar10-tiny"), coupfast.load_classifier("cifar10-tiny")
purifier = coupfast.Purifier(score, classifier, num_steps=3, memory_budget=2**40, engine=sys.argv[1])
noise, x = torch.zeros(3, 12, 3, 32, 32), torch.rand(12, 3, 32, 32)
purifier(x[:1].clone().requires_grad_(), noise=noise[:, :1]).sum().backward()  # code and libraries
def peak():  # not getrusage: a program's ru_maxrss begins with that of the process that started it
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM"))
before = peak()
purifier(x.requires_grad_(), noise=noise).sum().backward()
plan = purifier.plan(12)
print(plan.peak_bytes + plan.weights_bytes - purifier.plan(1).weights_bytes, peak() - before)
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code, engine], env=environment, capture_output=True, text=True, check=True)
    predicted, measured = map(int, done.stdout.split())
    # The first image's memory is used again, as are its weights on the cpu engine; the libraries' own buffers come on top.
    assert measured == pytest.approx(predicted, rel=0.2)
