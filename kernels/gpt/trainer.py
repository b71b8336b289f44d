"""One training step of the GPT, and what must be kept to go on with it later, bit for bit.

Every random number of a step comes from (seed, step, rank), so no generator's state is stored.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from kernels._errors import CommandError
from kernels.gpt.data import TextData
from kernels.gpt.model import GPT

BETAS = (0.9, 0.95)
FINAL_RATE = 0.1  # the learning rate ends at this share of its highest value
VALIDATION_SEED = 1  # the same validation crops in every run and at every step


@dataclass(frozen=True)
class TrainSettings:
    """How a run trains; the defaults suit small models."""

    steps: int  # of the whole run: the learning rate falls until the last one
    batch_size: int  # sequences per step and process
    learning_rate: float  # at its highest, after warm-up
    warmup_steps: int = 100
    weight_decay: float = 0.1  # on matrices only
    clip: float = 1.0  # highest norm of all gradients together
    bf16: bool = False  # matrix products and attention in bfloat16 (torch.autocast)
    seed: int = 0


def learning_rate(step: int, settings: TrainSettings) -> float:
    """Linear warm-up, then half a cosine down to FINAL_RATE of the highest rate."""
    warmup = min(settings.warmup_steps, settings.steps // 10)  # a short run warms up for a tenth
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, settings.steps - warmup))
    cosine = (1 + math.cos(math.pi * progress)) / 2
    return settings.learning_rate * (FINAL_RATE + (1 - FINAL_RATE) * cosine)


def mixed_seed(*parts: int) -> int:
    """32 well-mixed bits of `parts`; torch's CPU generator looks at no more of a seed."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


class Trainer:
    """Trains `model` on `data`; under torch.distributed every process holds one.

    `train_step` reseeds torch's global generator, which dropout draws from.
    """

    def __init__(self, model: GPT, data: TextData, settings: TrainSettings) -> None:
        data.check(model.config.block_size)
        self.model = model
        self.data = data
        self.settings = settings
        self.distributed = dist.is_initialized()
        self.rank = dist.get_rank() if self.distributed else 0
        self.replica: nn.Module = DistributedDataParallel(model) if self.distributed else model
        self.device = model.token_embedding.weight.device
        self.losses: list[float] = []  # per step, mean over processes
        self.validation: list[tuple[int, float]] = []  # (steps done, loss)
        matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
        vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": settings.weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=settings.learning_rate,
            betas=BETAS,
            fused=True,
        )

    @property
    def step(self) -> int:
        """Steps done."""
        return len(self.losses)

    def _loss(self, model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x, y = x.to(self.device), y.to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.bf16):
            return model(x, y, with_logits=False)[1]

    def train_step(self) -> float:
        """One optimiser step; returns its loss. Raises CommandError where that is not finite."""
        settings = self.settings
        seed = mixed_seed(settings.seed, self.step, self.rank)
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        block_size = self.model.config.block_size
        x, y = self.data.batch("train", settings.batch_size, block_size, generator)
        self.model.train()
        loss = self._loss(self.replica, x, y)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        mean = loss.detach()
        if self.distributed:
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        value = mean.item()
        if not math.isfinite(value):  # before the weights are spoilt
            raise CommandError(
                f"the loss became {value} at step {self.step + 1}: lower the learning rate"
            )
        nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, settings)
        self.optimizer.step()
        self.losses.append(value)
        return value

    @torch.inference_mode()
    def validate(self, batches: int) -> float:
        """Mean loss over the same `batches` validation batches each time; also recorded."""
        generator = torch.Generator().manual_seed(VALIDATION_SEED)
        block_size = self.model.config.block_size
        self.model.eval()
        total = 0.0
        for _ in range(batches):
            x, y = self.data.batch("validation", self.settings.batch_size, block_size, generator)
            total += self._loss(self.model, x, y).item()
        self.validation.append((self.step, total / batches))
        return total / batches

    def state(self) -> dict[str, torch.Tensor]:
        """Everything that `load_state` needs, as named tensors."""
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{key}.{name}"] = value
        tensors["history.train"] = torch.tensor(self.losses, dtype=torch.float64)
        tensors["history.validation"] = torch.tensor(self.validation, dtype=torch.float64)
        return tensors

    def load_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """Goes on where `state` was taken; the model must hold its weights already.

        Raises CommandError where a tensor is missing or has another shape.
        """
        for name, parameter in self.model.named_parameters():
            shapes = {"step": (), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}
            for key, shape in shapes.items():
                value = tensors.get(f"optimizer.{key}.{name}")
                if value is None or value.shape != torch.Size(shape):
                    raise CommandError(f"the checkpoint has no fitting optimizer.{key}.{name}")
                self.optimizer.state[parameter][key] = value.to(self.device)
        try:
            self.losses = tensors["history.train"].tolist()
            validation = tensors["history.validation"].view(-1, 2).tolist()
        except KeyError as error:
            raise CommandError(f"the checkpoint has no tensor {error}") from error
        self.validation = [(int(step), loss) for step, loss in validation]
