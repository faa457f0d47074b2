"""A small convolutional network on handwritten digits (MNIST), exported from torch weights.

    python examples/accuracy/digits.py [--out digits.onnx]

Input x f32 [N, 1, 28, 28], (grey value 0 to 1 - MEAN) / DEVIATION, output logits f32 [N, 10].
"""

from __future__ import annotations

import argparse
import gzip
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import fetch
from tasks import Array, Outputs, Task, joined, made_by, percent

if TYPE_CHECKING:
    from torch import nn

SIDE, BATCH = 28, 100
MEAN, DEVIATION = 0.1307, 0.3081  # of the grey values of MNIST's training digits, by which it was trained
CALIBRATE_EVERY = 10  # each tenth digit calibrates, the others are measured
NAME = "digits.onnx"


def network() -> nn.Module:
    """Two convolutions with pooling, two linear layers; parameter names are those of the published weights."""
    from torch import nn

    class Digits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = nn.Sequential(
                nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
                nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            )  # fmt: skip
            self.classifier = nn.Sequential(nn.Linear(64 * (SIDE // 4) ** 2, 128), nn.ReLU(), nn.Linear(128, 10))

        def forward(self, x):  # type: ignore[no-untyped-def]
            return self.classifier(self.features(x).flatten(1))

    return Digits()


def read_digits(path: Path) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Images f32 [5000, 1, 28, 28], normalised, and their digits; a row of the file is 784 greys and a digit."""
    with gzip.open(path) as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.uint8)
    images = (table[:, :-1].astype(np.float32) / 255 - MEAN) / DEVIATION
    return images.reshape(-1, 1, SIDE, SIDE), table[:, -1].astype(np.int64)


def digit_classifier() -> Task:
    """Share of 4500 digits told right, in percent; 500 others calibrate."""
    model = made_by("accuracy/digits.py", fetch.fetch("digits-mnist") / NAME)
    images, digits = read_digits(fetch.fetch("data-mnist5k") / "mnist_5k.csv.gz")
    calibrates = np.arange(len(digits)) % CALIBRATE_EVERY == 0
    wanted = digits[~calibrates]

    def feeds(chosen: npt.NDArray[np.float32]) -> list[dict[str, npt.NDArray[np.float32]]]:
        return [{"x": chosen[start : start + BATCH]} for start in range(0, len(chosen), BATCH)]

    def rows(outputs: Outputs) -> Array:
        return (joined(outputs).argmax(axis=1) == wanted)[:, None].astype(np.float64)

    batches = feeds(images[~calibrates])
    return Task(
        "MNIST digits", model, batches, {"x": batches[0]["x"][:1]}, rows, percent, "{:.2f} % right",
        ("x=Nx1x28x28",), feeds(images[calibrates]),
    )  # fmt: skip


def main() -> None:
    """Command line: write the ONNX file."""
    import torch
    from export_minilm import save_onnx

    parser = argparse.ArgumentParser(description="Export the MNIST network from torch weights to ONNX.")
    parser.add_argument("--out", type=Path, help=f"file to write (default: {NAME} beside the weights)")
    options = parser.parse_args()
    folder = fetch.fetch("digits-mnist")
    model = network()
    # weights_only: a .pth file is a pickle, and nothing but tensors may come out of it.
    model.load_state_dict(torch.load(folder / "mnist.pth", map_location="cpu", weights_only=True), strict=True)
    batch = torch.export.Dim("N", min=1)
    example = (torch.zeros(2, 1, SIDE, SIDE),)
    save_onnx(model.eval(), example, ({0: batch},), ["x"], ["logits"], options.out or folder / NAME, 20)


if __name__ == "__main__":
    main()
