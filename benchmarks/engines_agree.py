"""Check that every engine, device and precision gives the result of the sequential engine on the CPU.

    python benchmarks/engines_agree.py --device cuda [--markdown FILE]

The tasks are small versions of W1 to W4. The table shows the distance of each run's displacement from that of the CPU,
relative to the latter's length. The script ends with an error if a distance is too large.

In float64, rounding errors are negligible. In float32, a ResNet amplifies them. The script therefore measures this
rounding noise, and allows it: it is the distance between two runs on the CPU whose initial weights are rounded
differently.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import warnings
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from speed import HERE, write_between
from workloads import Clock, Job, prepare

sys.path.insert(0, str(HERE / "contenders"))
from ours import fit

FLOAT64, FLOAT32, BF16 = 1e-9, 2e-3, 0.4
"""Allowed distances. A run that did not train has distance 1. Other devices sum in another order; bf16 has 8 bits."""
NOISE_MARGIN = 8.0
"""How many times the measured rounding noise is allowed in float32, in addition to ``FLOAT32``."""
MOST_NOISE = 0.05
"""Rounding noise above which a comparison in float32 is meaningless."""
CHANGES = {"W2": {"lr": 0.01}, "W4": {"lr": 0.001, "sizes": [40, 40], "batch": 20}}
"""Large steps, and BatchNorm over the two samples of a quick W4, would amplify any difference."""
WAYS: list[tuple[dict[str, Any], str, float]] = [
    ({"engine": "vectorized"}, "64-true", FLOAT64),
    ({"engine": "sequential"}, "32-true", FLOAT32),
    ({"engine": "sequential", "data_device": "cpu"}, "32-true", FLOAT32),
    ({"engine": "vectorized"}, "32-true", FLOAT32),
    ({"engine": "vectorized", "compile_clients": True}, "32-true", FLOAT32),
    ({"engine": "sequential", "channels_last": True}, "32-true", FLOAT32),
    ({"engine": "sequential"}, "bf16-mixed", BF16),
    ({"engine": "vectorized"}, "bf16-mixed", BF16),
]


def trained(job: Job) -> torch.Tensor:
    """Train, and return the displacement after all rounds, ``[P]``."""
    with redirect_stdout(StringIO()):  # hides the run summary
        _, module = fit(job, Clock())
    end = torch.nn.utils.parameters_to_vector(module.net.cpu().parameters()).detach()
    return end - torch.from_numpy(job.arrays["start"])


def rounding_noise(job: Job, expected: torch.Tensor) -> float:
    """Return the change of the displacement, relative to its length, if every initial weight is rounded differently."""
    arrays = dict(job.arrays)
    signs = np.random.default_rng(0).choice([-1.0, 1.0], arrays["start"].shape)
    arrays["start"] = (arrays["start"] * (1 + 2.0**-23 * signs)).astype(arrays["start"].dtype)
    rounded = replace(job, data=str(Path(job.data).with_name("rounded.npz")))
    np.savez(rounded.data, **arrays)
    return ((trained(rounded) - expected).norm() / expected.norm()).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore")
    torch.backends.cudnn.allow_tf32 = False
    lines = ["| work | engine | precision | distance | allowed | |", "|---|---|---|---:|---:|---|"]
    failed = 0
    for work in ("W1", "W2", "W3", "W4"):
        with tempfile.TemporaryDirectory() as folder:
            job = Job(work, str(Path(folder) / "data.npz"), quick=True, changes=CHANGES.get(work, {}))
            prepare(job.workload, Path(job.data))
            sequential = replace(job, options={"engine": "sequential"})
            references = {
                "64-true": trained(replace(sequential, precision="64-true")),
                "32-true": trained(sequential),
            }
            noise = rounding_noise(sequential, references["32-true"])
            if noise > MOST_NOISE:
                sys.exit(
                    f"{work} cannot be compared in float32: rounding errors amount to {noise:.1e} of the displacement."
                )
            for options, precision, exact in WAYS:
                expected = references.get(precision, references["32-true"])
                allowed = exact + (NOISE_MARGIN * noise if precision == "32-true" else 0.0)
                if options.get("channels_last") and work in ("W1", "W3"):
                    continue
                try:
                    displacement = trained(replace(job, options=options, precision=precision, device=args.device))
                    distance = ((displacement - expected).norm() / expected.norm()).item()
                    cells = f"{distance:.1e} | {allowed:.1e} | {'agrees' if distance <= allowed else '**differs**'}"
                    failed += not distance <= allowed
                except Exception as error:
                    cells = f"| {allowed:.1e} | **{type(error).__name__}: {str(error).splitlines()[0][:150]}**"
                    failed += 1
                settings = ", ".join(f"{key}={value}" for key, value in options.items())
                lines.append(f"| {work} | {settings} | {precision} | {cells} |")
                print(lines[-1], flush=True)
    if args.markdown:
        write_between(args.markdown, "agreement", "\n".join(lines))
    sys.exit(f"{failed} runs do not agree with the CPU." if failed else 0)


if __name__ == "__main__":
    main()
