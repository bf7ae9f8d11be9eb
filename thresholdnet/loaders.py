"""Batches that are a pure function of (seed, epoch, batch, rank).

Both loaders share one protocol: `len`, iteration, `set_epoch(epoch, start)` and `state_dict` /
`load_state_dict` (position inside the epoch). A run that resumes in the middle of an epoch therefore sees
exactly the batches an unbroken run would have seen. Iteration is a generator that reads the position at its
first step, since Lightning creates the iterator before it restores the epoch.

Shape letters: N images of the split, B images of a batch, H = W pixels.
"""

from __future__ import annotations

import hashlib
import signal
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .data import ImageData, Split, read_image

IGNORE = -100  # label of the padding images that even out the ranks of an evaluation; cross entropy skips it


def mix_seed(*parts: int) -> int:
    """A 63-bit seed from whole numbers; the same on every machine, and unrelated for neighbouring inputs."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def share_sizes(count: int, batch_size: int, world_size: int) -> list[int]:
    """Images of every batch of an epoch on one rank, the same on all of them.

    They differ by one image at most: a last batch of a few images would blow batch norm up.

    Args:
        count: images of the split.
        batch_size: the most images of a step over all ranks, a multiple of `world_size`.
    """
    rounds, batches = -(-count // world_size), -(-count // batch_size)
    small, larger = divmod(rounds, batches)
    return [small + 1] * larger + [small] * (batches - larger)


def random_flips(count: int, generator: torch.Generator) -> Tensor:
    """bool[count], true with probability 1/2."""
    return torch.rand(count, generator=generator) < 0.5


def crop_flip(images: Tensor, top: Tensor, left: Tensor, flip: Tensor, size: int, padding: int) -> Tensor:
    """Crop each image at its own place and mirror the marked ones, in one gather.

    Args:
        images: [B, C, H, W], any dtype.
        top, left: int64[B], upper left corner of each crop in the padded image.
        flip: bool[B].
        size: side of the crop in pixels.
        padding: zero pixels added on all four sides first.

    Returns:
        [B, C, size, size] in channels_last order, same dtype; image i equals
        `hflip(crop(pad(images[i]), top[i], left[i], size, size))` of torchvision's functional API.
    """
    if padding:
        images = F.pad(images, (padding,) * 4)
    steps = torch.arange(size, device=images.device)
    rows = top[:, None] + steps
    columns = left[:, None] + torch.where(flip[:, None], size - 1 - steps, steps)
    batch = torch.arange(len(images), device=images.device)
    # Indices around a slice put the sliced axis last: the result is NHWC in memory, so the permute is
    # channels_last.
    return images[batch[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def resized_crop(images: Tensor, boxes: Tensor, flip: Tensor, size: int) -> Tensor:
    """Cut one box per image, scale it bilinearly to `size` and mirror the marked ones.

    Args:
        images: float [B, C, H, W].
        boxes: float [B, 4], (top, left, height, width) as parts of the image side, 0 to 1.
        flip: bool[B].
        size: side of the result in pixels.

    Returns:
        float [B, C, size, size].
    """
    top, left, height, width = boxes.unbind(1)
    mirror = torch.where(flip, -1.0, 1.0)
    theta = images.new_zeros(len(images), 2, 3)
    theta[:, 0, 0], theta[:, 0, 2] = width * mirror, 2 * left + width - 1
    theta[:, 1, 1], theta[:, 1, 2] = height, 2 * top + height - 1
    grid = F.affine_grid(theta, [len(images), images.shape[1], size, size], align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def random_boxes(count: int, generator: torch.Generator) -> Tensor:
    """float [count, 4] boxes of 25 to 100 % of the area and an aspect of 3/4 to 4/3."""
    area, ratio, y, x = torch.rand(4, count, generator=generator)
    side = (0.25 + 0.75 * area).sqrt()
    stretch = torch.exp((ratio * 2 - 1) * 0.5 * torch.log(torch.tensor(4 / 3)))
    height, width = (side / stretch).clamp(max=1), (side * stretch).clamp(max=1)
    return torch.stack([y * (1 - height), x * (1 - width), height, width], 1)


class _Position:
    """Which batches come next; shared by both loaders."""

    def __init__(self, count: int, batch_size: int, train: bool, seed: int, rank: int, world_size: int) -> None:
        if count < 1:
            raise ValueError("a loader needs at least one image, got an empty split")
        if batch_size < 1 or world_size < 1 or batch_size % world_size:
            raise ValueError(f"batch_size must be a positive multiple of the {world_size} processes, got {batch_size}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be from 0 to {world_size - 1}, got {rank}")
        self.count, self.batch_size, self.train = count, batch_size, train
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.share_sizes = share_sizes(count, batch_size, world_size)
        self.epoch = self.batch = 0

    def __len__(self) -> int:
        """Batches per epoch, the same on every rank."""
        return len(self.share_sizes)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """The next iteration runs epoch `epoch` (from 0) from batch `start` on."""
        if not 0 <= start <= len(self):
            raise ValueError(f"start must be from 0 to {len(self)} batches, got {start}")
        self.epoch, self.batch = epoch, start

    def state_dict(self) -> dict[str, int]:
        """Epoch, and batches of it already handed out."""
        return {"epoch": self.epoch, "batch": self.batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue where `state_dict` was taken."""
        self.set_epoch(state["epoch"], state["batch"])

    def order(self) -> Tensor:
        """int64[>= N], the epoch's order of images: every image once, and fewer than `world_size` more, so that
        all ranks have the same number: repeats in training, -1 in evaluation.
        """
        extra = -self.count % self.world_size
        if not self.train:
            return torch.cat([torch.arange(self.count), torch.full((extra,), -1)])
        generator = torch.Generator().manual_seed(mix_seed(self.seed, self.epoch))
        order = torch.randperm(self.count, generator=generator)
        return order.repeat(1 + -(-extra // self.count))[: self.count + extra]

    def shares(self) -> Iterator[Tensor]:
        """int64[B] image numbers of this rank, batch after batch, from the current position."""
        self.begin()
        chunks = self.order().view(-1, self.world_size).split(self.share_sizes)
        while self.batch < len(self):
            self.batch += 1
            yield chunks[self.batch - 1][:, self.rank]

    def begin(self) -> None:
        """The end of an epoch is the start of the next one."""
        if self.batch == len(self):
            self.epoch, self.batch = self.epoch + 1, 0


class DeviceLoader(_Position):
    """Batches of a split that lies on the device as uint8, augmented there with its own draw per image.

    Args:
        split: `images` uint8 [N, 3, H, W] and `labels` int64[N].
        size: side of the images given out, in pixels.
        batch_size: images per step over all ranks; every rank gets an equal share.
        train: shuffle, and augment as `flip`, `crop_padding` and `resized` say. Otherwise fixed order
            and the middle `size` x `size` pixels.
        mean, std: per channel, of images scaled to 0..1.
        flip: mirror with probability 1/2.
        crop_padding: random crop after zero padding, 0 for none.
        resized: a random resized crop in place of the padded one.
        seed: of order and augmentation.
        rank, world_size: which share of each batch is given out.
        device: where batches are made; `to` moves the images there once.

    Yields:
        images float32 [B, 3, size, size] (channels_last when `channels_last`), labels int64[B]; in an
        evaluation over several ranks a padding image has the label `IGNORE`.
    """

    def __init__(
        self,
        split: Split,
        size: int,
        batch_size: int,
        *,
        train: bool,
        mean: tuple[float, ...] = (0.0, 0.0, 0.0),
        std: tuple[float, ...] = (1.0, 1.0, 1.0),
        flip: bool = False,
        crop_padding: int = 0,
        resized: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        channels_last: bool = True,
    ) -> None:
        super().__init__(len(split), batch_size, train, seed, rank, world_size)
        if split.images is None:
            raise ValueError("DeviceLoader needs a split with images in memory; use FolderLoader for files")
        self.images, self.labels, self.size = split.images, split.labels, size
        self.flip, self.crop_padding, self.resized = train and flip, train * crop_padding, train and resized
        self.mean, self.std = torch.tensor(mean).view(1, -1, 1, 1), torch.tensor(std).view(1, -1, 1, 1)
        self.format = torch.channels_last if channels_last else torch.contiguous_format
        self.to(device)

    def to(self, device: torch.device | str) -> DeviceLoader:
        """Move images, labels and constants to `device`; returns the loader itself."""
        self.device = torch.device(device)
        for name in ("images", "labels", "mean", "std"):
            setattr(self, name, getattr(self, name).to(self.device))
        return self

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for indices in self.shares():
            # `shares` has moved on to the next batch already, hence the -1. Draws are made on the CPU so that
            # they are the same on every device.
            seed = mix_seed(self.seed, self.epoch, self.batch - 1, self.rank)
            generator = torch.Generator().manual_seed(seed)
            padding = indices < 0
            indices = self.there(indices.clamp(min=0))
            labels = self.labels[indices]
            if bool(padding.any()):
                labels = labels.masked_fill(self.there(padding), IGNORE)
            yield self.prepare(self.images[indices], generator), labels

    def there(self, drawn: Tensor) -> Tensor:
        """A small tensor on the device; CUDA copies it aside at once, so that nobody waits for the step before."""
        return drawn.to(self.device, non_blocking=self.device.type == "cuda")

    def prepare(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """uint8 [B, 3, H, W] to the normalised float32 [B, 3, size, size] of one batch."""
        count, side = len(images), images.shape[-1]
        flip = random_flips(count, generator) if self.flip else torch.zeros(count, dtype=torch.bool)
        if self.resized and self.crop_padding:
            boxes = self.there(random_boxes(count, generator))
            result = resized_crop(images.float(), boxes, self.there(flip), self.size)
        elif self.resized:  # without a crop: the whole image, as FolderLoader has it, not the middle of its margin
            whole = F.interpolate(images.float(), (self.size, self.size), mode="bilinear", antialias=True)
            result = torch.where(self.there(flip)[:, None, None, None], whole.flip(3), whole)
        elif (self.train and (self.flip or self.crop_padding)) or side != self.size:
            room = side + 2 * self.crop_padding - self.size
            if self.crop_padding:
                corner = torch.randint(room + 1, (2, count), generator=generator)
            else:
                corner = torch.full((2, count), room // 2)
            top, left = self.there(corner)
            result = crop_flip(images, top, left, self.there(flip), self.size, self.crop_padding)
        else:
            result = images
        scaled = (result.float() / 255 - self.mean) / self.std
        return scaled.contiguous(memory_format=self.format)


class FolderLoader(_Position):
    """The same protocol over image files, decoded and augmented by worker processes (torchvision transforms
    v2).

    The draw of an image depends on (seed, epoch, image) alone, hence neither on the number of workers nor of
    ranks. Arguments as `DeviceLoader`; `workers` is the number of decoding processes, 0 for none.
    """

    def __init__(
        self,
        split: Split,
        size: int,
        batch_size: int,
        *,
        train: bool,
        mean: tuple[float, ...] = (0.0, 0.0, 0.0),
        std: tuple[float, ...] = (1.0, 1.0, 1.0),
        flip: bool = False,
        crop_padding: int = 0,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        device: torch.device | str = "cpu",
        channels_last: bool = True,
    ) -> None:
        super().__init__(len(split), batch_size, train, seed, rank, world_size)
        self.dataset = _FolderDataset(split, size, train, flip, crop_padding > 0, seed)
        self.workers = workers
        self.mean, self.std = torch.tensor(mean).view(1, -1, 1, 1), torch.tensor(std).view(1, -1, 1, 1)
        self.format = torch.channels_last if channels_last else torch.contiguous_format
        self.to(device)

    def to(self, device: torch.device | str) -> FolderLoader:
        """Give batches out on `device`; returns the loader itself."""
        self.device = torch.device(device)
        self.mean, self.std = self.mean.to(self.device), self.std.to(self.device)
        return self

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.begin()
        start, epoch = self.batch, self.epoch
        # Workers read ahead, so the plan of the epoch is drawn up on its own and the position advances as
        # batches are handed out.
        plan = [[(int(i), epoch) for i in share] for share in self.shares()]
        self.set_epoch(epoch, start)
        loader: torch.utils.data.DataLoader[Any] = torch.utils.data.DataLoader(
            self.dataset,
            batch_sampler=plan,
            num_workers=self.workers,
            collate_fn=_collate,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=_ignore_interrupt,
            # A fixed generator: without one, DataLoader draws its base seed from the global stream of torch.
            generator=torch.Generator().manual_seed(mix_seed(self.seed, epoch)),
        )
        for images, labels, error in loader:
            if error:
                raise ValueError(error)
            self.batch += 1
            scaled = images.to(self.device, non_blocking=True).float() / 255
            scaled = (scaled - self.mean) / self.std
            yield scaled.contiguous(memory_format=self.format), labels.to(self.device, non_blocking=True)


class _FolderDataset(torch.utils.data.Dataset[Any]):
    """(image number, epoch) -> (uint8 [3, size, size], label, error sentence or "")."""

    def __init__(self, split: Split, size: int, train: bool, flip: bool, crop: bool, seed: int) -> None:
        from torchvision.transforms import v2

        if split.files is None:
            raise ValueError("FolderLoader needs a split of files; use DeviceLoader for images in memory")
        self.files, self.labels, self.size, self.seed = split.files, split.labels, size, seed
        steps: list[Any] = []
        if train and crop:
            steps.append(v2.RandomResizedCrop(size, scale=(0.25, 1.0), antialias=True))
        else:
            steps += [v2.Resize(size, antialias=True), v2.CenterCrop(size)]
        if train and flip:
            steps.append(v2.RandomHorizontalFlip())
        self.transform = v2.Compose(steps)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int, str]:
        index, epoch = key
        label = int(self.labels[index]) if index >= 0 else IGNORE
        index = max(index, 0)
        try:
            image = read_image(self.files[index])
        except ValueError as error:
            # Handed back as text: an exception raised in a worker arrives wrapped in a page of traceback.
            return torch.zeros(3, self.size, self.size, dtype=torch.uint8), label, str(error)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(mix_seed(self.seed, epoch, index))
            return self.transform(image), label, ""


def _collate(samples: list[tuple[Tensor, int, str]]) -> tuple[Tensor, Tensor, str]:
    images, labels, errors = zip(*samples, strict=True)
    return torch.stack(images), torch.tensor(labels), next((e for e in errors if e), "")


def _ignore_interrupt(_: int) -> None:
    # Ctrl-C reaches the whole process group; the main process decides when to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


Loader = DeviceLoader | FolderLoader


def make_loader(
    data: ImageData,
    *,
    train: bool,
    batch_size: int,
    mean: tuple[float, ...] = (0.0, 0.0, 0.0),
    std: tuple[float, ...] = (1.0, 1.0, 1.0),
    flip: bool = False,
    crop_padding: int = 0,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
    channels_last: bool = True,
    workers: int = 0,
) -> Loader:
    """The loader for data in memory or for files, as `data` is. Arguments as `DeviceLoader`."""
    split = data.train if train else data.test
    common: dict[str, Any] = {
        "train": train,
        "mean": mean,
        "std": std,
        "flip": flip and data.flip,
        "crop_padding": crop_padding,
        "seed": seed,
        "rank": rank,
        "world_size": world_size,
        "device": device,
        "channels_last": channels_last,
    }
    if split.images is None:
        return FolderLoader(split, data.image_size, batch_size, workers=workers, **common)
    return DeviceLoader(split, data.image_size, batch_size, resized=data.resized_crop, **common)
