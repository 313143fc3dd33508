"""What has to be as it was shipped, to the bit: the noise and the weights."""

from __future__ import annotations

import hashlib
from importlib.resources import as_file, files
from typing import Any

import torch

from coupfast.models.checkpoints import file_sha256, listed_sha256
from coupfast_kernels.noise import philox_4x32_10_ref, standard_normal_ref

# Random123's known answers for Philox 4x32-10: counter, key, result.
PHILOX_KNOWN_ANSWERS: tuple[tuple[tuple[int, ...], tuple[int, int], tuple[int, ...]], ...] = (
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)

# SHA-256 of the little-endian float32 bytes of `_normals`: the noise is defined bit for bit.
NORMALS_SHA256 = "d60603c9e9fc9f11dfe20f74fde2f0aa1d23113a9bc2e05adb323dc731d9c0a0"


def check_noise(device: torch.device) -> dict[str, Any]:
    for counter, key, expected in PHILOX_KNOWN_ANSWERS:
        words = tuple(int(word) for word in philox_4x32_10_ref(tuple(torch.tensor(c, device=device) for c in counter), key))
        if words != expected:
            found, wanted = (" ".join(f"{word:08x}" for word in answer) for answer in (words, expected))
            return {"device": str(device), "problem": f"Philox 4x32-10 gives {found}, Random123 has {wanted}"}
    digest = hashlib.sha256(_normals(device).cpu().numpy().astype("<f4").tobytes()).hexdigest()
    if digest != NORMALS_SHA256:
        return {"device": str(device), "problem": f"the normals' SHA-256 is {digest}, expected {NORMALS_SHA256}"}
    return {"device": str(device), "problem": None}


def _normals(device: torch.device) -> torch.Tensor:
    ids = torch.tensor([0, 1, 2**32 - 1], device=device)
    draw = torch.tensor([0, 7, 2**32 - 1], device=device)
    step = torch.tensor([0, 99, 2**32 - 1], device=device)
    return standard_normal_ref((3, 3, 32, 32), seed=0x0123456789ABCDEF, ids=ids, draw=draw, step=step)


def check_weights() -> list[dict[str, Any]]:
    """Every file of `SHA256SUMS` against its sum, and every weight file against the list."""
    folder = files("coupfast.models") / "weights"
    try:
        sums = listed_sha256((folder / "SHA256SUMS").read_text())
    except (OSError, ValueError) as error:
        return [{"file": "SHA256SUMS", "problem": f"cannot be read ({error}); install coupfast again"}]
    present = {entry.name for entry in folder.iterdir() if entry.name.endswith(".safetensors")}
    rows = []
    for name in sorted(sums.keys() | present):
        problem = None
        if name not in present:
            problem = "missing; install coupfast again"
        elif name not in sums:
            problem = "not in SHA256SUMS"
        else:
            with as_file(folder / name) as path:
                found = file_sha256(path)
            if found != sums[name]:
                problem = f"damaged: SHA-256 {found}, expected {sums[name]}; install coupfast again"
        rows.append({"file": name, "problem": problem})
    return rows
