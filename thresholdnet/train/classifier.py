"""The LightningModule: one step, exact bookkeeping, and everything that a checkpoint must hold."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor, nn
from torch.nn import functional as F

from ..checkpoint import INFO_KEY, save_atomic
from ..graphs import GraphedStep, check_model
from ..loaders import IGNORE, mix_seed
from .recipes import Recipe

Batch = tuple[Tensor, Tensor]
FINITE_CHECK_STEPS = 20  # on a GPU each look at the loss waits for the device


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint plugin with a write that happens whole or not at all."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write `checkpoint` to `path`; raises OSError and leaves the old file when the disk is full."""
        save_atomic(checkpoint, path)


class Classifier(pl.LightningModule):
    """An image classifier in training.

    The learning rate and the random stream are set from the step number before each batch, and the sums
    behind the epoch's figures travel in the checkpoint, so that a run resumed in the middle of an epoch
    repeats the unbroken one.

    Args:
        model: network, [B, C, H, W] to [B, num_classes].
        recipe: how to train.
        steps_per_epoch: batches per epoch.
        info: what checkpoints say about the run (model, classes, normalisation, ...); plain Python values.
        seed: of the random stream of each step (dropout).
        ema_decay: keep an exponential average of the weights and evaluate with it; None for none.
        cuda_graph: a step of training, optimizer included, and one of evaluation as CUDA graphs, captured behind the
            first batches of each size: an epoch has one size or two of either kind.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        steps_per_epoch: int,
        info: dict[str, Any],
        *,
        seed: int = 0,
        ema_decay: float | None = None,
        cuda_graph: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.ema = copy.deepcopy(model).requires_grad_(False).eval() if ema_decay is not None else None
        self.ema_decay = ema_decay
        self.cuda_graph = cuda_graph
        self.graphs: dict[tuple[Callable[..., None], int], GraphedStep] = {}  # by step and batch size
        self.recipe, self.steps_per_epoch, self.info, self.seed = recipe, steps_per_epoch, info, seed
        self.history: list[dict[str, float]] = []
        self.best: dict[str, float] = {}
        self.lr = recipe.lr_at(0, steps_per_epoch)
        # written in place, as a graph does: loss x images, correct, images; the step, and the first without a loss
        self.train_sums, self.test_sums = _zeros("cpu"), _zeros("cpu")
        self.at, self.bad_step = torch.tensor(0), torch.tensor(-1)
        self.carried = 0.0  # seconds of this epoch before the run was resumed
        self.restored: dict[str, Any] | None = None
        self.epoch_started = self.test_started = time.perf_counter()

    @property
    def net(self) -> nn.Module:
        """The network that evaluation uses: the averaged one where there is one."""
        return self.model if self.ema is None else self.ema

    # --- training

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The recipe's optimiser; no weight decay on norm parameters and biases."""
        decayed, plain = split_decay(self.model)
        groups = [
            {"params": decayed, "weight_decay": self.recipe.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        if self.recipe.optimizer == "adam":
            return torch.optim.Adam(groups, **self.optimizer_ways())
        momentum = self.recipe.momentum
        return torch.optim.SGD(groups, momentum=momentum, nesterov=momentum > 0, **self.optimizer_ways())

    def on_train_start(self) -> None:
        """Take up the figures of the epoch that the checkpoint was saved in."""
        self.train_sums, self.test_sums = _zeros(self.device), _zeros(self.device)
        self.at = torch.tensor(self.global_step, device=self.device)
        self.bad_step = torch.tensor(-1, device=self.device)
        self.start_epoch()
        if self.restored:
            sums, self.restored = self.restored["sums"], None
            # One row per process. With another number of processes the first one carries the total.
            row = sums[self.global_rank] if len(sums) == self.trainer.world_size else sums.sum(0)
            if len(sums) == self.trainer.world_size or self.global_rank == 0:
                self.train_sums.copy_(row)
        if self.cuda_graph:
            check_model(self.model)
        optimizer, ways = self.trainer.optimizers[0], self.optimizer_ways()
        for group in optimizer.param_groups:  # a checkpoint's have taken the place of ours
            group.update(ways)
        for state in optimizer.state.values():
            if "step" in state:
                state["step"] = state["step"].to(self.device if ways["fused"] else "cpu", torch.float32)

    def optimizer_ways(self) -> dict[str, Any]:
        """How the optimizer computes: in a CUDA graph its rate and its counters lie on the device."""
        within = self.cuda_graph and self.device.type == "cuda"
        rate = torch.tensor(self.lr, device=self.device) if within else self.lr
        ways = {"lr": rate, "fused": within or None}
        return ways | {"capturable": within} if self.recipe.optimizer == "adam" else ways

    def on_train_epoch_start(self) -> None:
        """A new epoch begins (not called when one is taken up in its middle)."""
        self.start_epoch()
        self.carried = 0.0
        loader: Any = self.trainer.train_dataloader
        loader.set_epoch(self.current_epoch)

    def start_epoch(self) -> None:
        """Set the epoch's sums to zero and its clock to now."""
        self.train_sums.zero_()
        self.epoch_started = time.perf_counter()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Set learning rate and random stream: both pure functions of the step."""
        self.lr = self.recipe.lr_at(self.global_step, self.steps_per_epoch)
        groups = self.trainer.optimizers[0].param_groups
        if isinstance(groups[0]["lr"], Tensor):
            groups[0]["lr"].fill_(self.lr)  # one for all of them
        else:
            for group in groups:
                group["lr"] = self.lr
        _seed(mix_seed(self.seed, self.global_step, self.global_rank), self.device)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        """Loss of one batch; None where the optimizer has stepped already, with the graph."""
        loss = None
        if self.cuda_graph:
            self.run_graph(self.learn, *batch)
        else:
            loss = self.loss_of(*batch)
        if self.device.type == "cpu" or self.global_step % FINITE_CHECK_STEPS == 0:
            self.check_finite()
        return loss

    def run_graph(self, step: Callable[..., None], images: Tensor, labels: Tensor) -> None:
        """A step in place on one batch, behind a graph for batches of its size."""
        key = step, len(images)
        if key not in self.graphs:
            self.graphs[key] = GraphedStep(step)
        self.graphs[key](images, labels)

    def loss_of(self, images: Tensor, labels: Tensor) -> Tensor:
        """Loss of one batch, added to the epoch's sums."""
        logits = self.model(images)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.recipe.label_smoothing)
        with torch.no_grad():
            self.train_sums += _sums(loss.detach() * len(labels), logits, labels, self.train_sums)
            broken = ~torch.isfinite(loss.detach()) & (self.bad_step < 0)
            self.bad_step.copy_(torch.where(broken, self.at, self.bad_step))
            self.at += 1
        return loss

    def learn(self, images: Tensor, labels: Tensor) -> None:
        """The whole step of one batch, from the images to the new weights, without a wait: what a graph holds."""
        optimizer, scaler = self.trainer.optimizers[0], getattr(self.trainer.precision_plugin, "scaler", None)
        loss = self.loss_of(images, labels)
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        with torch.autocast(self.device.type, enabled=False):
            if scaler is not None:
                loss = scaler.scale(loss)
            grads = torch.autograd.grad(loss, parameters, allow_unused=True)
            for parameter, grad in zip(parameters, grads, strict=True):
                parameter.grad = _laid_as(parameter, grad)
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
        optimizer.zero_grad()

    def check_finite(self) -> None:
        """Raise ValueError once a loss was infinite or not a number; called before anything is saved, too."""
        step = int(self.bad_step)
        if step >= 0:
            lr = self.recipe.lr_at(step, self.steps_per_epoch)
            raise ValueError(
                f"the loss is no finite number at epoch {step // self.steps_per_epoch + 1}, step {step} "
                f"(learning rate {lr:.3g}); try a lower lr, or precision 32"
            )

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """Step, then move the averaged weights: before any callback can save a checkpoint."""
        if self.cuda_graph and optimizer_closure is not None:
            optimizer_closure()  # Lightning's name for training_step, which has done it all
        else:
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if self.ema is not None and self.ema_decay is not None:
            # A short memory at first: the random weights of the start must not linger for 1 / (1 - decay)
            # steps.
            update_average(self.ema, self.model, min(self.ema_decay, (1 + self.global_step) / (10 + self.global_step)))

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        """A graph's gradients live in the graph alone."""
        if not self.cuda_graph:
            super().optimizer_zero_grad(epoch, batch_idx, optimizer)

    def teardown(self, stage: str) -> None:
        """Let go of the graphs, which hold this module, and of their memory."""
        self.graphs.clear()

    # --- evaluation

    def on_validation_start(self) -> None:
        """Zero the sums; give every process the batch norm statistics of the first one."""
        self.check_finite()
        self.test_started = time.perf_counter()
        self.test_sums.zero_()
        if self.trainer.world_size > 1:
            for buffer in self.buffers():
                torch.distributed.broadcast(buffer, src=0)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add one test batch to the sums; labels of IGNORE do not count."""
        if self.cuda_graph:
            self.run_graph(self.judge, *batch)
        else:
            self.judge(*batch)

    def judge(self, images: Tensor, labels: Tensor) -> None:
        """Add one test batch to the sums."""
        logits = self.net(images)
        loss = F.cross_entropy(logits.float(), labels, ignore_index=IGNORE, reduction="sum")
        self.test_sums += _sums(loss, logits, labels, self.test_sums)

    def finish_epoch(self) -> dict[str, float]:
        """Close the epoch's books (all processes together) and return its row of the history."""
        train, test = self.reduced(self.train_sums).tolist(), self.reduced(self.test_sums).tolist()
        now = time.perf_counter()
        train_seconds = self.test_started - self.epoch_started + self.carried
        row = {
            "epoch": self.current_epoch + 1,
            "step": self.global_step,
            "lr": self.lr,
            "train_loss": train[0] / train[2],
            "train_accuracy": train[1] / train[2],
            "test_loss": test[0] / test[2],
            "test_accuracy": test[1] / test[2],
            "seconds": now - self.test_started + train_seconds,
            "images_per_second": train[2] / train_seconds,
        }
        if not math.isfinite(row["test_loss"]):
            raise ValueError(
                f"the test loss is no finite number after epoch {row['epoch']} (learning rate {self.lr:.3g})"
            )
        self.history.append(row)
        if not self.best or row["test_accuracy"] > self.best["test_accuracy"]:
            self.best = row
        return row

    def reduced(self, sums: Tensor) -> Tensor:
        """Sum over all processes."""
        return self.gathered(sums).sum(0)

    def gathered(self, sums: Tensor) -> Tensor:
        """[processes, 3]: the sums of every process."""
        if self.trainer.world_size == 1:
            return sums[None]
        rows = [torch.zeros_like(sums) for _ in range(self.trainer.world_size)]
        torch.distributed.all_gather(rows, sums)
        return torch.stack(rows)

    # --- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what the network needs to be used, and what the run needs to go on."""
        self.check_finite()
        checkpoint[INFO_KEY] = self.info | {
            "ema": self.ema is not None,
            "epoch": len(self.history),
            "step": self.global_step,
            "history": self.history,
            "best": self.best,
            "progress": {
                "sums": self.gathered(self.train_sums).cpu(),
                "seconds": time.perf_counter() - self.epoch_started + self.carried,
            },
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over history, best epoch and the open epoch's figures."""
        info = checkpoint[INFO_KEY]
        self.history, self.best = list(info["history"]), dict(info["best"])
        self.restored = info["progress"]
        self.carried = info["progress"]["seconds"]


def split_decay(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Parameters with and without weight decay: matrices and filters; norm parameters and biases."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim <= 1]


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """`average = decay * average + (1 - decay) * model` for floating tensors; counters are copied."""
    old, new = list(average.state_dict().values()), list(model.state_dict().values())
    pairs = [(a, b) for a, b in zip(old, new, strict=True) if a.is_floating_point()]
    torch._foreach_lerp_([a for a, _ in pairs], [b for _, b in pairs], 1 - decay)
    for a, b in zip(old, new, strict=True):
        if not a.is_floating_point():
            a.copy_(b)


def _laid_as(parameter: Tensor, grad: Tensor | None) -> Tensor | None:
    """A gradient in its parameter's layout, which fused optimizers ask for."""
    if grad is None or grad.stride() == parameter.stride():
        return grad
    return torch.empty_like(parameter).copy_(grad)


def _seed(seed: int, device: torch.device) -> None:
    """torch.manual_seed for what a step draws from: that one notes a stack for every kind of device not in use."""
    if device.type not in ("cpu", "cuda"):
        torch.manual_seed(seed)
        return
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def _zeros(device: torch.device | str) -> Tensor:
    # Apple GPUs have no float64.
    dtype = torch.float32 if torch.device(device).type == "mps" else torch.float64
    return torch.zeros(3, dtype=dtype, device=device)


def _sums(loss: Tensor, logits: Tensor, labels: Tensor, like: Tensor) -> Tensor:
    correct = (logits.argmax(1) == labels).sum()
    return torch.stack([loss.to(like.dtype), correct.to(like.dtype), (labels != IGNORE).sum().to(like.dtype)])
