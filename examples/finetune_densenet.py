"""Fine-tune torchvision's DenseNet121 on scikit-learn's digits, in plain torch; one line is added: tn.convert.

    python examples/finetune_densenet.py                      # downloads ImageNet's weights
    python examples/finetune_densenet.py --weights none       # from random weights

It prints the loss and the accuracy on the last fifth of the images after every epoch.
"""

import argparse

import torch
import torchvision
from rich.progress import track
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import thresholdnet as tn


def digits(side: int, limit: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Images [N, 3, side, side] between -1 and 1, and labels."""
    data = load_digits()
    images = torch.tensor(data.images[:limit], dtype=torch.float32)[:, None] / 8 - 1
    images = F.interpolate(images, (side, side), mode="bilinear").expand(-1, 3, -1, -1)
    return images.contiguous(memory_format=torch.channels_last), torch.tensor(data.target[:limit])


def main() -> None:
    """Train, then print the accuracy on the last fifth of the images."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", default="DEFAULT", help="torchvision's name of them, or none")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--side", type=int, default=64, help="of the images in pixels")
    parser.add_argument("--limit", type=int, help="use so many images alone")
    options = parser.parse_args()

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weights = None if options.weights == "none" else options.weights
    model = torchvision.models.densenet121(weights=weights)
    model.classifier = nn.Linear(model.classifier.in_features, 10)
    model = tn.convert(model)  # the added line: same weights, results up to rounding, less memory
    model = model.to(device, memory_format=torch.channels_last)

    images, labels = (t.to(device) for t in digits(options.side, options.limit))
    cut = len(images) * 4 // 5
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=1e-4)
    for epoch in range(options.epochs):
        model.train()
        batches = torch.randperm(cut, device=device).split(options.batch_size)
        for batch in track(batches, f"epoch {epoch + 1} of {options.epochs}"):
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            right = sum((model(x).argmax(1) == y).sum().item() for x, y in _pieces(images[cut:], labels[cut:]))
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}, test accuracy {right / (len(images) - cut):.1%}")


def _pieces(images: torch.Tensor, labels: torch.Tensor) -> zip:
    return zip(images.split(100), labels.split(100), strict=True)


if __name__ == "__main__":
    main()
