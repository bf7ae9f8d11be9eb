"""Fill a folder with Triton's compiled kernels for a network's fused blocks; no GPU needed, as for a container's image.

    python bench/precompile.py --cache DIR --model thresholdnet_v1                    128 images of 224x224, bf16, sm_90
    python bench/precompile.py --cache DIR --model hardnet68 --batch 100 --image 32   as on CIFAR
    python bench/precompile.py --cache DIR --model ... --parameters float32           under autocast: weights in fp32

    TRITON_CACHE_DIR=DIR python train.py                                              there, later

Which kernels a network needs depends on its shapes: run this once for each batch and image size, training and inference
are both covered. They are found where Triton and the package have the same versions, with the same settings
(THRESHOLDNET_PDL). A C compiler is needed. Every kernel is launched into a driver that does nothing, and torch's
operations run on the CPU here, so that a step's memory is needed.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from fused_calls import activation_of, fused_calls, train, training_of
from silent import Silent

DTYPES = ("bfloat16", "float16", "float32")


def calls(options: argparse.Namespace, model: str) -> Iterator[Callable[[], None]]:
    """Each fused block's training, forward and backward, and its inference."""
    import torch

    from thresholdnet import create_model

    dtypes = [getattr(torch, name) for name in (options.dtype, options.parameters or options.dtype)]
    network = create_model(model, num_classes=10, fused=True, backend="native", device="meta")
    for call in fused_calls(network, (options.batch, 3, options.image, options.image)):
        spec, x, parameters = training_of(call, activation_of(model), *dtypes)
        yield partial(train, spec, x, parameters)
        yield partial(_infer, spec._replace(fixed=(True,) * len(spec.fixed), save=False), x, parameters)


def _infer(spec: Any, x: Any, parameters: list[Any]) -> None:
    import torch

    from thresholdnet import engine, replay

    gammas = [vector for vector in parameters if vector.dim() == 1][::2]
    running = [made(gamma, dtype=torch.float32) for gamma in gammas for made in (torch.zeros_like, torch.ones_like)]
    replay.call(engine.forward, spec, x, parameters, running, engine.NO_EXTRAS)


def fill(options: argparse.Namespace) -> int:
    """Compile; the exit code."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET must not be 1: the interpreter compiles nothing")
    found = re.fullmatch(r"(\d+)\.(\d)", options.capability)
    if found is None or (capability := (int(found[1]), int(found[2]))) < (8, 0):
        raise ValueError(f"capability must be 8.0 or newer, such as 9.0, got {options.capability!r}")
    for name in ("batch", "image"):
        if getattr(options, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(options, name)}")
    os.environ["TRITON_CACHE_DIR"] = str(options.cache.resolve())
    os.environ["THRESHOLDNET_REPLAY"] = "1"  # first calls compile in threads
    import torch
    from rich.progress import track

    from thresholdnet.checks import output_folder

    output_folder("cache", options.cache)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        Silent(Path(folder)).install(capability)
        every = [call for model in options.model for call in calls(options, model)]
        for call in track(every, description="blocks", disable=not sys.stderr.isatty()):
            call()
    kernels = len({file.parent for file in options.cache.rglob("*.cubin")})
    print(f"{kernels} kernels in {options.cache}, {time.monotonic() - began:.0f} s")
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, metavar="DIR", help="Triton's cache, made or added to")
    parser.add_argument("--model", action="append", required=True, metavar="NAME", help="of the zoo; may repeat")
    parser.add_argument("--batch", type=int, default=128, metavar="N", help="images of a step (128)")
    parser.add_argument("--image", type=int, default=224, metavar="PIXELS", help="their height and width (224)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of images (bfloat16)")
    parser.add_argument("--parameters", choices=DTYPES, help="of parameters (dtype's); float32 under autocast")
    parser.add_argument("--capability", default="9.0", metavar="N.N", help="of the GPU (9.0, of an H100)")
    try:
        return fill(parser.parse_args(arguments))
    except (OSError, RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
