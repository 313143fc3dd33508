#!/usr/bin/env python
"""Train or judge a small WideResNet or DMWideResNet classifier.

SGD with momentum, label smoothing, flips and shifts; the averaged weights are kept.

    python scripts/train_classifier.py train --data train.npz --run runs/classifier --images 900000
    python scripts/train_classifier.py evaluate --weights runs/classifier/weights.safetensors --data test.npz
"""

from __future__ import annotations

import argparse
import json
import math

import torch
import torch.nn.functional as F
import training
from torch import Tensor

from coupfast.models.checkpoints import file_sha256
from coupfast.models.dm_wide_resnet import ACTIVATIONS, DMWideResNet
from coupfast.models.from_file import classifier_from_file
from coupfast.models.wide_resnet import WideResNet
from coupfast.models.zoo import load_classifier


def shifted(x: Tensor, pixels: int, generator: torch.Generator) -> Tensor:
    """Every image moved by up to `pixels` in both directions, drawn separately, black where it came from outside."""
    count, _, height, width = x.shape
    padded = F.pad(x, (pixels,) * 4)
    offsets = torch.randint(0, 2 * pixels + 1, (2, count), generator=generator, device=x.device)
    rows = offsets[0][:, None] + torch.arange(height, device=x.device)  # [count, height]
    columns = offsets[1][:, None] + torch.arange(width, device=x.device)  # [count, width]
    numbers = torch.arange(count, device=x.device)[:, None, None]
    # Indexing with arrays on both sides of a slice puts the sliced axis last.
    return padded[numbers, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    if args.init is not None:
        model = classifier_from_file(args.init)
        if not isinstance(model, (WideResNet, DMWideResNet)):
            raise SystemExit(f"{args.init} holds a {type(model).__name__}; this script trains WideResNet and DMWideResNet")
    elif args.arch == "DMWideResNet":
        model = DMWideResNet(args.depth, args.widen_factor, args.num_classes, args.activation)
    else:
        model = WideResNet(args.depth, args.widen_factor, args.num_classes)
    model = model.to(args.device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=args.lr, momentum=args.momentum, weight_decay=args.weight_decay, nesterov=True
    )

    def loss_of_batch(x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        x = x.to(torch.float32) / 255.0
        flip = torch.rand(len(x), 1, 1, 1, generator=generator, device=x.device) < 0.5
        x = shifted(torch.where(flip, x.flip(3), x), args.shift, generator)
        logits = model(x.contiguous(memory_format=torch.channels_last))
        return F.cross_entropy(logits.float(), y, label_smoothing=args.label_smoothing)

    training.train(args, model, optimizer, model.config, loss_of_batch)


def evaluate(args: argparse.Namespace) -> None:
    model = load_classifier(args.weights, device=args.device)
    x, y = training.read_images(args.data, train=False)
    last = len(x) if args.count is None else args.first + args.count
    if last > len(x):
        raise SystemExit(f"{args.data} has {len(x)} images, not {last}")
    x, y = x[args.first : last], y[args.first : last]
    correct = 0
    for images, labels in zip(x.split(args.batch), y.split(args.batch), strict=True):
        logits = model(images.to(args.device, torch.float32) / 255.0)
        correct += int((logits.argmax(dim=1).cpu() == labels).sum())
    accuracy = correct / len(x)
    report = {
        "weights": args.weights.name,
        "sha256": file_sha256(args.weights),
        "images": [args.first, last],
        "correct": correct,
        "accuracy": accuracy,
        "standard_error": math.sqrt(accuracy * (1.0 - accuracy) / len(x)),
    }
    print(json.dumps(report, indent=1))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)

    command = commands.add_parser("train", help="train, or resume the run in --run")
    training.add_training_arguments(command, lr=0.2, batch=128, ema=0.998)
    add = command.add_argument
    add("--momentum", type=float, default=0.9, help="of SGD (default: %(default)s)")
    add("--weight-decay", type=float, default=5e-4, help="of SGD (default: %(default)s)")
    add("--label-smoothing", type=float, default=0.1, help="probability given to other classes (default: %(default)s)")
    add("--shift", type=int, default=4, help="largest random shift, px (default: %(default)s)")
    add(
        "--arch",
        choices=("WideResNet", "DMWideResNet"),
        default="WideResNet",
        help="the latter normalises inside and may have another activation (default: %(default)s)",
    )
    silu = "of a DMWideResNet; a WideResNet has relu (default: %(default)s)"
    add("--activation", choices=sorted(ACTIVATIONS), default="silu", help=silu)
    add("--depth", type=int, default=16, help="layers, 6 n + 4 (default: %(default)s)")
    add("--widen-factor", type=int, default=2, help="channel factor (default: %(default)s)")
    add("--num-classes", type=int, default=10, help="number of logits (default: %(default)s)")
    command.set_defaults(function=train)

    command = commands.add_parser("evaluate", help="print the held-out accuracy as JSON")
    training.add_evaluation_arguments(command, batch=100)
    command.add_argument("--count", type=int, help="number of images (default: all)")
    command.set_defaults(function=evaluate)

    training.run(parser, argv)


if __name__ == "__main__":
    main()
