"""What both training scripts need: images, a learning-rate schedule, averaged weights, a loop that resumes."""

from __future__ import annotations

import argparse
import json
import math
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from coupfast.data import load_images
from coupfast.models.checkpoints import write_safetensors
from coupfast_kernels.files import written_whole


def read_images(path: Path, *, train: bool) -> tuple[Tensor, Tensor]:
    """All images as uint8 (n, 3, height, width) and labels int64 (n,), from an npz or a torchvision CIFAR-10 root."""
    if path.is_dir():
        try:
            from torchvision.datasets import CIFAR10
        except ImportError as error:
            raise SystemExit('a CIFAR-10 folder is read by torchvision: pip install "coupfast[zoo]"') from error
        dataset = CIFAR10(str(path), train=train, download=False)
        return torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(dataset.targets)
    x, y = load_images(path)
    if y is None:
        raise SystemExit(f"{path} has no labels (field `labels`)")
    return (x * 255.0).round().to(torch.uint8), y


def batch_indices(position: int, batch: int, count: int, seed: int) -> Tensor:
    """The image numbers of the batch that starts after `position` images: one permutation per epoch, from the seed."""
    numbers = []
    while len(numbers) < batch:
        epoch, offset = divmod(position + len(numbers), count)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        numbers += order[offset : offset + batch - len(numbers)].tolist()
    return torch.tensor(numbers)


def warmup_cosine(progress: float, *, warmup: float) -> float:
    """A factor on the learning rate: linear from 0 over the share `warmup` of the run, then a cosine to 0."""
    if progress < warmup:
        return progress / warmup
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, (progress - warmup) / (1.0 - warmup))))


class AveragedWeights:
    """Exponential moving average of the parameters; buffers (running statistics) are copied as they are."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.weights = {name: value.detach().clone() for name, value in module.state_dict().items()}

    def update(self, module: nn.Module) -> None:
        self.updates += 1
        # The usual ramp: an average of few updates must not remember the initial weights.
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        parameters = dict(module.named_parameters())
        for name, value in module.state_dict().items():
            if name in parameters:
                self.weights[name].lerp_(value.detach(), 1.0 - decay)
            else:
                self.weights[name].copy_(value)


def add_training_arguments(parser: argparse.ArgumentParser, *, lr: float, batch: int, ema: float) -> None:
    add = parser.add_argument
    add("--data", type=Path, required=True, help="training images: npz (jpeg, offsets, labels) or torchvision root")
    add(
        "--run",
        type=Path,
        required=True,
        help="folder of the run: state.pt (to resume), log.jsonl, weights.safetensors",
    )
    add("--init", type=Path, help="start from this safetensors file; its configuration replaces the size options")
    add("--images", type=int, help="length of the run in training images, across resumes (one of --images, --minutes)")
    add("--minutes", type=float, help="length of the run in minutes of training time, across resumes")
    add("--batch", type=int, default=batch, help="images per step (default: %(default)s)")
    add("--lr", type=float, default=lr, help="peak learning rate; warm-up, then cosine to 0 (default: %(default)s)")
    add("--warmup", type=float, default=0.02, help="share of the run spent warming up (default: %(default)s)")
    add("--ema", type=float, default=ema, help="decay per step of the averaged weights (default: %(default)s)")
    add("--save-minutes", type=float, default=5.0, help="minutes between saves (default: %(default)s)")
    add("--log-steps", type=int, default=100, help="steps between lines of the log (default: %(default)s)")
    add("--seed", type=int, default=0, help="order of images and all draws (default: %(default)s)")
    add("--bf16", action="store_true", help="bfloat16 autocast; float32 otherwise")
    _add_device_arguments(parser)


def add_evaluation_arguments(parser: argparse.ArgumentParser, *, batch: int) -> None:
    add = parser.add_argument
    add("--weights", type=Path, required=True, help="safetensors written by `train`")
    add("--data", type=Path, required=True, help="test images: npz (jpeg, offsets, labels) or torchvision root")
    add("--first", type=int, default=0, help="number of the first image (default: %(default)s)")
    add("--batch", type=int, default=batch, help="images per call (default: %(default)s)")
    _add_device_arguments(parser)


def _add_device_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, … (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")


def run(parser: argparse.ArgumentParser, argv: list[str] | None) -> None:
    """Call the `function` of the command that was given."""
    args = parser.parse_args(argv)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    args.function(args)


def train(
    args: argparse.Namespace,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: Mapping[str, object],
    loss_of_batch: Callable[[Tensor, Tensor, torch.Generator], Tensor],
) -> None:
    """Run or resume the training that `args` describes; SIGINT and SIGTERM save and end it.

    Args:
        loss_of_batch: (uint8 images, labels, generator) → scalar loss.
    """
    if (args.images is None) == (args.minutes is None):
        raise SystemExit("give the length of the run as exactly one of --images and --minutes")
    device = torch.device(args.device)
    on_cuda = device.type == "cuda"
    x, y = read_images(args.data, train=True)
    x, y = x.to(device), y.to(device)
    generator = torch.Generator(device).manual_seed(args.seed)
    average = AveragedWeights(model, args.ema)
    position, step, seconds = 0, 0, 0.0

    state_path, log_path = args.run / "state.pt", args.run / "log.jsonl"
    args.run.mkdir(parents=True, exist_ok=True)
    if state_path.exists():
        state = torch.load(state_path, map_location=device, weights_only=True)
        if state["config"] != dict(config):
            raise SystemExit(f"{state_path} belongs to another network: {state['config']}, asked for {dict(config)}")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average.weights, average.updates = state["average"], state["average_updates"]
        generator.set_state(state["generator"].cpu())
        # Dropout draws from torch's own generators.
        torch.set_rng_state(state["torch_rng"][0].cpu())
        if on_cuda:
            torch.cuda.set_rng_state(state["torch_rng"][1].cpu(), device)
        position, step, seconds = state["position"], state["step"], state["seconds"]

    def save() -> None:
        state = {
            "config": dict(config),
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "average": average.weights,
            "average_updates": average.updates,
            "generator": generator.get_state(),
            "torch_rng": [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if on_cuda else [])],
            "position": position,
            "step": step,
            "seconds": seconds,
        }
        with written_whole(state_path) as partial:
            torch.save(state, partial)
        write_safetensors(args.run / "weights.safetensors", average.weights, config)

    stop = False

    def request_stop(signum: int, frame: object) -> None:
        nonlocal stop
        stop = True

    previous = {number: signal.signal(number, request_stop) for number in (signal.SIGINT, signal.SIGTERM)}
    model.train()
    saved_at, losses = time.monotonic(), []
    try:
        while not stop:
            progress = position / args.images if args.images else seconds / (60.0 * args.minutes)
            if progress >= 1.0:
                break
            started = time.monotonic()
            lr = args.lr * warmup_cosine(progress, warmup=args.warmup)
            for group in optimizer.param_groups:
                group["lr"] = lr
            chosen = batch_indices(position, args.batch, len(x), args.seed).to(device)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=args.bf16):
                loss = loss_of_batch(x[chosen], y[chosen], generator)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            average.update(model)
            losses.append(loss.detach())
            position, step = position + args.batch, step + 1
            seconds += time.monotonic() - started
            if step % args.log_steps == 0:
                mean = torch.stack(losses).mean().item()
                losses.clear()
                if not math.isfinite(mean):
                    raise SystemExit(f"the loss is {mean} at step {step}; the last saved state is {state_path}")
                line = {"step": step, "images": position, "seconds": round(seconds), "lr": lr, "loss": round(mean, 5)}
                with log_path.open("a") as log:
                    log.write(json.dumps(line) + "\n")
                print(json.dumps(line), file=sys.stderr, flush=True)
            if time.monotonic() - saved_at > 60.0 * args.save_minutes:
                save()
                saved_at = time.monotonic()
        save()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    print(json.dumps({"done": not stop, "step": step, "images": position, "weights": str(args.run / "weights.safetensors")}))
