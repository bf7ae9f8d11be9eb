"""Classify images with an exported network: numpy, Pillow, and onnxruntime or OpenCV; no torch.

    thresholdnet export digits.onnx --checkpoint runs/demo/checkpoints/best.ckpt --json > digits.json
    python examples/serve_onnx.py digits.onnx photo.png --about digits.json
    python examples/serve_onnx.py digits.onnx photo.png --about digits.json --runtime opencv

Only the runtime that is asked for is imported. Images are prepared alike for both.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image


def in_onnxruntime(network: Path) -> Callable[[np.ndarray], np.ndarray]:
    """The network as a function: images float32 [N, 3, H, W] -> logits [N, classes]."""
    import onnxruntime

    session = onnxruntime.InferenceSession(network, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": images})[0]


def in_opencv(network: Path) -> Callable[[np.ndarray], np.ndarray]:
    """The same by cv2.dnn."""
    import cv2

    net = cv2.dnn.readNetFromONNX(str(network))

    def run(images: np.ndarray) -> np.ndarray:
        net.setInput(images)
        return net.forward()

    return run


RUNTIMES = {"onnxruntime": in_onnxruntime, "opencv": in_opencv}


def main() -> None:
    """Print the most likely classes with their probabilities."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", type=Path, help="an .onnx file of `thresholdnet export`")
    parser.add_argument("image", type=Path, nargs="+", help="image files")
    parser.add_argument("--about", type=Path, required=True, help="what `thresholdnet export --json` printed")
    parser.add_argument("--runtime", choices=RUNTIMES, default="onnxruntime")
    options = parser.parse_args()

    about = json.loads(options.about.read_text())
    side, classes = about["image_size"], about["classes"]
    mean, std = (np.array(about[key], dtype=np.float32) for key in ("mean", "std"))
    network = RUNTIMES[options.runtime](options.network)
    pictures = [Image.open(path).convert("RGB") for path in options.image]
    pictures = [picture.resize((side, side), Image.Resampling.BILINEAR) for picture in pictures]
    pixels = (np.stack(pictures).astype(np.float32) / 255 - mean) / std
    logits = network(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))
    powers = np.exp(logits - logits.max(1, keepdims=True))
    probabilities = powers / powers.sum(1, keepdims=True)
    for path, row in zip(options.image, probabilities, strict=True):
        best = row.argsort()[::-1][:5]
        print(f"{path}: " + ", ".join(f"{classes[i]} {row[i]:.1%}" for i in best))


if __name__ == "__main__":
    main()
