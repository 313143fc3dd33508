#!/usr/bin/env python
"""Train or judge a small DDPM++ score network by eps-prediction.

x_t = sqrt(alpha_bar) x_0 + sigma eps,   loss = mean (eps_hat(x_t, 999 t) - eps)^2,   t uniform in (t-min, t-max)

python scripts/train_score.py train --data train.npz --run runs/score --init tiny.safetensors --minutes 60
python scripts/train_score.py evaluate --weights runs/score/weights.safetensors --data test.npz --count 200
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
from coupfast.models.ddpmpp import DDPMpp
from coupfast.models.from_file import score_from_file
from coupfast.models.zoo import load_score
from coupfast.sde import VPSDE


def rates(t: Tensor) -> tuple[Tensor, Tensor]:
    """sqrt(alpha_bar) and sigma at times t (batch,), shaped to multiply images."""
    sde = VPSDE()
    host = t.double().cpu().numpy()
    signal = torch.from_numpy(sde.alpha_bar(host) ** 0.5).to(t)
    noise = torch.from_numpy(sde.sigma(host)).to(t)
    return signal[:, None, None, None], noise[:, None, None, None]


def halved_mosaics(x: Tensor) -> Tensor:
    """Each image becomes four of the batch at half size, side by side: (batch, channels, height, width), sizes even.

    JPEG keeps colour at half resolution and little of the finest detail, which a network trained on such copies takes
    for noise. Halving a copy brings detail back to the scale of the pixels.
    """
    half = F.avg_pool2d(x, 2)
    top, bottom = torch.cat([half, half.roll(1, 0)], dim=3), torch.cat([half.roll(2, 0), half.roll(3, 0)], dim=3)
    return torch.cat([top, bottom], dim=2)


def network(config: dict[str, object], *, dropout: float) -> DDPMpp:
    arguments = {name: value for name, value in config.items() if name != "arch"}
    return DDPMpp(**arguments, dropout=dropout)  # type: ignore[arg-type]


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    if args.init is not None:
        initial = score_from_file(args.init)
        model = network(initial.config, dropout=args.dropout)
        model.load_state_dict(initial.state_dict())
    else:
        model = DDPMpp(
            args.nf,
            args.ch_mult,
            args.num_res_blocks,
            args.attn_resolutions,
            args.image_size,
            args.channels,
            dropout=args.dropout,
        )
    # channels_last: a quarter faster on CPUs, where most of the training of small networks happens.
    model = model.to(args.device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.weight_decay)

    def loss_of_batch(x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        def uniform(*shape: int) -> Tensor:
            return torch.rand(shape, generator=generator, device=x.device)

        count = len(x)
        x_0 = x.to(torch.float32) / 127.5 - 1.0
        x_0 = torch.where(uniform(count, 1, 1, 1) < 0.5, x_0.flip(3), x_0)
        if args.mosaics > 0:
            # Drawn for every image: which are mosaics is independent of the times below.
            x_0 = torch.where(uniform(count, 1, 1, 1) < args.mosaics, halved_mosaics(x_0), x_0)
        # Stratified over the batch: the same law for every image, less variance of the loss.
        position = (torch.arange(count, device=x.device) + uniform(count)) / count
        t = args.t_min + (args.t_max - args.t_min) * position
        signal, noise = rates(t)
        eps = torch.randn(x_0.shape, generator=generator, device=x.device)
        x_t = (signal * x_0 + noise * eps).contiguous(memory_format=torch.channels_last)
        return (model(x_t, 999.0 * t).float() - eps).square().mean()

    training.train(args, model, optimizer, model.config, loss_of_batch)


def evaluate(args: argparse.Namespace) -> None:
    model = load_score(args.weights, device=args.device)
    x, _ = training.read_images(args.data, train=False)
    x_0 = x[args.first : args.first + args.count].to(torch.float32) / 127.5 - 1.0
    if len(x_0) < args.count:
        raise SystemExit(f"{args.data} has {len(x)} images, not {args.first + args.count}")
    results = []
    for number, t in enumerate(args.t):
        # A generator per time: the noise of one time does not depend on which others are asked for.
        generator = torch.Generator().manual_seed(args.seed * 1000 + number)
        eps = torch.randn(x_0.shape, generator=generator)
        errors, signal, noise = [], *rates(torch.tensor([t]))
        for images, e in zip(x_0.split(args.batch), eps.split(args.batch), strict=True):
            x_t = (signal * images + noise * e).to(args.device)
            eps_hat = model(x_t, torch.full((len(x_t),), 999.0 * t, device=args.device)).cpu()
            errors.append((eps_hat - e).double().square().mean(dim=(1, 2, 3)))
        mse = torch.cat(errors)
        # x_0 has range 2: a denoised image differs from it by sigma / sqrt(alpha_bar) times the error of eps_hat.
        psnr = 10.0 * math.log10(4.0 / (float(noise / signal) ** 2 * mse.mean().item()))
        standard_error = (mse.std() / math.sqrt(len(mse))).item()
        results.append({"t": t, "eps_mse": mse.mean().item(), "standard_error": standard_error, "psnr_db": psnr})
    report = {
        "weights": args.weights.name,
        "sha256": file_sha256(args.weights),
        "images": [args.first, args.first + args.count],
        "seed": args.seed,
        "results": results,
    }
    print(json.dumps(report, indent=1))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)

    command = commands.add_parser("train", help="train, or resume the run in --run")
    training.add_training_arguments(command, lr=4e-4, batch=32, ema=0.998)
    add = command.add_argument
    add("--weight-decay", type=float, default=0.0, help="of AdamW (default: %(default)s)")
    add("--dropout", type=float, default=0.0, help="in residual blocks, probability (default: %(default)s)")
    add("--mosaics", type=float, default=0.0, help="share of images replaced by four at half size (default: %(default)s)")
    add("--t-min", type=float, default=0.001, help="smallest time, in (0, 1) (default: %(default)s)")
    add("--t-max", type=float, default=0.201, help="largest time, in (0, 1] (default: %(default)s)")
    add("--nf", type=int, default=32, help="channels of the first level (default: %(default)s)")
    add("--ch-mult", type=int, nargs="+", default=[1, 2, 2], help="channel factors per level (default: %(default)s)")
    add("--num-res-blocks", type=int, default=1, help="blocks per level (default: %(default)s)")
    add("--attn-resolutions", type=int, nargs="*", default=[16], help="maps with attention, px (default: %(default)s)")
    add("--image-size", type=int, default=32, help="height and width, px (default: %(default)s)")
    add("--channels", type=int, default=3, help="image channels (default: %(default)s)")
    command.set_defaults(function=train)

    command = commands.add_parser("evaluate", help="print the held-out eps-MSE at each time as JSON")
    training.add_evaluation_arguments(command, batch=50)
    add = command.add_argument
    add("--count", type=int, default=200, help="number of images (default: %(default)s)")
    add("--t", type=float, nargs="+", default=[0.01, 0.03, 0.06, 0.1, 0.15], help="times (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the noise; equal seeds judge two networks on the same noise")
    command.set_defaults(function=evaluate)

    training.run(parser, argv)


if __name__ == "__main__":
    main()
