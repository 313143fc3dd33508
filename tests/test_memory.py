"""The account of storages, on cases that can be counted by hand."""

import torch

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
