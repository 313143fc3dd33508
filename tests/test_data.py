import io
import struct
import sys
import types
import warnings
import zlib

import numpy as np
import pytest
import torch

from coupfast import data
from coupfast.batches import gather

Image = pytest.importorskip("PIL.Image", reason='Pillow is missing: pip install "coupfast[demo]"')


def pixels(count, height=4, width=5):
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def write_png(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


def png_16_bit(image):
    """A PNG file of 16 bits a channel; Pillow writes none in colour."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width, channels = image.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\x00" + row.astype(">u2").tobytes() for row in image)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def as_float(images):
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).to(torch.float32) / 255


class TestFoolboxImages:
    @pytest.fixture(autouse=True)
    def foolbox(self):
        if data.importlib.util.find_spec("foolbox") is None:
            pytest.skip('foolbox is missing: pip install "coupfast[demo]"')

    def test_are_the_first_20_test_images(self):
        x, y = data.load_images("cifar10-20")
        assert x.shape == (20, 3, 32, 32)
        assert x.dtype == torch.float32
        assert 0 <= x.min()
        assert x.max() <= 1
        # The labels of the CIFAR-10 test set, in its order.
        assert y.tolist() == [3, 8, 8, 0, 6, 6, 1, 6, 3, 1, 0, 9, 5, 7, 9, 8, 5, 7, 8, 6]
        assert y.dtype == torch.int64

    def test_limit_keeps_the_first(self):
        x, y = data.load_images("cifar10-20")
        few, labels = data.load_images("cifar10-20", limit=3)
        assert torch.equal(few, x[:3])
        assert torch.equal(labels, y[:3])

    def test_a_part_is_of_the_whole(self, tmp_path):
        x, y = data.load_images("cifar10-20")
        some, labels = data.load_images("cifar10-20[16:20]")
        assert torch.equal(some, x[16:]) and torch.equal(labels, y[16:])
        assert len(data.load_images("cifar10-20[16:20]", limit=1)[0]) == 1
        np.savez(tmp_path / "all.npz", x=x.numpy())
        some, labels = data.load_images(f"{tmp_path}/all.npz[3:5]")
        assert torch.equal(some, x[3:5]) and labels is None
        for source in ("cifar10-20", f"{tmp_path}/all.npz"):
            with pytest.raises(ValueError, match="asks for images up to 20, counted from 0, and there are 20"):
                data.load_images(f"{source}[18:21]")
            with pytest.raises(ValueError, match="asks for no image"):
                data.load_images(f"{source}[0:0]")

    def test_images_of_a_part_have_their_own_names(self, tmp_path):
        data.save_images(torch.rand(3, 3, 8, 8), tmp_path, ["a", "b", "c"])
        some = gather([f"{tmp_path}[1:3]"], None)
        assert some.stems == ["b", "c"] and some.sources == [str(tmp_path / "b.png"), str(tmp_path / "c.png")]
        assert gather(["cifar10-20[16:18]"], None).sources == ["cifar10-20[16]", "cifar10-20[17]"]

    def test_the_size_of_a_named_set_is_known_unread(self):
        assert data.named_count("cifar10-512") == 512 and data.named_count("cifar10[9000:9500]") == 500
        assert data.named_count("photos") is None and data.named_count("photos.npz[1:3]") is None
        with pytest.raises(ValueError, match="and there are 512"):
            data.named_count("cifar10-512[500:513]")

    def test_foolbox_is_not_imported(self):
        before = "foolbox" in sys.modules
        data.load_images("cifar10-20", limit=1)
        assert ("foolbox" in sys.modules) == before


def test_missing_foolbox_names_the_extra(monkeypatch):
    monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"coupfast\[demo\]"):
        data.load_images("cifar10-20")


class TestPublishedSubset:
    def test_indices(self):
        indices = data.cifar10_512_indices()
        assert indices[:5].tolist() == [9394, 898, 2398, 5906, 2343]
        assert len(set(indices.tolist())) == 512
        assert indices.min() >= 0
        assert indices.max() < 10000

    def test_another_generator_is_refused(self, monkeypatch):
        class Other:
            def __init__(self, seed):
                pass

            def choice(self, n, count, replace):
                return np.arange(count)

        monkeypatch.setattr(np.random, "RandomState", Other)
        with pytest.raises(RuntimeError, match="published subset starts with"):
            data.cifar10_512_indices()

    @pytest.fixture
    def cifar10(self, monkeypatch):
        """A torchvision whose test set has the index of an image in its label and in its first pixel."""
        calls = []

        class CIFAR10:
            def __init__(self, root, train, download):
                calls.append((root, train, download))
                self.data = np.zeros((10000, 32, 32, 3), dtype=np.uint8)
                self.data[:, 0, 0, 0] = np.arange(10000) % 256
                self.data[:, 0, 0, 1] = np.arange(10000) // 256
                self.targets = list(range(10000))

        torchvision, datasets = types.ModuleType("torchvision"), types.ModuleType("torchvision.datasets")
        torchvision.datasets, datasets.CIFAR10 = datasets, CIFAR10
        monkeypatch.setitem(sys.modules, "torchvision", torchvision)
        monkeypatch.setitem(sys.modules, "torchvision.datasets", datasets)
        return calls

    def test_images_and_labels_are_chosen_alike(self, cifar10, tmp_path):
        x, y = data.load_images("cifar10-512", root=tmp_path)
        index = (x[:, 0, 0, 0] * 255).round().long() + 256 * (x[:, 1, 0, 0] * 255).round().long()
        assert torch.equal(y, torch.from_numpy(data.cifar10_512_indices()))
        assert torch.equal(index, y)
        assert cifar10 == [(str(tmp_path), False, True)]

    def test_whole_set_keeps_its_order(self, cifar10, tmp_path):
        x, y = data.load_images("cifar10", root=tmp_path, limit=300)
        assert x.shape == (300, 3, 32, 32)
        assert torch.equal(y, torch.arange(300))

    def test_default_root_is_a_cache(self, cifar10, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        data.load_images("cifar10", limit=1)
        assert cifar10[0][0] == str(tmp_path / "coupfast" / "data")

    @pytest.mark.parametrize("error", [OSError("Name or service not known"), RuntimeError("File not found or corrupted")])
    @pytest.mark.parametrize("name", ["cifar10", "cifar10-512"])
    def test_offline_it_says_what_to_put_where(self, name, error, cifar10, tmp_path, monkeypatch):
        def offline(root, train, download):
            raise error

        monkeypatch.setattr(sys.modules["torchvision.datasets"], "CIFAR10", offline)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        message = f"{name}.*CIFAR-10 test set.*{error}.*cifar-10-python.tar.gz.*folder {tmp_path}/coupfast/data"
        with pytest.raises(FileNotFoundError, match=message):
            data.load_images(name)

    def test_missing_torchvision_names_the_extra(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "torchvision", None)
        monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
        with pytest.raises(ImportError, match=r"coupfast\[zoo\]"):
            data.load_images("cifar10-512")


class TestFolder:
    def test_flat_folder_is_sorted_and_has_no_labels(self, tmp_path):
        images = pixels(3)
        for name, image in zip(["b.png", "c.PNG", "a.png"], images, strict=True):
            write_png(tmp_path / name, image)
        (tmp_path / "notes.txt").write_text("not an image")
        (tmp_path / ".hidden.png").write_text("not an image either")
        x, y = data.load_images(tmp_path)
        assert torch.equal(x, as_float(images[[2, 0, 1]]))
        assert y is None
        assert [path.name for path in data.image_files(tmp_path)] == ["a.png", "b.png", "c.PNG"]

    def test_subfolders_are_classes_by_name_even_if_some_are_missing(self, tmp_path):
        images = pixels(3)
        write_png(tmp_path / "truck" / "0.png", images[0])
        write_png(tmp_path / "cat" / "1.png", images[1])
        write_png(tmp_path / "cat" / "0.png", images[2])
        x, y = data.load_images(tmp_path)
        assert y.tolist() == [3, 3, 9]
        assert torch.equal(x, as_float(images[[2, 1, 0]]))
        assert data.load_images(tmp_path, limit=2)[1].tolist() == [3, 3]

    def test_subfolders_may_be_labels_or_own_classes(self, tmp_path):
        write_png(tmp_path / "n" / "12" / "0.png", pixels(1)[0])
        write_png(tmp_path / "o" / "dog" / "0.png", pixels(1)[0])
        assert data.load_images(tmp_path / "n")[1].tolist() == [12]
        assert data.load_images(tmp_path / "o", classes=("cat", "dog"))[1].tolist() == [1]

    def test_unknown_class_is_refused(self, tmp_path):
        write_png(tmp_path / "zebra" / "0.png", pixels(1)[0])
        with pytest.raises(ValueError, match="'zebra' is neither a label"):
            data.load_images(tmp_path)

    def test_mixed_folder_is_refused(self, tmp_path):
        write_png(tmp_path / "0.png", pixels(1)[0])
        write_png(tmp_path / "cat" / "0.png", pixels(1)[0])
        with pytest.raises(ValueError, match="1 images of its own and 1 in subfolders"):
            data.load_images(tmp_path)

    def test_empty_folder_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match=r"has no \.png"):
            data.load_images(tmp_path)

    def test_sizes_must_agree(self, tmp_path):
        write_png(tmp_path / "0.png", pixels(1, 4, 5)[0])
        write_png(tmp_path / "1.png", pixels(1, 6, 5)[0])
        with pytest.raises(ValueError, match=r"1\.png is 5x6 pixels, the first image 5x4"):
            data.load_images(tmp_path)

    def test_grey_and_opaque_images_become_rgb(self, tmp_path):
        image = pixels(1)[0]
        write_png(tmp_path / "0.png", image[:, :, 0])
        write_png(tmp_path / "1.png", np.dstack([image, np.full((4, 5, 1), 255, np.uint8)]))
        with pytest.warns(UserWarning, match="1 of 2 images in .* are grey, and become three equal channels; channels=3"):
            x, _ = data.load_images(tmp_path)
        assert torch.equal(x, as_float(np.stack([np.repeat(image[:, :, :1], 3, axis=2), image])))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(data.load_images(tmp_path, channels=3)[0], x)
            with pytest.raises(ValueError, match=r"`channels` is 1, and .*1\.png has colours"):
                data.load_images(tmp_path, channels=1)

    def test_grey_images_stay_grey_where_that_is_asked_for(self, tmp_path):
        image = pixels(1)[0]
        write_png(tmp_path / "0.png", image[:, :, 0])
        write_png(tmp_path / "1.png", np.repeat(image[:, :, 1:2], 3, axis=2))  # grey, stored as RGB
        for source, expected in ((tmp_path, image[:, :, :2]), (tmp_path / "0.png", image[:, :, :1])):
            x, _ = data.load_images(source, channels=1)
            assert torch.equal(x[:, 0], torch.from_numpy(expected.transpose(2, 0, 1).copy()).float() / 255)
        with pytest.raises(ValueError, match="`channels` is 1 .*got 2"):
            data.load_images(tmp_path, channels=2)

    def test_cifar10_classes_go_by_other_names(self, tmp_path):
        names = ["plane", "Car", "BIRD", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
        for name in names:
            write_png(tmp_path / name / "0.png", pixels(1)[0])
        y = data.load_images(tmp_path)[1]
        assert sorted(y.tolist()) == list(range(10))
        labels = {file.parent.name: int(label) for file, label in zip(data.image_files(tmp_path), y, strict=True)}
        assert [labels[name] for name in names] == list(range(10))
        with pytest.raises(ValueError, match="'plane' is neither a label"):  # other classes have no such aliases
            data.load_images(tmp_path, classes=("airplane", *(name for name in names if name != "plane")))

    def test_labels_that_nobody_needs_need_no_names(self, tmp_path):
        write_png(tmp_path / "n01440764" / "0.png", pixels(1)[0])
        write_png(tmp_path / "cat" / "0.png", pixels(1)[0])
        x, y = data.load_images(tmp_path, labels_needed=False)
        assert len(x) == 2
        assert y is None
        assert data.load_images(tmp_path, labels_needed=False, classes=("cat", "n01440764"))[1].tolist() == [0, 1]

    def test_transparent_image_is_refused(self, tmp_path):
        write_png(tmp_path / "0.png", np.dstack([pixels(1)[0], np.full((4, 5, 1), 254, np.uint8)]))
        with pytest.raises(ValueError, match="partly transparent"):
            data.load_images(tmp_path)

    @pytest.mark.parametrize("colours", [1, 2, 3, 4], ids=["grey", "grey, alpha", "RGB", "RGB, alpha"])
    def test_16_bit_images_are_refused(self, colours, tmp_path):
        """Pillow reads the high bytes of 16-bit colours, without a word."""
        (tmp_path / "0.png").write_bytes(png_16_bit(np.full((4, 5, colours), 0xFF80, dtype=np.uint16)))
        with pytest.raises(ValueError, match=r"0\.png has the mode .* of 16 bits a channel"):
            data.load_images(tmp_path)

    def test_several_frames_are_refused(self, tmp_path):
        frames = [Image.fromarray(image) for image in pixels(2)]
        frames[0].save(tmp_path / "0.png", save_all=True, append_images=frames[1:])
        with pytest.raises(ValueError, match="has 2 frames"):
            data.load_images(tmp_path)

    def test_broken_image_is_named(self, tmp_path):
        (tmp_path / "0.png").write_bytes(b"not a png")
        with pytest.raises(ValueError, match=r"0\.png is not an image"):
            data.load_images(tmp_path)

    def test_one_image(self, tmp_path):
        image = pixels(1)
        write_png(tmp_path / "0.png", image[0])
        x, y = data.load_images(str(tmp_path / "0.png"))
        assert torch.equal(x, as_float(image))
        assert y is None


class TestNpz:
    @pytest.mark.parametrize("field", ["x", "images"])
    @pytest.mark.parametrize("channels_first", [False, True])
    def test_uint8(self, field, channels_first, tmp_path):
        images = pixels(6)
        stored = images.transpose(0, 3, 1, 2) if channels_first else images
        np.savez(tmp_path / "a.npz", **{field: stored, "y": np.arange(6, dtype=np.int32)})
        x, y = data.load_images(tmp_path / "a.npz", limit=4)
        assert torch.equal(x, as_float(images[:4]))
        assert y.tolist() == [0, 1, 2, 3]
        assert y.dtype == torch.int64

    def test_floats_are_kept_as_they_are(self, tmp_path):
        images = np.random.default_rng(0).random((2, 3, 4, 5))
        np.savez(tmp_path / "a.npz", x=images)
        x, y = data.load_images(tmp_path / "a.npz")
        assert x.dtype == torch.float32
        assert y is None
        assert torch.equal(x, torch.from_numpy(images.astype(np.float32)))

    @pytest.mark.parametrize("channels_first", [False, True])
    def test_one_channel_stays_one_channel(self, channels_first, tmp_path):
        images = np.random.default_rng(0).random((5, 1, 28, 28), dtype=np.float32)
        np.savez(tmp_path / "a.npz", x=images if channels_first else images.transpose(0, 2, 3, 1), y=np.arange(5))
        x, y = data.load_images(tmp_path / "a.npz")
        assert torch.equal(x, torch.from_numpy(images))
        assert y.tolist() == [0, 1, 2, 3, 4]
        assert torch.equal(data.load_images(tmp_path / "a.npz", channels=3)[0], x.repeat(1, 3, 1, 1))

    def test_three_equal_channels_can_become_one(self, tmp_path):
        images = np.random.default_rng(0).random((2, 1, 4, 4), dtype=np.float32)
        np.savez(tmp_path / "a.npz", x=images.repeat(3, axis=1))
        assert torch.equal(data.load_images(tmp_path / "a.npz", channels=1)[0], torch.from_numpy(images))
        np.savez(tmp_path / "b.npz", x=np.random.default_rng(0).random((2, 3, 4, 4)))
        with pytest.raises(ValueError, match="`channels` is 1, and the images in .* have colours"):
            data.load_images(tmp_path / "b.npz", channels=1)

    def test_rounding_beyond_the_range_is_clipped(self, tmp_path):
        images = np.array([-1.2e-7, 0.0, 0.5, 1.0000001], dtype=np.float32).reshape(1, 1, 2, 2)
        np.savez(tmp_path / "a.npz", x=images)
        assert data.load_images(tmp_path / "a.npz")[0].flatten().tolist() == [0.0, 0.0, 0.5, 1.0]
        np.savez(tmp_path / "a.npz", x=images + np.float32(1e-5))
        with pytest.raises(ValueError, match=r"found \[0\.0000\d+, 1\.00001\d*\]"):
            data.load_images(tmp_path / "a.npz")

    def test_jpeg_files_end_to_end(self, tmp_path):
        files = []
        for image in pixels(3, 8, 8):
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, "JPEG")
            files.append(buffer.getvalue())
        jpeg = np.frombuffer(b"".join(files), dtype=np.uint8)
        offsets = np.cumsum([0, *map(len, files)])
        np.savez(tmp_path / "a.npz", jpeg=jpeg, offsets=offsets, labels=np.array([7, 8, 9]))
        x, y = data.load_images(tmp_path / "a.npz", limit=2)
        decoded = np.stack([np.asarray(Image.open(io.BytesIO(file))) for file in files[:2]])
        assert torch.equal(x, as_float(decoded))
        assert y.tolist() == [7, 8]

    @pytest.mark.parametrize("offsets", [[0, 3, 2], [0, 99], [-1, 3], [0]], ids=str)
    def test_offsets_outside_are_refused(self, offsets, tmp_path):
        np.savez(tmp_path / "a.npz", jpeg=np.zeros(4, np.uint8), offsets=np.array(offsets))
        with pytest.raises(ValueError, match="rising positions in `offsets`"):
            data.load_images(tmp_path / "a.npz")

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"pictures": np.zeros((1, 3, 4, 4))}, "has the fields pictures"),
            ({"x": np.zeros((1, 3, 4, 4)), "images": np.zeros((1, 3, 4, 4))}, "has the fields images, x"),
            ({"jpeg": np.zeros(4, np.uint8)}, "has the fields jpeg"),
            ({"x": np.zeros((1, 4, 4))}, r"found \(1, 4, 4\); grey images need an axis"),
            ({"x": np.zeros((1, 2, 4, 4))}, r"found \(1, 2, 4, 4\)"),
            ({"x": np.zeros((1, 1, 4, 1))}, r"found \(1, 1, 4, 1\)"),
            ({"x": np.zeros((1, 1, 4, 3))}, r"found \(1, 1, 4, 3\)"),
            ({"x": np.zeros((1, 3, 4, 3))}, r"found \(1, 3, 4, 3\)"),
            ({"x": np.zeros((1, 3, 4, 4), np.int64)}, "found int64"),
            ({"x": np.full((1, 3, 4, 4), -1.0)}, r"found \[-1, -1\]"),
            ({"x": np.full((1, 3, 4, 4), np.nan)}, r"found \[nan, nan\]"),
            ({"x": np.zeros((0, 3, 4, 4))}, "no images"),
            ({"x": np.zeros((2, 3, 4, 4)), "y": np.zeros(3, np.int64)}, "must be 2 integers"),
            ({"x": np.zeros((2, 3, 4, 4)), "y": np.zeros(2)}, "must be 2 integers"),
        ],
        ids=lambda value: value[:20] if isinstance(value, str) else "",
    )
    def test_unfit_archives_are_refused(self, fields, message, tmp_path):
        np.savez(tmp_path / "a.npz", **fields)
        with pytest.raises(ValueError, match=message):
            data.load_images(tmp_path / "a.npz")

    def test_nothing_is_unpickled(self, tmp_path):
        np.savez(tmp_path / "a.npz", x=np.array([{"a": 1}], dtype=object))
        with pytest.raises(ValueError, match="pickle"):
            data.load_images(tmp_path / "a.npz")

    @pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04garbage"], ids=repr)
    def test_a_broken_archive_is_named(self, content, tmp_path):
        (tmp_path / "a.npz").write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.npz is not an \.npz archive"):
            data.load_images(tmp_path / "a.npz")

    def test_a_single_array_is_refused(self, tmp_path):
        with open(tmp_path / "a.npz", "wb") as file:
            np.save(file, np.zeros((1, 3, 4, 4)))
        with pytest.raises(ValueError, match="but a single array"):
            data.load_images(tmp_path / "a.npz")


def test_unknown_source_lists_the_names():
    with pytest.raises(FileNotFoundError, match="cifar10-20, cifar10-512, cifar10"):
        data.load_images("cifar-10")


def test_other_files_are_refused(tmp_path):
    (tmp_path / "a.npy").write_bytes(b"")
    with pytest.raises(ValueError, match=r"has the suffix '\.npy'"):
        data.load_images(tmp_path / "a.npy")


def test_fewer_images_than_asked_for_are_not_taken_in_silence(tmp_path):
    for name, count in (("cifar10-20", 20), ("cifar10-512", 512), ("cifar10", 10_000)):
        with pytest.raises(ValueError, match=f"`limit` asks for {count + 1} images, and {name} has {count}"):
            data.load_images(name, limit=count + 1)
    write_png(tmp_path / "0.png", pixels(1)[0])
    np.savez(tmp_path / "a.npz", x=pixels(3))
    for source, count in ((tmp_path, 1), (tmp_path / "0.png", 1), (tmp_path / "a.npz", 3)):
        with pytest.warns(UserWarning, match=f"has {count} images?, fewer than limit=5"):
            assert len(data.load_images(source, limit=5)[0]) == count


def test_torch_defaults_do_not_change_the_images(tmp_path):
    write_png(tmp_path / "cat" / "0.png", pixels(1)[0])
    try:
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        x, y = data.load_images(tmp_path)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert (x.dtype, x.device.type, y.device.type) == (torch.float32, "cpu", "cpu")
    assert torch.equal(x, as_float(pixels(1)))


@pytest.mark.parametrize("limit", [0, -1])
def test_limit_is_positive(limit):
    with pytest.raises(ValueError, match="at least 1"):
        data.load_images("cifar10-20", limit=limit)


class TestSaveImages:
    def test_round_trip(self, tmp_path):
        x = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
        paths = data.save_images(x, tmp_path / "out", ["a", "b"], npz="all.npz")
        assert [path.name for path in paths] == ["a.png", "b.png", "all.npz"]
        assert torch.equal(data.load_images(tmp_path / "out" / "all.npz")[0], x)
        # Half a level of rounding to 8 bits, and the float32 roundings of the two scalings by 255.
        tol = 0.5 / 255 + 2 * torch.finfo(torch.float32).eps
        torch.testing.assert_close(data.load_images(tmp_path / "out")[0], x, rtol=0, atol=tol)

    def test_one_channel(self, tmp_path):
        x = torch.arange(256).reshape(1, 1, 16, 16) / 255
        data.save_images(x, tmp_path, ["a"], npz="all.npz")
        assert Image.open(tmp_path / "a.png").mode == "L"
        assert torch.equal(data.load_images(tmp_path, channels=1)[0], x)
        assert torch.equal(data.load_images(tmp_path / "all.npz")[0], x)

    def test_8_bit_images_survive_exactly(self, tmp_path):
        x = as_float(np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3))
        data.save_images(x, tmp_path, ["a"])
        assert torch.equal(data.load_images(tmp_path)[0], x)

    def test_existing_files_are_kept(self, tmp_path):
        x = torch.zeros(2, 3, 4, 4)
        data.save_images(x[:1], tmp_path, ["b"])
        with pytest.raises(FileExistsError, match="1 of 2 files exist already"):
            data.save_images(x, tmp_path, ["a", "b"])
        assert not (tmp_path / "a.png").exists()
        assert len(data.save_images(x, tmp_path, ["a", "b"], overwrite=True)) == 2

    @pytest.mark.parametrize(
        ("x", "names", "message"),
        [
            (torch.zeros(1, 4, 4), ["a"], "shape"),
            (torch.zeros(1, 2, 4, 4), ["a"], "shape"),
            (torch.full((1, 3, 4, 4), -0.1), ["a"], r"found \[-0\.1, -0\.1\]"),
            (torch.full((1, 3, 4, 4), torch.nan), ["a"], "found .nan"),
            (torch.zeros(2, 3, 4, 4), ["a"], "2 images, 1 names"),
            (torch.zeros(2, 3, 4, 4), ["a", "a"], "1 distinct"),
            (torch.zeros(1, 3, 4, 4), ["../a"], "plain file name"),
        ],
    )
    def test_unfit_input_is_refused(self, x, names, message, tmp_path):
        with pytest.raises(ValueError, match=message):
            data.save_images(x, tmp_path / "out", names)
        assert not (tmp_path / "out").exists()
