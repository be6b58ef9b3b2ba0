"""A tiny module and data module with the interfaces that the callbacks use.

:func:`main` trains them; tests run it in processes of their own, which tell every stage of saving and linger
there, so that they can be killed at a chosen place.
"""

import random
import time
from pathlib import Path

import gymnasium as gym
import lightning.pytorch as pl
import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lit_wm.callbacks.checkpoint import ResumableCheckpoint
from lit_wm.envs import make_vector_env
from lit_wm.module import uncounted
from lit_wm.noise import NoiseStreams
from lit_wm.types import Spaces, Spec, State, States, Trajectory


class TinyModel(nn.Module):
    """The state is a running digest of the observations; images are decoded as one brightness."""

    def __init__(self, spaces):
        super().__init__()
        self.spaces = spaces

    def encode(self, obs, state=None, action=None, is_first=None, noise=None):
        seen = obs["image" if "image" in obs else "obs"]
        return State(seen.float().flatten(1).mean(1, keepdim=True))

    def imagine(self, state, actions=None, horizon=None, noise=None):
        deter = state.deter[:, None].expand(-1, horizon + 1, -1)
        zeros = torch.zeros(len(deter), horizon)
        return Trajectory(States(State(deter)), actions, zeros, zeros)

    def decode(self, state):
        out = {}
        for k, s in self.spaces.obs.items():
            lead = state.deter.shape[:-1]
            value = state.deter.view(*lead, *[1] * len(s.shape)).expand(*lead, *s.shape)
            out[k] = value / 255 if s.is_image else value
        return out


class TinyModule(pl.LightningModule):
    """Three linear layers with an optimizer each; noise from a stream and from all global generators."""

    uses_global_random_numbers = True

    def __init__(self, spaces=None):
        super().__init__()
        self.automatic_optimization = False
        spaces = spaces or Spaces({"obs": Spec("float32", (4,))}, {"action": Spec("int32", (), 2)})
        self.model = TinyModel(spaces)
        self.parts = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.register_buffer("updates_done", torch.zeros((), dtype=torch.int64))
        self.noise = NoiseStreams(3)

    @property
    def updates(self):
        return int(self.updates_done)

    @property
    def env_steps(self):
        return self.trainer.datamodule.env_steps

    def configure_optimizers(self):
        return [torch.optim.Adam(p.parameters(), 1e-2) for p in self.parts]

    def training_step(self, ticket, batch_idx):
        x = ticket(self)
        x = x + 0.1 * self.noise.normal("input", tuple(x.shape))
        if self.uses_global_random_numbers:
            x = x + 0.1 * torch.rand_like(x) + 0.1 * np.random.rand() + 0.1 * random.random()  # noqa: NPY002
        for part in self.parts:
            x = part(x)
        x.square().mean().backward()
        for i, opt in enumerate(self.optimizers()):
            if i:
                with uncounted(opt):
                    opt.step()
            else:
                opt.step()
            opt.zero_grad()
        self.updates_done += 1

    def validation_step(self, batch, batch_idx):
        pass

    def test_step(self, batch, batch_idx):
        pass

    def predict_step(self, batch, batch_idx):
        pass

    def policy(self, obs, state=None, is_first=None, mode="train", noise=None):
        noise = noise or self.noise
        coin = noise.exponential("policy", (len(is_first),)) > 0.7
        return {"action": coin.long()}, self.model.encode(obs)

    def rank_state_dict(self):
        return {"noise": self.noise.state_dict()}

    def load_rank_state_dict(self, state):
        self.noise.load_state_dict(state["noise"])


class TinyData(pl.LightningDataModule):
    """Collects CartPole observations one by one into a list of rows, and evicts all but the last 20."""

    def __init__(self, env="CartPole-v1", spaces=None):
        super().__init__()
        self.env, self.eval_envs, self.max_env_steps = env, 2, None
        self.rows, self.env_steps, self.collector = [], 0, None
        self.gym = gym.make("CartPole-v1")
        self.obs = torch.from_numpy(self.gym.reset(seed=7)[0])

    def make_envs(self, num_envs, seeds):
        return make_vector_env(self.env, num_envs, seeds)

    def ticket(self, module):
        action, _ = module.policy({"obs": self.obs[None]}, None, torch.zeros(1))
        obs, _, terminated, truncated, _ = self.gym.step(int(action["action"]))
        if terminated or truncated:
            obs, _ = self.gym.reset()
        self.obs, self.env_steps = torch.from_numpy(obs), self.env_steps + 1
        self.rows = [*self.rows, self.obs][-20:]
        return torch.stack(self.rows)

    def mean_frames(self):
        return {}

    def train_dataloader(self):
        return DataLoader(Forever(self.ticket), batch_size=None, collate_fn=lambda x: x)

    def val_dataloader(self):
        return DataLoader([0], batch_size=None)

    test_dataloader = predict_dataloader = val_dataloader

    def state_dict(self):
        return {"env_steps": self.env_steps}

    def load_state_dict(self, state):
        self.env_steps = state["env_steps"]

    def rank_state_dict(self):
        inner = self.gym.unwrapped
        return {
            "obs": self.obs,
            "physics": list(map(float, inner.state)),
            "elapsed": self.gym.get_wrapper_attr("_elapsed_steps"),
            "generator": inner.np_random.bit_generator.state,
        }

    def load_rank_state_dict(self, state):
        inner = self.gym.unwrapped
        self.gym.reset()
        self.obs, inner.state = state["obs"], np.array(state["physics"])
        wrapper = self.gym
        while not hasattr(wrapper, "_elapsed_steps"):
            wrapper = wrapper.env
        wrapper._elapsed_steps = state["elapsed"]
        inner.np_random.bit_generator.state = state["generator"]

    def snapshot_replay(self, directory):
        directory.mkdir()
        announce("replay")
        torch.save(self.rows, directory / "rows.pt")

    def restore_replay(self, directory):
        self.rows = torch.load(directory / "rows.pt", weights_only=True)


class Forever(IterableDataset):
    def __init__(self, ticket):
        self.ticket = ticket

    def __iter__(self):
        while True:
            yield self.ticket


STAGES = None  # a connection that is told the stages


def announce(stage):
    if STAGES is not None:
        STAGES.send(stage)
        time.sleep(0.05)


class Announcing(ResumableCheckpoint):
    """Says where it is, before and after each rename."""

    def _write_folder(self, trainer, pl_module, name):
        announce("begin")
        problem = super()._write_folder(trainer, pl_module, name)
        announce("folder")
        return problem

    def _clean(self, keep):
        announce("file")
        super()._clean(keep)
        announce("cleaned")


def digest(module, trainer, data):
    """Everything that must be equal after a resume."""
    optimizers = [o.state_dict()["state"] for o in trainer.optimizers]
    return {
        "weights": {k: v.clone() for k, v in module.state_dict().items()},
        "optimizers": optimizers,
        "rows": torch.stack(data.rows),
        "obs": data.obs,
        "counts": [module.updates, trainer.global_step, data.env_steps],
        "next": torch.rand(3),
    }


def main(root, updates, stages=None):
    global STAGES
    STAGES = stages
    torch.set_num_threads(1)
    pl.seed_everything(5)
    module, data = TinyModule(), TinyData()
    checkpoint = Announcing(every_n_updates=5, every_n_minutes=0)
    trainer = pl.Trainer(
        default_root_dir=root,
        max_epochs=-1,
        max_steps=updates,
        accelerator="cpu",
        logger=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[checkpoint],
    )
    last = Path(root) / "checkpoints" / "last.ckpt"
    trainer.fit(module, data, ckpt_path=last if last.exists() else None, weights_only=True)
    torch.save(digest(module, trainer, data), Path(root) / "digest.pt")
