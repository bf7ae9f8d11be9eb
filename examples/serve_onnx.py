"""Classify an image with an exported network: numpy, Pillow and onnxruntime, no torch.

thresholdnet export digits.onnx --checkpoint runs/demo/checkpoints/best.ckpt --json > digits.json
python examples/serve_onnx.py digits.onnx photo.png --about digits.json
"""

import argparse
import json
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image


def main() -> None:
    """Print the most likely classes with their probabilities."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", type=Path, help="an .onnx file of `thresholdnet export`")
    parser.add_argument("image", type=Path, nargs="+", help="image files")
    parser.add_argument("--about", type=Path, required=True, help="what `thresholdnet export --json` printed")
    options = parser.parse_args()

    about = json.loads(options.about.read_text())
    side, classes = about["image_size"], about["classes"]
    mean, std = (np.array(about[key], dtype=np.float32) for key in ("mean", "std"))
    session = onnxruntime.InferenceSession(options.network, providers=["CPUExecutionProvider"])
    pictures = [Image.open(path).convert("RGB") for path in options.image]
    pictures = [picture.resize((side, side), Image.Resampling.BILINEAR) for picture in pictures]
    pixels = (np.stack(pictures).astype(np.float32) / 255 - mean) / std
    (logits,) = session.run(None, {"images": np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))})
    powers = np.exp(logits - logits.max(1, keepdims=True))
    probabilities = powers / powers.sum(1, keepdims=True)
    for path, row in zip(options.image, probabilities, strict=True):
        best = row.argsort()[::-1][:5]
        print(f"{path}: " + ", ".join(f"{classes[i]} {row[i]:.1%}" for i in best))


if __name__ == "__main__":
    main()
