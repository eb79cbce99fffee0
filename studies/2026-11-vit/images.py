"""Fashion-MNIST: 70 000 photographs of clothes in ten classes, 28 x 28 pixels, under the MIT licence.

    python studies/2026-11-vit/images.py runs/fashion-mnist

fetches the four files from Debian's package dataset-fashion-mnist. Without apt-get, put the same four files into a
folder, from https://github.com/zalandoresearch/fashion-mnist.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

PACKAGE, VERSION = "dataset-fashion-mnist", "0.0~git20200523.55506a9-1"
SHA256: Mapping[str, str] = {
    f"{PACKAGE}.deb": "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
    "train-images-idx3-ubyte.gz": "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
    "train-labels-idx1-ubyte.gz": "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
    "t10k-images-idx3-ubyte.gz": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
    "t10k-labels-idx1-ubyte.gz": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
}
"""The checksum of the package and of each of its four files."""

_STARTS = {"train": 0, "tune": 50_000, "measure": 55_000}  # in the file of 60 000 training images
CLASSES, SIZE = 10, 28


@dataclass(frozen=True)
class Split:
    """Images and their classes.

    Args:
        images: (n, height, width), uint8.
        labels: (n,), the class of each image.
    """

    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Images:
    """The four splits: training; choosing settings; reporting; and measuring sharpness."""

    train: Split
    tune: Split
    val: Split
    measure: Split

    def batch(self, split: Split, chosen: Any) -> tuple[Tensor, Tensor]:
        """Return the chosen images as (n, 1, height, width), with mean 0 and variance 1 over the data, and classes."""
        pixels = torch.from_numpy(split.images[chosen]).unsqueeze(1)
        return (pixels.float() / 255 - 0.286) / 0.353, torch.from_numpy(split.labels[chosen]).long()

    def batches(self, split: Split, size: int, most: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of a split in the order of the file, at most `most`."""
        starts = list(range(0, len(split), size))[:most]
        return (self.batch(split, slice(start, start + size)) for start in starts)

    def order(self, seed: int, count: int) -> npt.NDArray[np.int64]:
        """Return the training images in the order of one run: each pass over the data is a new permutation."""
        passes = -(-count // len(self.train))
        drawn = [np.random.default_rng([seed, i]).permutation(len(self.train)) for i in range(passes)]
        return np.concatenate(drawn)[:count]


def read(folder: Path) -> Images:
    """Read the four files, whose checksums are compared first.

    Raises:
        SystemExit: a file is missing or differs.
    """
    for name, expected in list(SHA256.items())[1:]:
        if not (folder / name).is_file():
            raise SystemExit(f"{folder / name} is missing: fetch it by `python {__file__} {folder}`")
        _check(folder / name, expected)
    images, labels = (
        _idx(folder / f"train-{kind}.gz") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")
    )
    ends = [*list(_STARTS.values())[1:], len(images)]
    parts = {
        name: Split(images[a:b], labels[a:b]) for (name, a), b in zip(_STARTS.items(), ends, strict=True)
    }
    val = Split(_idx(folder / "t10k-images-idx3-ubyte.gz"), _idx(folder / "t10k-labels-idx1-ubyte.gz"))
    return Images(val=val, **parts)


def fetch(folder: Path) -> None:
    """Download the Debian package and put its four files into `folder`.

    Raises:
        SystemExit: apt-get or dpkg-deb is missing or fails, or a file differs from the one that is expected.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        there = Path(name)
        _run(["apt-get", "download", f"{PACKAGE}={VERSION}"], there)
        package = next(there.glob("*.deb"))
        _check(package, SHA256[f"{PACKAGE}.deb"])
        _run(["dpkg-deb", "--extract", str(package), "files"], there)
        for file in (there / "files").rglob("*.gz"):
            if file.name in SHA256:
                shutil.copyfile(file, folder / file.name)
    read(folder)


def _run(command: list[str], folder: Path) -> None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    except FileNotFoundError:
        raise SystemExit(
            f"{command[0]} is not installed; put the four files of https://github.com/zalandoresearch/fashion-mnist "
            "into a folder and give that to run.py"
        ) from None
    if done.returncode:
        raise SystemExit(
            f"{' '.join(command)} failed: {done.stderr.strip()[-500:]}; is the list of packages new (apt-get update)?"
        )


def _check(path: Path, expected: str) -> None:
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != expected:
        raise SystemExit(f"{path} has sha256 {found}; expected {expected}: delete it and fetch it again")


def _idx(path: Path) -> npt.NDArray[np.uint8]:
    """Read an IDX file: two zero bytes, the type (8: uint8), the number of dimensions, their sizes, the values."""
    content = gzip.decompress(path.read_bytes())
    dimensions = content[3]
    if content[:3] != b"\0\0\x08":
        raise SystemExit(f"{path} is no IDX file of bytes: it begins with {content[:4]!r}")
    shape = np.frombuffer(content, ">i4", dimensions, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape).copy()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where the four files go")
    fetch(parser.parse_args().folder)


if __name__ == "__main__":
    main()
