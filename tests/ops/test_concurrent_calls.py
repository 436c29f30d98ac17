"""Concurrent calls of the ops give the bits of calls from one thread."""

import threading

import pytest
import torch

from eaml_ext.ops import PackedKeys, knn, selective_scan


def calls():
    """Return the calls of each thread by name; all threads share the memory."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(6000, 32, generator=generator)
    memory = PackedKeys(6000, 32)
    memory.write(torch.arange(6000), keys)
    u = torch.randn(8, 64, 70, generator=generator)
    A, B = -torch.rand(64, 16, generator=generator), torch.randn(8, 16, 70, generator=generator)

    def gradients():
        a = A.clone().requires_grad_()
        y = selective_scan(u, u.abs(), a, B, B)
        (grad,) = torch.autograd.grad(y.square().mean(), a, create_graph=True)
        return y, grad, *torch.autograd.grad(grad.square().sum(), a)

    return {
        "knn": lambda: knn(keys[:64], keys, 8),
        "one query": lambda: knn(keys[:1], keys, 8),
        "packed": lambda: memory.search(keys[:64], 8),
        "scan": gradients,
    }


@pytest.mark.kernels
def test_concurrent_calls_of_ops_give_bits_of_one_thread():
    todo = calls()
    wanted = {name: call() for name, call in todo.items()}
    failures, start = [], threading.Barrier(8)

    def work(first):
        torch.set_num_threads(2)
        start.wait()
        names = list(todo)
        for i in range(8):
            name = names[(first + i) % len(names)]
            try:
                got = todo[name]()
                if not all(torch.equal(a, b) for a, b in zip(got, wanted[name], strict=True)):
                    failures.append(f"{name} differs")
            except BaseException as error:
                failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not failures and not any(thread.is_alive() for thread in threads), failures
