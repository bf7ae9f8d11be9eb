"""Tell spheres, cubes and shells apart in noisy volumes, with a ThresholdNet whose layers are Conv3d and BatchNorm3d.

    python examples/classify_volumes.py --out volumes.png        # a minute on 2 cores; draws what it said of some

Volumes run out of memory first: the example prints what a training step keeps for backward, fused and in plain torch.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from rich.progress import track
from torch import Tensor
from torch.nn import functional as F

import thresholdnet as tn

CLASSES = ("sphere", "cube", "shell")


def solids(count: int, side: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noisy volumes [count, 1, side, side, side] in channels_last_3d order with a solid each, and its class [count]."""
    axes = torch.meshgrid(*[torch.arange(side)] * 3, indexing="ij")
    labels = torch.randint(len(CLASSES), (count,), generator=generator)
    centres = side * (0.35 + 0.3 * torch.rand(count, 3, generator=generator))
    radii = side * (0.2 + 0.1 * torch.rand(count, 1, 1, 1, generator=generator))
    offsets = torch.stack([axis - centre for axis, centre in zip(axes, centres.T[..., None, None, None], strict=True)])
    far, side_on = offsets.square().sum(0).sqrt(), offsets.abs().amax(0)
    kinds = torch.stack([far < radii, side_on < 0.8 * radii, (far < radii) & (far > 0.6 * radii)])
    inside = kinds.gather(0, labels.view(1, -1, 1, 1, 1).expand(1, *far.shape))[0]
    volumes = inside.float() + 0.5 * torch.randn(inside.shape, generator=generator)
    return volumes[:, None].to(memory_format=torch.channels_last_3d), labels


def kept(model: torch.nn.Module, side: int) -> str:
    """What a step on 4 volumes of this side keeps for backward, counted without running it."""
    found = tn.memory.kept(model, (4, 1, side, side, side), torch.float32)
    return f"{found['fused'] / 2**20:.1f} MiB, in plain torch {found['eager'] / 2**20:.1f} MiB"


def draw(volumes: Tensor, labels: Tensor, predicted: Tensor, path: Path) -> None:
    """The middle slices of some volumes, with what they are and what the network said."""
    figure, axes = plt.subplots(1, len(volumes), figsize=(1.8 * len(volumes), 2.4), layout="constrained")
    for axis, volume, label, said in zip(axes, volumes[:, 0], labels, predicted, strict=True):
        axis.imshow(volume[len(volume) // 2], cmap="gray")
        axis.set(xticks=[], yticks=[], xlabel=f"said {CLASSES[said]}", title=CLASSES[label])
        axis.xaxis.label.set_color("tab:green" if said == label else "tab:red")
    figure.savefig(path, dpi=120)


def main() -> None:
    """Train on fresh solids, then say how many unseen ones are told apart."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch-size", type=int, default=12)
    parser.add_argument("--side", type=int, default=32, help="of the volumes in voxels")
    parser.add_argument("--out", type=Path, help="write a picture there")
    options = parser.parse_args()
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)

    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = tn.create_model(
        "thresholdnet_ab", len(CLASSES), 1, spatial_dims=3, fused=True, layers=(4, 6, 4), growth_rates=(8, 10, 16),
        transitions=(24, 32, 64), width_mult=0.5,
    ).to(memory_format=torch.channels_last_3d)  # fmt: skip
    print(f"4 volumes keep {kept(model, options.side)}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    for _ in track(range(options.steps), "training"):
        volumes, labels = solids(options.batch_size, options.side, generator)
        loss = F.cross_entropy(model(volumes), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    volumes, labels = solids(120, options.side, torch.Generator().manual_seed(1))
    with torch.no_grad():
        predicted = model(volumes).argmax(1)
    print(f"loss {loss.item():.3f}; right {(predicted == labels).float().mean():.1%}")
    if options.out is not None:
        draw(volumes[:7], labels[:7], predicted[:7], options.out)
        print(f"drawn: {options.out}")


if __name__ == "__main__":
    main()
