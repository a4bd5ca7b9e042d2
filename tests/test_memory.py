"""Large blocks of memory are used again, and never while somebody still looks at them; a run leaves none behind."""

import gc
import weakref

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, Subset

from federations import QUIET, Classifier, flat, loader, samples, trainer, val_loader
from lightning_fedhaw import (
    FedAvgCallback,
    FederatedCallback,
    FederatedDataModule,
    FederatedTrainer,
    FedHAWCallback,
    FedHyperCallback,
    FedLAWCallback,
    FedOptCallback,
    ScaffoldCallback,
)
from lightning_fedhaw.clients.vectorized.batched import StepInputs
from lightning_fedhaw.clients.vectorized.compiled import _flattened
from lightning_fedhaw.clients.vectorized.tracing import quiet_collector
from lightning_fedhaw.data.client_data import ClientData
from lightning_fedhaw.federation import federation
from lightning_fedhaw.federation.memory_advice import memory_advice
from lightning_fedhaw.ranks import Ranks
from lightning_fedhaw.vectors import memory

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(memory, "LARGE", 1 << 10)
    memory.release()
    yield
    memory.release()


def make(*shape, dtype=torch.float32):
    return memory.empty(*shape, dtype=dtype, device=CPU)


def test_a_block_is_used_again_once_nobody_has_it():
    first = make(10, 100).fill_(1.0)
    address, view = first.data_ptr(), first[3, 50:]
    del first
    second = make(10, 100).fill_(2.0)
    assert second.data_ptr() != address, "a view still has it"
    assert view.tolist() == [1.0] * 50
    del view
    assert make(1000).data_ptr() == address


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_shape_and_dtype(dtype):
    tensor = make(7, 500, dtype=dtype)
    assert tensor.shape == (7, 500)
    assert tensor.dtype == dtype
    assert tensor.is_contiguous()
    assert tensor.data_ptr() % 64 == 0
    assert tensor.untyped_storage().nbytes() == 7 * 500 * dtype.itemsize, "a checkpoint would hold the rest as well"
    assert torch.equal(tensor.zero_().requires_grad_().sum(), torch.zeros((), dtype=dtype))


def test_what_does_not_fit_is_given_back():
    del_me = make(10, 1000)
    del del_me
    held = make(1000)
    assert held.untyped_storage().nbytes() == 4000
    assert memory._spare == [], "a vector sits in a matrix's block, or more is held than was ever in use"


def test_a_federation_gives_the_same_with_blocks_used_again(monkeypatch):
    results = []
    for least in (1, 1 << 40):
        monkeypatch.setattr(memory, "LARGE", least)
        module, rule = Classifier(), FedHAWCallback(lr_gamma=0.01, lr_lambda=0.1)
        trainer(rounds=5, rule=rule, clients_per_round=2).fit(module, loader())
        assert memory._spare == [], "the end of a run gives them back"
        results.append((flat(module), rule.state["previous"].gather()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_small_and_released_blocks_are_not_kept():
    del_me = make(4)
    del del_me
    assert memory._spare == []
    del_me = make(1000)
    del del_me
    assert len(memory._spare) == 1
    held = make(2000)
    memory.release()
    del held
    assert memory._spare == [], "after a run, nothing is left behind"


# ---------------------------------------------------------------------- after a run

WIDTH = 1000
BIG = 4 * 8 * WIDTH
"""Bytes of which a vector of all parameters has more, and a single parameter fewer."""

RULES = {
    "FedAvg": FedAvgCallback,
    "FedHAW": FedHAWCallback,
    "FedOpt": lambda **options: FedOptCallback(rule=FedHAWCallback(), **options),
    "FedHyper": lambda **options: FedHyperCallback(adapt="G+CL", **options),
    "FedLAW": lambda **options: FedLAWCallback(server_epochs=3, **options),
    "SCAFFOLD": ScaffoldCallback,
}


def unwrapped(tensor):
    """A tensor of a batched call as it is outside."""
    functorch = torch._C._functorch
    return functorch.get_unwrapped(tensor) if functorch.is_batchedtensor(tensor) else tensor


def big_tensors(known=()):
    """Large tensors on the CPU that were made in this test, garbage that was not collected included."""
    found = {}
    for each in gc.get_objects():
        if issubclass(type(each), torch.Tensor) and each.device == CPU:
            storage = unwrapped(each).untyped_storage()
            if storage.nbytes() >= BIG and storage.data_ptr() not in known:
                found[storage.data_ptr()] = (tuple(each.shape), each.dtype)
    return list(found.values())


@pytest.fixture
def no_collection(monkeypatch):
    """Nothing is collected, and what is to be in host memory goes elsewhere, so that the CPU is the device to leave."""
    monkeypatch.setattr(federation, "HOST", torch.device("meta"))
    gc.freeze()  # what was there before is not looked at
    gc.disable()
    yield
    gc.enable()
    gc.unfreeze()


class Counts(FederatedCallback):
    """How much there is while a run goes on."""

    def __init__(self):
        super().__init__()
        self.found = []

    def on_round_end(self, trainer, pl_module, report):
        self.found.append(len(big_tensors()))


def run(rule, engine="sequential", *, door=1, module=None):
    """Two rounds of 10,003 parameters on a part of a data set, which is a copy; and what the test itself holds."""
    counts, data = Counts(), samples(4000)
    options = {"engine": engine, "local_steps": 2, "optimizer_state": "kept"}
    if door == 1:
        runner = FederatedTrainer(rounds=2, callbacks=[RULES[rule](), counts], **options, **QUIET)
    else:
        runner = pl.Trainer(max_epochs=2, callbacks=[RULES[rule](**options), counts], **QUIET)
    given = FederatedDataModule(Subset(data, range(3000)), num_clients=4, proxy=40, val=samples(60, seed=1))
    runner.fit(module or Classifier(hidden=WIDTH), given)
    assert min(counts.found) >= 3, "the count sees client data and vectors"
    return runner, {tensor.untyped_storage().data_ptr() for tensor in data.tensors}


@pytest.mark.usefixtures("no_collection")
@pytest.mark.parametrize("engine", ["sequential", "vectorized"])
@pytest.mark.parametrize("rule", RULES)
def test_the_end_of_a_run_leaves_nothing_on_the_device(rule, engine):
    runner, known = run(rule, engine)
    assert big_tensors(known) == []
    assert type(runner.fit_loop.federation.engine).__name__ == f"{engine.capitalize()}Engine"


@pytest.mark.usefixtures("no_collection")
@pytest.mark.parametrize("rule", ["FedAvg", "FedHAW"])
def test_a_stock_trainer_leaves_nothing_on_the_device(rule):
    runner, known = run(rule, door=2)
    assert big_tensors(known) == []
    assert runner.fit_loop.federation is not None


class Fails(Classifier):
    """Raises in the second round, in one place."""

    def __init__(self, where):
        super().__init__(hidden=WIDTH)
        self.where = where

    def fail(self, where):
        if where == self.where and self.trainer.global_step == 1 and not self.trainer.sanity_checking:
            raise ZeroDivisionError("on purpose")

    def training_step(self, batch, batch_idx):
        self.fail("training")
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.fail("validation")
        super().validation_step(batch, batch_idx)


@pytest.mark.usefixtures("no_collection")
@pytest.mark.parametrize("where", ["training", "validation"])
@pytest.mark.parametrize("engine", ["sequential", "vectorized"])
def test_a_run_that_fails_leaves_nothing_on_the_device(where, engine):
    data = samples(4000)
    known = {tensor.untyped_storage().data_ptr() for tensor in data.tensors}
    runner = trainer(rule=FedHAWCallback(), engine=engine, local_steps=2)
    with pytest.raises(ZeroDivisionError, match="on purpose"):
        runner.fit(Fails(where), DataLoader(Subset(data, range(3000)), batch_size=8), val_loader())
    assert big_tensors(known) == []
    assert runner.fit_loop.federation is not None


def test_an_error_among_several_processes_does_not_keep_what_its_frames_hold():
    class Two(Ranks):
        def gather(self, value):
            return [value, value]

    class Large:
        pass

    held = []

    def work():
        large = Large()
        held.append(weakref.ref(large))
        raise ZeroDivisionError("on purpose")

    gc.disable()
    try:
        with pytest.raises(ZeroDivisionError, match="on purpose"):
            Two(0, 2).exchange(work)
        assert held[0]() is None
    finally:
        gc.enable()


def test_a_graph_does_not_keep_the_tensors_that_it_was_traced_with():
    call = StepInputs(
        [torch.zeros(3)], [torch.zeros(2)], [torch.ones(1)], 5, {"w": torch.zeros(3)}, [{"c": torch.zeros(3)}]
    )
    flat_call, build = _flattened(call)
    held = [weakref.ref(tensor) for tensor in flat_call]
    again = build([tensor.clone() for tensor in flat_call])
    del call, flat_call
    assert [reference() for reference in held] == [None] * 5
    parameters, buffers, batch, index, starts, (state,), _ = again
    assert [len(parameters), len(buffers), len(batch), index] == [1, 1, 1, 5]
    assert (starts.keys(), state.keys()) == ({"w"}, {"c"})
    _, build = _flattened(StepInputs(parameters, buffers, batch, index))
    assert build(parameters + buffers + batch).starts is None


@pytest.mark.parametrize("storage_dtype", [None, torch.bfloat16])
def test_a_state_moves_in_its_own_dtypes(storage_dtype):
    rule = FedHAWCallback(lr_lambda=0.3)
    trainer(rule=rule, storage_dtype=storage_dtype).fit(Classifier(), loader())
    before = rule.state
    rule.move_state(torch.device("meta"))
    assert rule.state.keys() == before.keys()
    matrix = rule.state["previous"].matrix
    assert (matrix.device.type, matrix.dtype) == ("meta", storage_dtype or torch.float32)
    assert matrix.shape == before["previous"].matrix.shape
    assert (rule.state["direction"].device.type, rule.state["lambda_"].dtype) == ("meta", torch.float64)


@pytest.mark.parametrize("engine", ["sequential", "vectorized"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_after_a_run_everything_is_there(engine, precision):
    def build(rounds):
        options = {"optimizer_state": "kept", "buffers": "local", "engine": engine, "precision": precision}
        return trainer(rounds=rounds, rule=FedHAWCallback(), clients_per_round=3, seed=4, **options)

    straight, whole = build(4), Classifier(norm=True)
    straight.fit(whole, loader(), val_loader())

    runner, module = build(2), Classifier(norm=True)
    runner.fit(module, loader(), val_loader())
    (rule,) = (callback for callback in runner.callbacks if isinstance(callback, FedHAWCallback))
    assert rule.scale == runner.federation_summary["scale"] != 1
    assert "val_loss" in runner.validate(module, val_loader(), verbose=False)[0]
    runner.save_checkpoint("after.ckpt")

    runner.fit_loop.max_epochs = 4
    runner.fit(module, loader(), val_loader())
    assert torch.equal(flat(module), flat(whole))
    assert rule.scale == straight.federation_summary["scale"]

    resumed, other = build(4), Classifier(norm=True)
    resumed.fit(other, loader(), val_loader(), ckpt_path="after.ckpt")
    assert torch.equal(flat(other), flat(whole))


# ---------------------------------------------------------------------- where there is not enough

MESSAGES = [
    "CUDA out of memory. Tried to allocate 20.00 MiB.",
    "CUDA error: out of memory",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`",
    "cuFFT error: CUFFT_ALLOC_FAILED",
    'NVML_SUCCESS == r INTERNAL ASSERT FAILED at "/pytorch/c10/cuda/CUDACachingAllocator.cpp":1016',
    "[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate",
]


class Hungry(Classifier):
    """Says that memory has run out: alone for every batch, batched for more than two clients at once."""

    def __init__(self, message):
        super().__init__()
        self.message = message

    def training_step(self, batch, batch_idx):
        whole = unwrapped(batch[0])
        clients = 3 if whole is batch[0] else len(whole)
        if self.trainer.fit_loop.federation.in_round and clients > 2:
            raise RuntimeError(self.message)
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("message", MESSAGES)
def test_words_for_too_little_memory(message):
    assert memory.is_out_of_memory(RuntimeError(message))
    assert not memory.is_out_of_memory(ValueError(message))


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: device-side assert triggered"), ZeroDivisionError()])
def test_words_for_something_else(error):
    assert not memory.is_out_of_memory(error)


@pytest.mark.parametrize("batch_size", [1, 8])
def test_a_client_that_does_not_fit_is_told_what_helps(batch_size):
    with pytest.raises(RuntimeError, match="CUBLAS_STATUS_ALLOC_FAILED") as caught:
        trainer(engine="sequential").fit(Hungry(MESSAGES[2]), loader(batch_size=batch_size))
    if hasattr(caught.value, "add_note"):
        assert caught.value.__notes__ == [
            f"In local training: client 0, round 0, a batch of {batch_size}.",
            "Memory has run out. To need less: give the clients a smaller `batch_size`.",
        ]


def test_clients_that_do_not_fit_together_train_fewer_at_a_time():
    module, plain = Hungry(MESSAGES[4]), Classifier()
    with pytest.warns(UserWarning, match="4 clients at once do not fit into memory; they are trained again, 2 at a"):
        trainer(engine="vectorized", client_eval=False).fit(module, loader())
    trainer(engine="vectorized").fit(plain, loader())
    assert torch.allclose(flat(module), flat(plain), rtol=1e-5, atol=1e-6)


def test_on_a_gpu_the_advice_is_what_is_not_done_yet(monkeypatch):
    def advice(rule, data_device="cuda:0", **options):
        runner = trainer(rounds=1, rule=rule, client_eval=False, **options)
        runner.fit(Classifier(), loader())
        own = runner.fit_loop.federation
        own.host.device = torch.device("cuda", 0)
        with monkeypatch.context() as patch:
            patch.setattr(ClientData, "device", torch.device(data_device))
            text = memory_advice(own.host.device, own.data, own.rule, own.options, is_summed=own.transport.is_summed)
            return [part.split("`")[1] for part in text.split("; ")]

    assert advice(FedHAWCallback(lr_lambda=0.3, memory="host"), "cpu", storage="host") == ["batch_size"]
    assert advice(FedHAWCallback()) == ["batch_size", 'data_device="cpu"']
    assert advice(FedAvgCallback()) == ["batch_size", 'data_device="cpu"']
    assert advice(FedAvgCallback(), storage="device") == ["batch_size", 'data_device="cpu"', 'storage="host"']
    assert advice(FedHAWCallback(lr_lambda=0.3)) == [
        "batch_size",
        'data_device="cpu"',
        'storage="host"',
        'FedHAWCallback(memory="host")',
    ]


# ---------------------------------------------------------------------- from round to round


class Garbage(pl.Callback):
    """Finds what of the package a round leaves to the garbage collector."""

    def __init__(self):
        self.found = []

    def on_train_epoch_end(self, runner, *_):
        gc.collect()
        if runner.current_epoch == 1:
            gc.disable()
            gc.set_debug(gc.DEBUG_SAVEALL)
        elif runner.current_epoch == 2:
            gc.collect()
            gc.set_debug(0)
            gc.enable()
            for thing in gc.garbage:
                kind = thing if hasattr(thing, "__qualname__") else type(thing)
                if str(kind.__module__).startswith("lightning_fedhaw"):
                    self.found.append(kind.__qualname__)
            gc.garbage.clear()


@pytest.mark.parametrize("engine", ["sequential", "vectorized"])
@pytest.mark.parametrize("make_rule", [FedHAWCallback, ScaffoldCallback])
def test_a_round_leaves_nothing_that_refers_in_a_circle(engine, make_rule):
    garbage = Garbage()
    gc.freeze()  # what was there before takes most of the time of a collection
    try:
        runner = trainer(rounds=3, rule=make_rule(), callbacks=[garbage], engine=engine)
        runner.fit(Classifier(), loader(), val_loader())
    finally:
        gc.unfreeze()
    assert garbage.found == []


def test_recent_garbage_does_not_pile_up_with_what_is_old():
    class Circle:
        def __init__(self):
            self.itself = self

    gone = weakref.ref(Circle())
    with quiet_collector(runs=True):
        assert gone() is None, "outside of this it is collected only when the oldest generation is"
