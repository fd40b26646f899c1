"""How the ranks of an engine find each other. Called by `lead.py` and `follow.py`."""

from dataclasses import dataclass

import torch

from multilora.distributed.group import Group, join

JOIN_SECONDS = 1800.0
"""The longest that ranks wait for each other, as while they load weights. A step has the watchdog."""

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Groups:
    """model: its collectives run on the model's device, within steps; host: on the CPU, between steps, so that they
    are never mixed up with those of a step that still runs on a GPU."""

    model: Group
    host: Group

    def not_done(self, done: bool) -> list[int]:
        """The ranks that say no here, once all have said something."""
        answers = self.host.all_gather(torch.tensor([done], dtype=torch.uint8))
        return [rank for rank, answer in enumerate(answers) if not answer.item()]

    def close(self) -> None:
        """Leave both."""
        self.model.close()
        self.host.close()


def meet(directory: str, rank: int, size: int, device: torch.device, *, custom_all_reduce: bool) -> Groups:
    """The groups of the ranks that meet in this directory. Raises ConfigError if one does not come."""
    host = join(f"{directory}/host-group", rank, size, CPU, JOIN_SECONDS)
    if device.type == "cpu":
        return Groups(host, host)
    model = join(f"{directory}/model-group", rank, size, device, JOIN_SECONDS, custom_all_reduce=custom_all_reduce)
    return Groups(model, host)
