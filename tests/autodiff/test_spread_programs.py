"""Federated programs on several processes: the bits of one, and an end for all where one fails."""

import multiprocessing
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from lightning_fedhaw import autodiff as ad
from lightning_fedhaw.ranks import Ranks

MODES = ("forward", "reverse", "mixed")


def values(clients, mode):
    """A program of three rounds with server weights, and what it and its derivative are."""
    generator = torch.Generator().manual_seed(0)
    targets = [torch.randn(5, generator=generator) * 10**client for client in range(len(clients))]
    data = ad.place(dict(enumerate(targets)), clients)

    def local(model, rate, target):
        (slope,) = ad.gradient(lambda w: ((w - target) ** 2).sum() / (1 + target.square().sum()), model)
        return {"step": rate * slope, "here": torch.tensor(True), "zero": -torch.zeros(2)}

    def round_(model, hyper, round_idx):
        sent = ad.map_clients(local, ad.broadcast(model, clients), ad.broadcast(hyper["rate"], clients), data)
        step = ad.weighted_sum(sent, torch.softmax(hyper["mix"], 0))
        sums = ad.sum(sent)
        return model - step["step"] - hyper["rate"] * sums["step"] / sums["here"] + sums["zero"].sum()

    def program(hyper):
        model = ad.unroll(round_, torch.ones(5), hyper, 3, checkpointed=True)
        answers = ad.map_clients(lambda w, t: ((w - t) ** 2).mean(), ad.broadcast(model, clients), data)
        return ad.mean(answers, weights=[1.0] + [0.1] * (len(clients) - 1))

    hyper = {"rate": torch.tensor(0.3), "mix": torch.linspace(0, 1, len(clients))}
    found = ad.value_and_grad(program, "hyper", mode)(hyper)
    traffic = (found.traffic.down, found.traffic.up, found.traffic.rounds)
    zeros = ad.sum(ad.place([-torch.zeros(2)] * len(clients), clients))
    tensors = [found.value, found.gradient["rate"], found.gradient["mix"], zeros]
    return [tensor.numpy().tobytes() for tensor in tensors], [tensor.tolist() for tensor in tensors], traffic


def all_values(clients):
    return {mode: values(clients, mode) for mode in MODES}


def failing(clients, mode, place):
    """A program that fails for client 1 or, by shapes that differ, for all clients of process 1."""
    data = ad.place(list(clients.ids), clients)

    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(value):
            return value.clone()

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def backward(ctx, gradient):
            raise ArithmeticError("client 1 is broken")

        @staticmethod
        def jvp(ctx, tangent):
            raise ArithmeticError("client 1 is broken")

    def local(x, client):
        if place == "shape" and client % 2 == 1:
            return x[None]
        if place == "value" and client == 1:
            raise ArithmeticError("client 1 is broken")
        if place == "derivative" and client == 1:
            return Broken.apply(x * client)
        return x * client

    def program(x):
        return ad.sum(ad.map_clients(local, ad.broadcast(x, clients), data)).sum()

    try:
        if mode is None:
            return float(program(torch.ones(())))
        return float(ad.value_and_grad(program, "x", mode)(torch.ones(())).value)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def all_failures(clients):
    messages = []
    for mode in (*MODES, None):
        for place in ("value", "derivative", "shape"):
            messages.append(failing(clients, mode, place))
    return [*messages, values(clients, "reverse")[0]]


def work(rank, size, path, task, reduction, results):
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{path}", rank=rank, world_size=size, timeout=timedelta(seconds=20))
    results.put((rank, task(ad.Clients(range(5), Ranks(rank, size), reduction))))
    results.close()
    results.join_thread()
    dist.destroy_process_group()


def spread(size, path, task, reduction="ordered"):
    """Do a task on several processes, and return what each of them found."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = []
    for rank in range(size):
        arguments = (rank, size, path / f"{size}-{reduction}-{task.__name__}", task, reduction, results)
        processes.append(context.Process(target=work, args=arguments))
        processes[-1].start()
    found = dict(results.get(timeout=60) for _ in processes)
    for process in processes:
        process.join(10)
        assert process.exitcode == 0
    return [found[rank] for rank in range(size)]


@pytest.fixture(scope="module")
def one():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    found = all_values(ad.Clients(range(5)))
    torch.set_default_dtype(before)
    return found


pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")


@pytest.mark.parametrize("size", [2, 3])
def test_ordered_sums_give_the_bits_of_one_process(one, size, tmp_path):
    for found in spread(size, tmp_path, all_values):
        for mode in MODES:
            assert found[mode] == one[mode], mode


def test_fast_sums_agree_closely(one, tmp_path):
    for found in spread(2, tmp_path, all_values, "fast"):
        for mode in MODES:
            for mine, theirs in zip(found[mode][1], one[mode][1], strict=True):
                assert mine == pytest.approx(theirs, rel=1e-12)
            assert found[mode][2] == one[mode][2]


def test_an_error_on_one_process_ends_the_derivative_on_all(one, tmp_path):
    """Client 1 lives on process 1. The processes remain usable: they compute a right derivative afterwards."""
    begin = time.monotonic()
    first, second = spread(2, tmp_path, all_failures)
    assert time.monotonic() - begin < 20, "nobody waits for a time-out"
    assert first.pop() == second.pop() == one["reverse"][0]
    cause = "ArithmeticError: client 1 is broken"
    shapes = "RuntimeError: The processes run different programs, or their clients send messages of different shapes"
    told = f"RuntimeError: Process 1 of 2 failed, so this one stopped too: {cause}"
    for mode in MODES:
        assert first[:2] == [told, told], mode
        assert second[:2] == [cause, cause], mode
        assert first[2].startswith(shapes)
        assert second[2].startswith(shapes)
        del first[:3]
        del second[:3]
    nothing_is_differentiated = 0 + 1 + 2 + 3 + 4
    assert first[:2] == [told, nothing_is_differentiated]
    assert second[:2] == [cause, nothing_is_differentiated]
