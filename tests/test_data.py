"""Data sets, loaders and recipes."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets
from torchvision.transforms.v2 import functional as tvf

from thresholdnet import loaders
from thresholdnet.data import Split, channel_stats, load_data, read_image, read_square
from thresholdnet.loaders import IGNORE, DeviceLoader, FolderLoader, crop_flip, make_loader, resized_crop
from thresholdnet.train import RECIPES, Recipe, make_recipe


def random_split(count: int = 37, size: int = 8) -> Split:
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)
    return Split(torch.arange(count), images)


def write_folders(root: Path, parts: tuple[str, ...] = ("train", "val"), each: int = 3) -> Path:
    rng = np.random.default_rng(0)
    for part in parts:
        for name in ("cat", "dog"):
            (root / part / name).mkdir(parents=True)
            for i in range(each):
                pixels = rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{i}.png")
    return root


def test_digits_are_fixed_and_stratified() -> None:
    data = load_data("digits")
    torch.manual_seed(99)
    again = load_data("digits")
    assert (len(data.train), len(data.test), data.image_size, len(data.classes)) == (1437, 360, 32, 10)
    assert data.train.images is not None and data.train.images.dtype == torch.uint8
    assert torch.equal(data.train.images, again.train.images)
    assert torch.equal(data.train.images[:, 0], data.train.images[:, 2])
    shares = torch.bincount(data.test.labels) / torch.bincount(torch.cat([data.train.labels, data.test.labels]))
    assert (shares - 0.2).abs().max() < 0.01
    assert not data.flip
    small = load_data("digits", limit=20, image_size=48)
    assert small.train.images is not None and small.train.images.shape == (20, 3, 48, 48)


def test_channel_stats_match_torch() -> None:
    images = random_split().images
    mean, std = channel_stats(images)
    scaled = images.double() / 255
    assert torch.allclose(torch.tensor(mean).double(), scaled.mean((0, 2, 3)), atol=1e-6)
    assert torch.allclose(torch.tensor(std).double(), scaled.std((0, 2, 3), correction=0), atol=1e-6)


def test_crops_and_flips_match_torchvision_per_image() -> None:
    images = random_split(64).images
    top, left = torch.randint(9, (2, 64), generator=torch.Generator().manual_seed(1))
    flip = torch.rand(64, generator=torch.Generator().manual_seed(2)) < 0.5
    result = crop_flip(images, top, left, flip, 8, 4)
    for i in range(64):
        want = tvf.crop(tvf.pad(images[i], [4]), int(top[i]), int(left[i]), 8, 8)
        assert torch.equal(result[i], tvf.hflip(want) if flip[i] else want)
    assert result.is_contiguous(memory_format=torch.channels_last)
    assert len({(int(t), int(x), bool(f)) for t, x, f in zip(top, left, flip, strict=True)}) > 30


def test_resized_crop_of_the_whole_image_is_the_image() -> None:
    images = random_split(2).images.float()
    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).repeat(2, 1)
    result = resized_crop(images, boxes, torch.tensor([False, True]), 8)
    assert torch.allclose(result[0], images[0], atol=1e-3)
    assert torch.allclose(result[1], images[1].flip(-1), atol=1e-3)
    corner = resized_crop(images, torch.tensor([[0.5, 0.0, 0.5, 0.5]]).repeat(2, 1), torch.zeros(2).bool(), 4)
    assert torch.allclose(corner[0], images[0, :, 4:, :4], atol=1e-3)


def test_loader_draws_differ_between_images_and_epochs_only() -> None:
    split = Split(torch.zeros(32, dtype=torch.int64), random_split(1, 16).images.repeat(32, 1, 1, 1))
    loader = DeviceLoader(split, 16, 32, train=True, flip=True, crop_padding=4, seed=5)
    first, second = next(iter(loader))[0], None
    assert len(torch.unique(first.flatten(1), dim=0)) > 20, "every image must have its own crop"
    loader.set_epoch(0)
    second = next(iter(loader))[0]
    assert torch.equal(first, second)
    loader.set_epoch(1)
    assert not torch.equal(first, next(iter(loader))[0])


@pytest.mark.parametrize("count,batch,world", [(37, 8, 1), (37, 8, 2), (41, 12, 3), (8, 8, 2), (3, 8, 4), (33, 32, 1)])
def test_shards_cover_the_set(count: int, batch: int, world: int) -> None:
    split = random_split(count)
    seen: list[list[torch.Tensor]] = []
    for rank in range(world):
        loader = DeviceLoader(split, 8, batch, train=True, rank=rank, world_size=world)
        seen.append([labels for _, labels in loader])
        assert len(seen[-1]) == len(loader) == -(-count // batch)
    sizes = {tuple(len(part) for part in rank) for rank in seen}
    assert sizes == {tuple(loaders.share_sizes(count, batch, world))}, "all ranks take batches of the same sizes"
    assert max(next(iter(sizes))) - min(next(iter(sizes))) <= 1
    labels = torch.cat([part for rank in seen for part in rank])
    assert set(labels.tolist()) == set(range(count)) and len(labels) < count + world

    test = [
        torch.cat([y for _, y in DeviceLoader(split, 8, batch, train=False, rank=r, world_size=world)])
        for r in range(world)
    ]
    real = torch.cat(test)
    assert sorted(real[real != IGNORE].tolist()) == list(range(count))


def test_loader_continues_in_the_middle_of_an_epoch() -> None:
    def make() -> DeviceLoader:
        return DeviceLoader(random_split(), 8, 5, train=True, flip=True, crop_padding=2, seed=4)

    whole = make()
    whole.set_epoch(3)
    batches = list(whole)
    part = make()
    part.set_epoch(3)
    iterator = iter(part)
    for _ in range(4):
        next(iterator)
    resumed = make()
    resumed.load_state_dict(part.state_dict())
    rest = list(resumed)
    assert len(rest) == len(batches) - 4
    for (x, y), (a, b) in zip(batches[4:], rest, strict=True):
        assert torch.equal(x, a) and torch.equal(y, b)
    assert resumed.state_dict() == {"epoch": 3, "batch": len(whole)}
    assert len(list(resumed)) == len(whole) and resumed.epoch == 4


def test_normalisation() -> None:
    split = random_split(4)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    images, _ = next(iter(DeviceLoader(split, 8, 4, train=False, mean=mean, std=std)))
    want = tvf.normalize(split.images.float() / 255, list(mean), list(std))
    assert torch.allclose(images, want, atol=1e-6)


@pytest.mark.parametrize("budget", [1 << 30, 0])
def test_image_folders(tmp_path: Path, budget: int) -> None:
    data = load_data("imagefolder", write_folders(tmp_path), image_size=32, in_memory_bytes=budget)
    assert data.classes == ("cat", "dog") and (data.train.images is None) == (budget == 0)
    train = make_loader(data, train=True, batch_size=4, flip=True, crop_padding=4)
    test = make_loader(data, train=False, batch_size=4)
    assert isinstance(train, DeviceLoader if budget else FolderLoader)
    once, again = list(train), list(make_loader(data, train=True, batch_size=4, flip=True, crop_padding=4))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(once, again, strict=True))
    assert {tuple(x.shape[1:]) for x, _ in (*once, *test)} == {(3, 32, 32)}
    assert sorted(torch.cat([y for _, y in test]).tolist()) == [0, 0, 0, 1, 1, 1]


def test_folder_workers_change_nothing_and_resume(tmp_path: Path) -> None:
    data = load_data("imagefolder", write_folders(tmp_path), image_size=32, in_memory_bytes=0)
    options = {"train": True, "flip": True, "crop_padding": 4, "seed": 2}
    alone = list(FolderLoader(data.train, 32, 2, workers=0, **options))
    helped = FolderLoader(data.train, 32, 2, workers=1, **options)
    helped.set_epoch(0, 1)
    for (x, y), (a, b) in zip(alone[1:], helped, strict=True):
        assert torch.equal(x, a) and torch.equal(y, b)


def test_odd_image_modes_become_rgb(tmp_path: Path) -> None:
    for mode, suffix in (("L", "png"), ("RGBA", "png"), ("P", "gif"), ("1", "png"), ("CMYK", "jpg")):
        path = tmp_path / f"{mode}.{suffix}"
        Image.new(mode, (20, 30)).save(path)
        assert read_image(path).shape == (3, 30, 20)
        assert read_square(path, 16).shape == (3, 16, 16)
    deep = tmp_path / "deep.png"
    Image.fromarray(np.full((4, 4), 32768, dtype=np.uint16)).save(deep)
    assert read_image(deep).unique().tolist() == [127]


def test_cifar10_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (6, 4, 3072), dtype=np.uint8)
    for i, name in enumerate([*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]):
        content = {"data": pixels[i], "labels": [i, 1, 2, 3]}
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"c{i}" for i in range(10)]}))
    with pytest.raises(ValueError, match=r"no complete cifar10 files below root .*--download"):
        load_data("cifar10", tmp_path)
    monkeypatch.setattr(datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    data = load_data("cifar10", tmp_path)
    assert data.train.images is not None and data.train.images.shape == (20, 3, 32, 32)
    assert torch.equal(data.train.images[4].flatten(), torch.from_numpy(pixels[1, 0]))
    assert data.classes[3] == "c3" and data.train.labels[4] == 1


def test_stl10_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for part, count in (("train", 3), ("test", 2)):
        rng.integers(0, 256, count * 27648, dtype=np.uint8).tofile(folder / f"{part}_X.bin")
        np.arange(1, count + 1, dtype=np.uint8).tofile(folder / f"{part}_y.bin")
    (folder / "class_names.txt").write_text("\n".join(f"c{i}" for i in range(10)))
    monkeypatch.setattr(datasets.STL10, "_check_integrity", lambda self: True)
    data = load_data("stl10", tmp_path)
    assert data.image_size == 96 and data.train.labels.tolist() == [0, 1, 2]
    assert data.train.images is not None and data.train.images.is_contiguous()


def test_bad_data_gets_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'cifar' is unknown; did you mean cifar10"):
        load_data("cifar")
    with pytest.raises(ValueError, match=r"cifar10 needs a root folder.*--root.*--download"):
        load_data("cifar10")
    with pytest.raises(ValueError, match=r"nowhere is no folder.*--root.*--download"):
        load_data("stl10", tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"must hold train/ and val/ .*it has no folders"):
        load_data("imagefolder", tmp_path)
    with pytest.raises(TypeError, match="limit must be an integer"):
        load_data("digits", limit=1.5)  # type: ignore[arg-type]
    root = write_folders(tmp_path / "a")
    (root / "train" / "bird").mkdir()
    with pytest.raises(ValueError, match=r"same class folders.*bird"):
        load_data("imagefolder", root)
    (root / "val" / "bird").mkdir()
    with pytest.raises(ValueError, match=r"bird is empty"):
        load_data("imagefolder", root)
    (tmp_path / "b" / "train").mkdir(parents=True)
    (tmp_path / "b" / "test").mkdir()
    with pytest.raises(ValueError, match=r"train is empty"):
        load_data("imagefolder", tmp_path / "b")


@pytest.mark.parametrize("budget,workers", [(1 << 30, 0), (0, 0), (0, 1)])
def test_corrupt_image_is_named(tmp_path: Path, budget: int, workers: int) -> None:
    root = write_folders(tmp_path, each=2)
    (root / "train" / "dog" / "1.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"dog.1\.png is no readable image: not a known image format") as error:
        data = load_data("imagefolder", root, image_size=32, in_memory_bytes=budget)
        list(make_loader(data, train=True, batch_size=4, workers=workers))
    assert "\n" not in str(error.value)


def test_cut_image_is_named(tmp_path: Path) -> None:
    path = write_folders(tmp_path, ("train",), 1) / "train" / "cat" / "0.png"
    path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(ValueError, match=r"0\.png is no readable image"):
        read_image(path)


def test_bad_loader_arguments() -> None:
    with pytest.raises(ValueError, match="batch_size must be a positive multiple of the 2 processes, got 5"):
        DeviceLoader(random_split(), 8, 5, train=True, world_size=2)
    with pytest.raises(ValueError, match="rank must be from 0 to 1, got 2"):
        DeviceLoader(random_split(), 8, 4, train=True, rank=2, world_size=2)
    with pytest.raises(ValueError, match="at least one image"):
        DeviceLoader(Split(torch.zeros(0)), 8, 4, train=True)
    with pytest.raises(ValueError, match="start must be from 0 to 10 batches, got 11"):
        DeviceLoader(random_split(), 8, 4, train=True).set_epoch(0, 11)


def test_seeds_are_spread() -> None:
    seeds = {loaders.mix_seed(a, b, c) for a in range(10) for b in range(10) for c in range(10)}
    assert len(seeds) == 1000 and all(0 <= seed < 2**63 for seed in seeds)


def test_released_recipe_is_the_papers() -> None:
    recipe = RECIPES["released"]
    rates = [recipe.lr_at(epoch * 500, 500) for epoch in (0, 74, 75, 149, 150, 199)]
    assert rates == [1e-3, 1e-3, 5e-4, 5e-4, 2.5e-4, 2.5e-4]
    assert (recipe.optimizer, recipe.epochs, recipe.batch_size, recipe.weight_decay) == ("adam", 200, 100, 0)
    assert recipe.flip and not recipe.crop_padding and not recipe.normalize and not recipe.label_smoothing


def test_modern_recipe_rises_then_falls_to_zero() -> None:
    recipe = make_recipe("modern", epochs=10, batch_size=200)
    assert (recipe.optimizer, recipe.momentum, recipe.schedule) == ("sgd", 0.9, "cosine") and recipe.normalize
    assert recipe.flip and min(recipe.weight_decay, recipe.label_smoothing, recipe.crop_padding) > 0
    rates = [recipe.lr_at(step, 50) for step in range(500)]
    peak = max(rates)
    assert peak == pytest.approx(2 * RECIPES["modern"].lr) and rates.index(peak) == 24
    assert rates[:25] == sorted(rates[:25]) and rates[25:] == sorted(rates[25:], reverse=True)
    assert 0 < rates[-1] < 1e-4
    assert make_recipe("modern", batch_size=200, lr=0.3).peak_lr() == 0.3


def test_bad_recipes() -> None:
    with pytest.raises(ValueError, match="'modem' is unknown; did you mean modern"):
        make_recipe("modem")
    with pytest.raises(ValueError, match="recipe field 'epoch' is unknown; did you mean epochs"):
        make_recipe("modern", epoch=3)
    with pytest.raises(ValueError, match="epochs must be at least 1, got 0"):
        make_recipe("modern", epochs=0)
    with pytest.raises(ValueError, match="lr must be a finite number above 0, got nan"):
        make_recipe("modern", lr=float("nan"))
    with pytest.raises(ValueError, match="optimizer 'adm' is unknown; did you mean adam"):
        Recipe(optimizer="adm")
    with pytest.raises(TypeError, match="batch_size must be an integer"):
        Recipe(batch_size=1.5)  # type: ignore[arg-type]
