"""How far the same image's purification moves with the batch it stands in: `python bench/batch_deviation.py`.

The noise of an image is the same to the bit in every batch; what differs is the kernels that convolution libraries choose by
batch size. Purifies the 20 CIFAR-10 images with the shipped networks in batches of 1, 3 and 20, same seed and ids, and prints
the largest absolute difference from the batch of 20, for images in [0, 1].
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from timing import environment

import coupfast
from coupfast.data import load_images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--t", type=float, default=0.06, help="purification time in (1e-5, 1] (default: %(default)s)")
    parser.add_argument("--num-steps", type=int, help="equal steps (default: the reference grid)")
    parser.add_argument("--method", default="coup", help="coup, reverse-sde or diffpure (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    options = parser.parse_args()
    x, _ = load_images("cifar10-20")
    score, classifier = coupfast.load_score("cifar10-tiny"), coupfast.load_classifier("cifar10-tiny")
    purifier = coupfast.Purifier(score, classifier, method=options.method, t=options.t, num_steps=options.num_steps)
    together = purifier(x, seed=0)
    rows = []
    for batch in (1, 3):
        pieces = [
            purifier(x[start : start + batch], seed=0, ids=range(start, min(start + batch, len(x))))
            for start in range(0, len(x), batch)
        ]
        deviation = float((torch.cat(pieces) - together).abs().max())
        rows.append({"batch": batch, "against": len(x), "max_abs": deviation})
        print(f"batches of {batch} against {len(x)}: largest difference {deviation:.2e}")
    if options.json:
        settings = {"t": options.t, "num_steps": purifier.num_steps, "method": options.method}
        record = {"settings": settings, "rows": rows, "environment": environment(torch.device("cpu"))}
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
