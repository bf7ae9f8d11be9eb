"""Segment discs and squares that are drawn at random, in FC-HarDNet's manner: harmonic blocks down and up again.

    python examples/segment_shapes.py --out shapes.png        # two minutes on 2 cores; draws what it learned

The encoder is a network of the zoo with features_only; the decoder joins each of its maps with the one below,
upsampled, and runs a harmonic block over both. All blocks are fused: nothing is concatenated inside them.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F

import thresholdnet as tn

CLASSES = ("background", "disc", "square")


class Decoder(nn.Module):
    """Maps of all strides -> scores [N, classes, H, W] at the images' size."""

    def __init__(self, channels: list[int], classes: int):
        super().__init__()
        width, blocks = channels[-1], []
        for skip in reversed(channels[:-1]):
            block = tn.ThresholdBlock(width + skip, tn.links.harmonic(4), growth_rate=10, fused=True)
            blocks.append(block)
            width = block.out_channels
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, maps: list[Tensor], size: tuple[int, int]) -> Tensor:
        """`size`: height and width of the images."""
        x, *skips = reversed(maps)
        for block, skip in zip(self.blocks, skips, strict=True):
            x = F.interpolate(x, size=skip.shape[2:], mode="bilinear")
            x = block(torch.cat([x, skip], 1))
        return F.interpolate(self.head(x), size=size, mode="bilinear")


class Segmenter(nn.Module):
    """Images [N, 3, H, W] -> scores [N, classes, H, W]."""

    def __init__(self):
        super().__init__()
        self.encoder = tn.create_model("thresholdnet_ab", width_mult=0.25, features_only=True, fused=True)
        self.decoder = Decoder([level["channels"] for level in self.encoder.feature_info], len(CLASSES))

    def forward(self, images: Tensor) -> Tensor:
        """Scores at the images' size."""
        return self.decoder(self.encoder(images), images.shape[2:])


def shapes(count: int, side: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noisy images [count, 3, side, side] with a disc and a square each, and their classes [count, side, side]."""
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    labels = torch.zeros(count, side, side, dtype=torch.long)
    images = torch.rand(count, 3, 1, 1, generator=generator).expand(-1, -1, side, side).clone()
    for kind in (1, 2):
        centre = side * (0.2 + 0.6 * torch.rand(count, 2, 1, 1, generator=generator))
        radius = side * (0.14 + 0.12 * torch.rand(count, 1, 1, generator=generator))
        down, across = rows - centre[:, 0], columns - centre[:, 1]
        distance = (down**2 + across**2).sqrt() if kind == 1 else torch.maximum(down.abs(), across.abs())
        inside = distance < radius
        labels[inside] = kind
        colour = torch.rand(count, 3, 1, 1, generator=generator)
        images = torch.where(inside[:, None], colour, images)
    return images + 0.1 * torch.randn(images.shape, generator=generator), labels


def overlap(predicted: Tensor, labels: Tensor) -> list[float]:
    """Intersection over union of every class."""
    return [
        ((predicted == k) & (labels == k)).sum().item() / max(((predicted == k) | (labels == k)).sum().item(), 1)
        for k in range(len(CLASSES))
    ]


def draw(images: Tensor, labels: Tensor, predicted: Tensor, path: Path) -> None:
    """Images, truth and prediction, a column each."""
    figure, axes = plt.subplots(3, len(images), figsize=(1.6 * len(images), 5), layout="constrained")
    for i in range(len(images)):
        axes[0, i].imshow(images[i].permute(1, 2, 0).clamp(0, 1))
        for row, classes in ((1, labels), (2, predicted)):
            axes[row, i].imshow(classes[i], cmap="viridis", vmin=0, vmax=len(CLASSES) - 1)
    for row, name in enumerate(("image", "truth", "prediction")):
        axes[row, 0].set_ylabel(name)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    figure.savefig(path, dpi=120)


def main() -> None:
    """Train on fresh shapes, then say how well unseen ones are found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--side", type=int, default=64, help="of the images in pixels")
    parser.add_argument("--out", type=Path, help="write a picture there")
    options = parser.parse_args()
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)

    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = Segmenter()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    for _ in track(range(options.steps), "training"):
        images, labels = shapes(options.batch_size, options.side, generator)
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    images, labels = shapes(64, options.side, torch.Generator().manual_seed(1))
    with torch.no_grad():
        predicted = model(images).argmax(1)
    found = overlap(predicted, labels)
    print(f"loss {loss.item():.3f}; IoU " + ", ".join(f"{k} {v:.1%}" for k, v in zip(CLASSES, found, strict=True)))
    if options.out is not None:
        draw(images[:6], labels[:6], predicted[:6], options.out)
        print(f"drawn: {options.out}")


if __name__ == "__main__":
    main()
