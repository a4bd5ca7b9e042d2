"""The tuned plain PyTorch loop, the reference of all ratios.

Tensors in memory, one reused model whose parameters are views of one flat buffer, ``autograd.grad`` and one
``_foreach_add_`` for SGD, one ``randperm`` and one ``index_select`` per client and epoch.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch.nn.functional import cross_entropy
from workloads import Clock, Job, run_contender, train_loss


def play(job: Job) -> tuple[Clock, Callable[[], float]]:
    work, device = job.workload, torch.device(job.device)
    x, y = (tensor.to(device) for tensor in job.samples())
    rows = [torch.from_numpy(part).to(device) for part in job.rows]
    model = job.network().to(device)
    parameters = list(model.parameters())
    flat = torch.cat([p.detach().reshape(-1) for p in parameters])
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.data = part.view_as(parameter)
    buffers = [b for b in model.buffers() if b.is_floating_point()]
    precision = torch.autocast(device.type, torch.bfloat16) if job.precision == "bf16-mixed" else nullcontext()

    def train(client: int) -> None:
        for _ in range(work.epochs):
            order = rows[client][torch.randperm(len(rows[client]), device=device)]
            batches = zip(x.index_select(0, order).split(work.batch), y[order].split(work.batch), strict=True)
            for inputs, labels in batches:
                with precision:
                    loss = cross_entropy(model(inputs), labels)
                grads = torch.autograd.grad(loss, parameters)
                with torch.no_grad():
                    torch._foreach_add_(parameters, grads, alpha=-work.lr)

    start, total = torch.empty_like(flat), torch.empty_like(flat)
    clock = job.clock()
    clock.tick()
    for cohort in job.cohorts:
        start.copy_(flat)
        total.zero_()
        buffers_start = [b.clone() for b in buffers]
        buffers_total = [torch.zeros_like(b) for b in buffers]
        examples = sum(len(rows[client]) for client in cohort)
        for client in cohort:
            flat.copy_(start)
            weight = len(rows[client]) / examples
            if buffers:
                torch._foreach_copy_(buffers, buffers_start)
            train(client)
            total.add_(flat, alpha=weight)
            if buffers:
                torch._foreach_add_(buffers_total, buffers, alpha=weight)
        flat.copy_(total)
        if buffers:
            torch._foreach_copy_(buffers, buffers_total)
        is_last = clock.is_over
        clock.tick()
        if is_last:
            break
    return clock, lambda: train_loss(model, x, y)


if __name__ == "__main__":
    run_contender(play)
