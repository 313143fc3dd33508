"""Images in and out: named test sets, folders and archives as float32 tensors in [0, 1]; PNG files back.

Nothing is unpickled. Pillow, torchvision and foolbox are imported only where a source needs them.
"""

import functools
import importlib.util
import io
import re
import warnings
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coupfast.cache import cache_directory
from coupfast.wording import counted

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")

#: Other names that folders of CIFAR-10 images go by.
_CIFAR10_ALIASES = {"plane": "airplane", "aeroplane": "airplane", "car": "automobile", "auto": "automobile"}
#: What torchvision downloads and unpacks: where it is, its name, its MD5.
_CIFAR10_ARCHIVE = ("https://www.cs.toronto.edu/~kriz", "cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a")
#: How far beyond [0, 1] rounding may carry a value: a few float32 ulps of 1. It is clipped.
_ROUNDING = 1e-6
#: Some images of a source: "cifar10-20[16:20]".
_PART = re.compile(r"(?P<source>.+)\[(?P<start>\d+):(?P<stop>\d+)\]")

#: Named sets of its images and how many they are.
CIFAR10_SETS = {"cifar10-20": 20, "cifar10-512": 512, "cifar10": 10_000}


def load_images(
    source: str | Path,
    *,
    limit: int | None = None,
    root: str | Path | None = None,
    classes: Sequence[str] = CIFAR10_CLASSES,
    channels: int | None = None,
    labels_needed: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Load images and, where the source has them, labels.

    Args:
        source: One of

            * ``"cifar10-20"``: the first 20 CIFAR-10 test images, which the foolbox wheel ships (no download);
            * ``"cifar10-512"``: the 512 test images of the paper, in the order of `cifar10_512_indices`;
            * ``"cifar10"``: all 10,000 test images (these two are read, and downloaded, by torchvision);
            * a folder of PNG or JPEG images in the order of `image_files`, or one such image. Subfolders, if any,
              are classes: each is named by its label (``3``) or by an entry of `classes` (``cat``), in any case;
            * an ``.npz`` file with ``x`` or ``images`` (uint8, or floats in [0, 1]; NCHW or NHWC, 1 or 3 channels) or with
              ``jpeg``, ``offsets`` (JPEG files end to end, image i in ``jpeg[offsets[i]:offsets[i + 1]]``),
              and optionally ``y`` or ``labels``;
            * any of these with ``[start:stop]`` behind it, for its images start to stop − 1, counted from 0.
        limit: Keep at most this many images, the first ones. More than a named set has is an error, more than a folder or file
            has is warned of.
        root: Where torchvision looks for CIFAR-10 and downloads it to; default ``$XDG_CACHE_HOME/coupfast/data``
            (``~/.cache/coupfast/data``). Only for ``"cifar10"`` and ``"cifar10-512"``.
        classes: The class names in label order, to understand the names of a folder's subfolders. CIFAR-10's are also
            understood as ``plane`` and ``car``.
        channels: 1 or 3: grey images become three equal channels, images of three equal channels become grey. None leaves
            arrays as they are and makes RGB of image files, with a warning where that multiplies grey ones.
        labels_needed: Whether subfolders that name no label are an error. Where not, there are no labels then.

    Returns:
        ``(x, y)``: x in [0, 1], float32, on the CPU, shape (n, 1 or 3, height, width); y int64, shape (n,), or None where the
        source has no labels (None rather than a made-up label, so that no accuracy is computed by accident).

    Raises:
        FileNotFoundError: if `source` is neither a name nor a path that exists, or is a set that is not here and cannot be
            downloaded; the message says which file to put where.
        ValueError: if the images differ in size, are not 8-bit RGB or grey, or hold values outside [0, 1] beyond rounding.
        ImportError: if the package that a source needs is missing; the message names the extra.

    Example:
        >>> from coupfast.data import load_images
        >>> x, y = load_images("cifar10-20", limit=2)
        >>> x.shape, y.tolist()
        (torch.Size([2, 3, 32, 32]), [3, 8])
    """
    if limit is not None and limit < 1:
        raise ValueError(f"`limit` is a number of images, at least 1, got {limit}; leave it out to load all")
    if channels not in (None, 1, 3):
        raise ValueError(f"`channels` is 1 (grey), 3 (RGB) or None, got {channels!r}")
    read = functools.partial(_read, root=root, classes=tuple(classes), channels=channels, labels_needed=labels_needed)
    named_count(source)  # a part that a named set does not have is found out before it is read
    whole, part = part_of(source)
    if part is None:
        x, y = read(source, limit)
    else:
        x, y = read(whole, part.stop)
        _check_stop(source, part, len(x))
        chosen = slice(part.start, part.stop)
        x, y = x[chosen][:limit], None if y is None else y[chosen][:limit]
    if limit is not None and len(x) < limit:
        warnings.warn(f"{source} has {counted(len(x), 'image')}, fewer than limit={limit}", UserWarning, stacklevel=2)
    return x, y


def named_count(source: str | Path) -> int | None:
    """How many images a named set, or a part of one, has; None of other sources, which are read to tell.

    Raises:
        ValueError: if the set has no such part.
    """
    whole, part = part_of(source)
    count = CIFAR10_SETS.get(whole) if isinstance(whole, str) else None
    if count is None or part is None:
        return count
    _check_stop(source, part, count)
    return len(part)


def part_of(source: str | Path) -> tuple[str | Path, range | None]:
    """A source without `[start:stop]`, and which of its images are asked for; None: all."""
    found = None if Path(source).exists() else _PART.fullmatch(str(source))
    if found is None:
        return source, None
    part = range(int(found["start"]), int(found["stop"]))
    if not part:
        raise ValueError(f"{source} asks for no image: [start:stop] are those from start to stop - 1, counted from 0")
    return found["source"], part


def are_jpeg(source: str | Path) -> bool:
    """Whether the images of a source are JPEG files: not quite the pixels that were compressed.

    Args:
        source: As for `load_images`; it need not be read.

    Returns:
        True for an .npz with the field ``jpeg``, and for a folder or file of which any image is a JPEG.
    """
    whole = Path(part_of(source)[0])
    if whole.is_dir():
        return any(_is_jpeg(file) for file in image_files(whole))
    if whole.suffix == ".npz" and zipfile.is_zipfile(whole):
        with zipfile.ZipFile(whole) as archive:
            return "jpeg.npy" in archive.namelist()
    return _is_jpeg(whole)


def _is_jpeg(file: Path) -> bool:
    return file.suffix.lower() in (".jpg", ".jpeg")


def _check_stop(source: str | Path, part: range, count: int) -> None:
    if part.stop > count:
        raise ValueError(f"{source} asks for images up to {part.stop - 1}, counted from 0, and there are {count}")


def _read(
    source: str | Path,
    limit: int | None,
    root: str | Path | None,
    classes: tuple[str, ...],
    channels: int | None,
    labels_needed: bool,
) -> tuple[Tensor, Tensor | None]:
    if source in CIFAR10_SETS:
        count = CIFAR10_SETS[str(source)]
        if limit is not None and limit > count:
            raise ValueError(f"`limit` asks for {limit} images, and {source} has {count}")
        if source == "cifar10-20":
            x, labels = _foolbox_cifar10(limit)
        else:
            pixels, numbers = _torchvision_cifar10(str(source), root)
            if source == "cifar10-512":
                chosen = cifar10_512_indices()
                pixels, numbers = pixels[chosen], numbers[chosen]
            x, labels = _to_float(pixels[:limit], str(source)), torch.from_numpy(numbers[:limit])
        return _with_channels(x, channels, str(source)), labels

    path = Path(source).expanduser()
    if path.is_dir():
        return _folder(path, limit, classes, channels, labels_needed)
    if not path.exists():
        raise FileNotFoundError(
            f"`source` is {str(source)!r}: no file or folder of that name, and not one of {', '.join(CIFAR10_SETS)}"
        )
    if path.suffix.lower() == ".npz":
        x, y = _npz(path, limit, channels)
        return _with_channels(x, channels, str(path)), y
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return _image_file(path, channels), None
    raise ValueError(f"{path} has the suffix {path.suffix!r}; expected .npz, {', '.join(IMAGE_SUFFIXES)} or a folder")


def save_images(
    x: Tensor,
    directory: str | Path,
    names: Sequence[str],
    *,
    npz: str | None = None,
    overwrite: bool = False,
) -> list[Path]:
    """Write each image as an 8-bit PNG, ``directory/name.png``, and optionally all of them exactly as one ``.npz``.

    Args:
        x: Images in [0, 1], shape (n, 3, height, width), or (n, 1, height, width) for grey PNGs. A PNG holds
            ``round(255 x)``, an error of up to 1/510:
            evaluate the tensor or the ``.npz``, look at the PNG.
        directory: Made if it does not exist.
        names: One distinct file name an image, without a suffix.
        npz: Name of an archive in `directory` with ``images`` (float32, as given) and ``names``;
            `load_images` reads it back bit for bit.
        overwrite: Replace files that exist.

    Returns:
        The paths written, in the order of `x`; the archive, if any, is last.

    Raises:
        FileExistsError: if a file exists and `overwrite` is False; nothing is written then.
        ValueError: if `x` has another shape or values outside [0, 1], or the names do not fit.

    Example:
        >>> import tempfile, torch
        >>> from coupfast.data import load_images, save_images
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     written = save_images(torch.rand(2, 3, 8, 8), folder, ["first", "second"], npz="exact.npz")
        ...     [path.name for path in written], load_images(written[-1])[0].shape
        (['first.png', 'second.png', 'exact.npz'], torch.Size([2, 3, 8, 8]))
    """
    Image = _pillow()
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        raise ValueError(f"`x` must have the shape (n, 3, height, width), or (n, 1, height, width), got {tuple(x.shape)}")
    if len(names) != len(x) or len(set(names)) != len(names):
        raise ValueError(
            f"`names` needs one distinct name an image: {len(x)} images, {len(names)} names, {len(set(names))} distinct"
        )
    for name in names:
        if not name or name != Path(name).name:
            raise ValueError(f"{name!r} in `names` is not a plain file name (no folders)")
    images = x.detach().to(device="cpu", dtype=torch.float32).numpy()
    images = _in_range(images, "`x`")

    folder = Path(directory)
    paths = [folder / f"{name}.png" for name in names]
    if npz is not None:
        paths.append(folder / npz)
    if not overwrite:
        existing = [str(path) for path in paths if path.exists()]
        if existing:
            raise FileExistsError(
                f"{len(existing)} of {len(paths)} files exist already, the first is {existing[0]}; "
                "choose another folder or pass overwrite=True"
            )
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.rint(images * 255).astype(np.uint8).transpose(0, 2, 3, 1)
    for image, path in zip(pixels, paths, strict=False):
        Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image).save(path)
    if npz is not None:
        np.savez_compressed(paths[-1], images=images, names=np.array(list(names)))
    return paths


def image_files(folder: str | Path) -> list[Path]:
    """The PNG and JPEG files that `load_images` reads from a folder, in its order.

    Files directly in the folder sorted by name; or, if there are subfolders with images, those sorted by subfolder
    and then by name. Other files and names starting with a dot are left out.

    Args:
        folder: Where they lie.

    Returns:
        Their paths.

    Raises:
        ValueError: if there is no image, or images lie both in the folder and in its subfolders.

    Example:
        >>> import tempfile, torch
        >>> from coupfast.data import image_files, save_images
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     written = save_images(torch.rand(2, 3, 8, 8), folder, ["b", "a"])
        ...     [path.name for path in image_files(folder)]
        ['a.png', 'b.png']
    """
    folder = Path(folder)
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    flat = _images_among(entries)
    nested = [file for entry in entries if entry.is_dir() for file in _images_among(sorted(entry.iterdir()))]
    if flat and nested:
        raise ValueError(
            f"{folder} has {len(flat)} images of its own and {len(nested)} in subfolders; "
            "keep either (subfolders are classes)"
        )
    if not flat and not nested:
        raise ValueError(f"{folder} has no {', '.join(IMAGE_SUFFIXES)} files, nor have its subfolders")
    return flat or nested


def cifar10_512_indices() -> np.ndarray:
    """Which CIFAR-10 test images the paper evaluates on: int64, shape (512,), in its order (data seed 0).

    Returns:
        Indices into the test set.

    Raises:
        RuntimeError: if this numpy draws other numbers from the same seed.

    Example:
        >>> from coupfast.data import cifar10_512_indices
        >>> cifar10_512_indices().shape
        (512,)
    """
    indices = np.random.RandomState(0).choice(10000, 512, replace=False)  # noqa: NPY002  the published subset is this
    expected = [9394, 898, 2398, 5906, 2343]
    if indices[:5].tolist() != expected:
        raise RuntimeError(
            f"numpy {np.__version__} draws {indices[:5].tolist()} first, the published subset starts with {expected}; "
            "install another numpy release"
        )
    return indices.astype(np.int64)


def _images_among(entries: Iterable[Path]) -> list[Path]:
    return [
        entry
        for entry in entries
        if entry.suffix.lower() in IMAGE_SUFFIXES and not entry.name.startswith(".") and entry.is_file()
    ]


def _foolbox_cifar10(limit: int | None) -> tuple[Tensor, Tensor]:
    # find_spec reads where foolbox lies without running it: it imports every framework it finds.
    spec = importlib.util.find_spec("foolbox")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError('"cifar10-20" are images that foolbox ships; install it with: pip install "coupfast[demo]"')
    folder = Path(spec.submodule_search_locations[0]) / "data"
    files = sorted(folder.glob("cifar10_*.png"))
    labels = [re.fullmatch(r"cifar10_(\d\d)_(\d)", file.stem) for file in files]
    if len(files) != 20 or not all(labels):
        raise ValueError(
            f"expected the 20 files cifar10_NN_LABEL.png in {folder}, found {len(files)} files cifar10_*.png; "
            'install foolbox 3.3: pip install "foolbox==3.3.4"'
        )
    y = torch.tensor([int(label[2]) for label in labels[:limit] if label], dtype=torch.int64, device="cpu")
    return _to_float(_decode(files[:limit], 3, "cifar10-20"), "cifar10-20"), y


def _torchvision_cifar10(source: str, root: str | Path | None) -> tuple[np.ndarray, np.ndarray]:
    try:
        from torchvision.datasets import CIFAR10  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ModuleNotFoundError as error:
        raise ImportError(
            f'CIFAR-10 is read by torchvision, which is missing ({error}); install it with: pip install "coupfast[zoo]"'
        ) from error
    except RuntimeError as error:
        # What a torchvision built for another torch raises while registering its operators.
        raise ImportError(
            f"torchvision does not work with the installed torch {torch.__version__} ({error}); "
            "install the torchvision that belongs to it"
        ) from error
    if root is None:
        root = cache_directory("data")
    try:
        dataset = CIFAR10(str(Path(root).expanduser()), train=False, download=True)
    except Exception as error:  # of many types, where the network, the disk or the archive fails, and none names the set
        site, archive, md5 = _CIFAR10_ARCHIVE
        raise FileNotFoundError(
            f"the images {source!r} are of the CIFAR-10 test set, which is not in {root} and could not be downloaded "
            f"({' '.join(str(error).split()) or type(error).__name__}); put the file {archive} (from {site}, MD5 {md5}) into "
            f"the folder {root}, or give `root` a folder that has it"
        ) from error
    images, labels = dataset.data, np.asarray(dataset.targets, dtype=np.int64)
    if images.shape != (10000, 32, 32, 3) or images.dtype != np.uint8 or labels.shape != (10000,):
        raise ValueError(
            f"the CIFAR-10 test set in {root} should be 10,000 uint8 images of 32x32x3, "
            f"found {images.shape} {images.dtype} and {labels.shape} labels; remove it and load it again"
        )
    return images.transpose(0, 3, 1, 2), labels


def _image_file(path: Path, channels: int | None) -> Tensor:
    return _to_float(_decode([path], channels, str(path)), str(path))


def _folder(
    folder: Path, limit: int | None, classes: tuple[str, ...], channels: int | None, labels_needed: bool
) -> tuple[Tensor, Tensor | None]:
    files = image_files(folder)[:limit]
    y = None
    if files[0].parent != folder:
        labels = [_label(file.parent.name, classes, labels_needed) for file in files]
        known = [label for label in labels if label is not None]
        if len(known) == len(labels):
            y = torch.tensor(known, dtype=torch.int64, device="cpu")
    return _to_float(_decode(files, channels, str(folder)), str(folder)), y


def _label(name: str, classes: tuple[str, ...], needed: bool) -> int | None:
    # Never the rank of the subfolder: with one class missing, every label after it would be wrong.
    if name.isascii() and name.isdigit():
        return int(name)
    if name in classes:
        return classes.index(name)
    lower = [entry.lower() for entry in classes]
    word = name.lower()
    if classes == CIFAR10_CLASSES:
        word = _CIFAR10_ALIASES.get(word, word)
    if lower.count(word) == 1:
        return lower.index(word)
    if not needed:
        return None
    raise ValueError(
        f"the subfolder {name!r} is neither a label (0, 1, ...) nor one of the {len(classes)} class names "
        f"({', '.join(classes[:10])}{', ...' if len(classes) > 10 else ''}); "
        "rename it, or pass `classes`, the names in label order"
    )


def _npz(path: Path, limit: int | None, channels: int | None) -> tuple[Tensor, Tensor | None]:
    try:
        archive = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not an .npz archive that numpy reads ({error})") from error
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise ValueError(f"{path} is not an .npz archive but a single array; write it with np.savez(path, x=...)")
    with archive:
        fields = set(archive.files)
        image_fields = sorted(fields & {"x", "images", "jpeg"})
        label_fields = sorted(fields & {"y", "labels"})
        if len(image_fields) != 1 or len(label_fields) > 1 or ("jpeg" in fields and "offsets" not in fields):
            raise ValueError(
                f"{path} has the fields {', '.join(sorted(fields)) or '(none)'}; expected x or images, "
                "or jpeg and offsets, and at most one of y and labels"
            )
        if image_fields == ["jpeg"]:
            jpeg, offsets = archive["jpeg"], archive["offsets"]
            count = len(offsets) - 1
            images = _decode(_jpeg_files(jpeg, offsets, limit, path), channels, str(path))
        else:
            images = archive[image_fields[0]]
            count = len(images) if images.ndim else 0
            images = _channels_first(images, path)[:limit]
        labels = archive[label_fields[0]] if label_fields else None
    x = _to_float(images, str(path))
    if labels is None:
        return x, None
    if labels.shape != (count,) or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"{label_fields[0]} in {path} must be {count} integers, one an image, "
            f"found the shape {labels.shape} of {labels.dtype}"
        )
    return x, torch.from_numpy(labels[:limit].astype(np.int64))


def _jpeg_files(jpeg: np.ndarray, offsets: np.ndarray, limit: int | None, path: Path) -> list[io.BytesIO]:
    valid = (
        jpeg.dtype == np.uint8
        and jpeg.ndim == 1
        and np.issubdtype(offsets.dtype, np.integer)
        and offsets.ndim == 1
        and len(offsets) > 1
        and offsets[0] >= 0
        and offsets[-1] <= len(jpeg)
        and bool((np.diff(offsets.astype(np.int64)) > 0).all())
    )
    if not valid:
        raise ValueError(
            f"{path} must hold JPEG files end to end in `jpeg` (uint8) and n + 1 rising positions in `offsets`; "
            f"found jpeg {jpeg.dtype}{list(jpeg.shape)}, offsets {offsets.dtype}{list(offsets.shape)}"
        )
    count = len(offsets) - 1 if limit is None else min(limit, len(offsets) - 1)
    return [io.BytesIO(jpeg[offsets[i] : offsets[i + 1]].tobytes()) for i in range(count)]


def _channels_first(images: np.ndarray, path: Path) -> np.ndarray:
    if images.ndim == 4 and (images.shape[1] in (1, 3)) != (images.shape[3] in (1, 3)):
        return images if images.shape[1] in (1, 3) else images.transpose(0, 3, 1, 2)
    advice = "; grey images need an axis of their one channel, x[:, None]" if images.ndim == 3 else ""
    raise ValueError(
        f"the images in {path} must have the shape (n, 3, height, width) or (n, height, width, 3), or with 1 in the place of "
        f"3, found {images.shape}{advice}"
    )


def _with_channels(x: Tensor, channels: int | None, source: str) -> Tensor:
    if channels is None or x.shape[1] == channels:
        return x
    if channels == 3:
        return x.expand(-1, 3, -1, -1).contiguous()
    if not bool((x == x[:, :1]).all()):
        raise ValueError(f"`channels` is 1, and the images in {source} have colours; leave it out, or convert them to grey")
    return x[:, :1].contiguous()


def _decode(files: Sequence[Path | io.BytesIO], channels: int | None, source: str) -> np.ndarray:
    """uint8 images, shape (n, channels or 3, height, width), from image files of one size."""
    Image = _pillow()
    images: list[np.ndarray] = []
    grey = 0
    for index, file in enumerate(files):
        name = str(file) if isinstance(file, Path) else f"image {index}"
        try:
            with Image.open(file) as opened:
                frames = getattr(opened, "n_frames", 1)
                opened.load()
        except OSError as error:
            raise ValueError(f"{name} is not an image that Pillow reads ({error})") from error
        if frames > 1:
            raise ValueError(f"{name} has {frames} frames; expected one image a file")
        if (bits := _png_bits(file)) > 8:
            raise ValueError(
                f"{name} has the mode {opened.mode} of {bits} bits a channel; expected 8-bit RGB or grey, so convert it first "
                "(or store the images as floats in an .npz)"
            )
        transparent = "A" in opened.mode or "transparency" in opened.info
        if opened.mode not in ("RGB", "L", "P", "RGBA", "LA"):
            raise ValueError(f"{name} has the mode {opened.mode}; expected 8-bit RGB or grey, so convert it first")
        if transparent and opened.convert("RGBA").getextrema()[3] != (255, 255):
            raise ValueError(f"{name} is partly transparent; put it on a background first")
        is_grey = opened.mode in ("L", "LA")
        grey += is_grey
        if channels == 1 and not is_grey and _has_colours(opened.convert("RGB")):
            raise ValueError(f"`channels` is 1, and {name} has colours; leave it out, or convert it to grey")
        pixels = np.asarray(opened.convert("L"))[:, :, None] if channels == 1 else np.asarray(opened.convert("RGB"))
        if images and pixels.shape != images[0].shape:
            raise ValueError(
                f"{name} is {pixels.shape[1]}x{pixels.shape[0]} pixels, the first image "
                f"{images[0].shape[1]}x{images[0].shape[0]}; all images of a source need one size"
            )
        images.append(pixels)
    if channels is None and grey:
        # Behind the three functions up to `load_images`: the line that asked for the images.
        warnings.warn(
            f"{grey} of {len(images)} images in {source} are grey, and become three equal channels; channels=3 says that this "
            "is meant, channels=1 keeps grey images grey",
            UserWarning,
            stacklevel=5,
        )
    return np.stack(images).transpose(0, 3, 1, 2)


def _png_bits(file: Path | io.BytesIO) -> int:
    """Bits a channel of a PNG, from its header: Pillow gives 16-bit colours their high bytes only. 8 for other formats."""
    if isinstance(file, Path):
        with file.open("rb") as opened:
            header = opened.read(25)
    else:
        header = file.getvalue()[:25]
    return header[24] if len(header) == 25 and header.startswith(b"\x89PNG\r\n\x1a\n") else 8


def _has_colours(image: Any) -> bool:
    pixels = np.asarray(image)
    return bool((pixels != pixels[:, :, :1]).any())


def _to_float(images: np.ndarray, source: str) -> Tensor:
    if len(images) == 0:
        raise ValueError(f"{source} has no images")
    if images.dtype == np.uint8:
        return torch.from_numpy(np.ascontiguousarray(images)).to(torch.float32) / 255
    if not np.issubdtype(images.dtype, np.floating):
        raise ValueError(f"the images in {source} must be uint8, or floats in [0, 1], found {images.dtype}")
    images = _in_range(images, f"the images in {source}")
    return torch.from_numpy(np.ascontiguousarray(images, dtype=np.float32))


def _in_range(images: np.ndarray, what: str) -> np.ndarray:
    """The images, with what rounding carried beyond [0, 1] clipped."""
    if not images.size or (images.min() >= 0 and images.max() <= 1):  # written so that NaN fails
        return images
    if images.min() >= -_ROUNDING and images.max() <= 1 + _ROUNDING:
        return images.clip(0.0, 1.0)
    low, high = (np.format_float_positional(value, trim="-") for value in (images.min(), images.max()))  # all their digits
    raise ValueError(f"{what} must have values in [0, 1], found [{low}, {high}]; rescale them first")


def _pillow():  # -> PIL.Image, which mypy may not have here
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise ImportError('reading and writing images needs Pillow: pip install "coupfast[demo]"') from error
    return Image
