"""Two processes with half a batch each are one process with the whole batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lit_wm.dreamerv3 import DreamerV3Module
from lit_wm.strategy import ReplicatedStrategy
from lit_wm.types import Batch, Spaces, Spec

B, T, H, UPDATES = 4, 6, 5, 3
SPACES = Spaces({"obs": Spec("float32", (5,))}, {"action": Spec("int32", (), 4)})
SIZES = {"deter": 32, "hidden": 16, "stoch": 4, "classes": 4, "depth": 2, "units": 16}


class SharedNoise:
    """The noise of one rank: its rows of noise that is drawn for the whole batch, so that ranks can be
    compared.
    """

    def __init__(self, update: int, rank: int, world: int):
        self.update, self.rank, self.world = update, rank, world

    def exponential(self, name: str, shape: tuple[int, ...], t: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(hash((self.update, t, len(name))) % 2**31)
        whole = torch.rand((shape[0] * self.world, *shape[1:]), generator=generator).neg_().log1p_().neg_()
        return whole[self.rank * shape[0] : (self.rank + 1) * shape[0]]

    def state_dict(self) -> dict[str, Any]:
        return {}


class Feed(pl.Callback):
    """Sets the noise of each update, and writes what the process has become."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.grads: dict[str, Tensor] = {}

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        module.noise = SharedNoise(batch_idx, trainer.global_rank, trainer.world_size)

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        if module.updates == 0:  # already averaged over the processes
            for name, p in module.named_parameters():
                if p.grad is not None:
                    self.grads.setdefault(name, p.grad.clone())

    def on_train_end(self, trainer: Any, module: Any) -> None:
        torch.save(
            {"state": module.state_dict(), "grads": self.grads},
            self.folder / f"rank{trainer.global_rank}of{trainer.world_size}.pt",
        )


class Data(pl.LightningDataModule):
    """The same whole batches in every process, of which each takes its rows."""

    def train_dataloader(self) -> DataLoader:
        generator = torch.Generator().manual_seed(7)
        share = B // self.trainer.world_size
        rows = slice(self.trainer.global_rank * share, (self.trainer.global_rank + 1) * share)
        batches = []
        for _ in range(UPDATES):
            flags = torch.rand(3, B, T, generator=generator) < 0.15
            batches.append(
                Batch(
                    obs={"obs": torch.randn(B, T, 5, generator=generator)[rows]},
                    prev_action={"action": torch.randint(0, 4, (B, T), generator=generator)[rows]},
                    reward=torch.randn(B, T, generator=generator)[rows],
                    is_first=flags[0][rows],
                    is_last=flags[1][rows],
                    is_terminal=(flags[1] & flags[2])[rows],
                )
            )
        return DataLoader(batches, batch_size=None, collate_fn=lambda x: x)


def make_module() -> DreamerV3Module:
    """Random weights everywhere: heads that start at zero would leave gradients of rounding size."""
    torch.manual_seed(0)
    module = DreamerV3Module(
        SPACES.to_plain(), "debug", **SIZES, imag_length=H, lr=4e-5, warmup=1, log_every=1
    )
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return module


def train(folder: Path, devices: int) -> None:
    module = make_module()
    strategy = (
        ReplicatedStrategy(start_method="fork", process_group_backend="gloo") if devices > 1 else "auto"
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        max_steps=UPDATES,
        logger=False,
        callbacks=[Feed(folder)],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
    )
    trainer.fit(module, datamodule=Data())


def test_two_processes_equal_one(tmp_path: Path) -> None:
    train(tmp_path, 1)
    train(tmp_path, 2)
    one = torch.load(tmp_path / "rank0of1.pt", weights_only=True)
    two = [torch.load(tmp_path / f"rank{r}of2.pt", weights_only=True) for r in range(2)]
    assert one["grads"].keys() == two[0]["grads"].keys()
    for key, grad in one["grads"].items():
        assert (two[0]["grads"][key] - grad).abs().max() <= 1e-4 * grad.abs().max(), f"gradient of {key}"

    start = make_module().state_dict()
    weights = [k for k, v in start.items() if v.is_floating_point()]
    moved = min(float((one["state"][k] - start[k]).abs().max()) for k in weights if k in one["grads"])
    assert moved > 3e-5  # every tensor was trained, and by much more than the limit below
    assert int(one["state"]["updates_done"]) == int(two[0]["state"]["updates_done"]) == UPDATES
    for key in weights:
        assert torch.equal(two[0]["state"][key], two[1]["state"][key]), f"{key} differs between the ranks"
        error = float((two[0]["state"][key].double() - one["state"][key].double()).abs().max())
        assert error <= 1e-6, f"{key} differs by {error:.2e} from one process"
