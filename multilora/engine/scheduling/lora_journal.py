"""What happens to the LoRA table between two plans, noted so that the next plan carries it.

Stands where `adapters/` writes a LoRA table: residency installs and removes here, and every runner that executes the
plan changes its own table.
"""

from multilora.engine.plan import LoraChange, LoraInstall, LoraRemoval
from multilora.lora.panels import PanelLayout


class LoraJournal:
    def __init__(self) -> None:
        self._changes: list[LoraChange] = []

    def install(self, slot: int, layout: PanelLayout, pages: list[int]) -> None:
        """The adapter's page i is now arena page pages[i]."""
        self._changes.append(LoraInstall(slot, layout.shape, list(pages)))

    def remove(self, slot: int) -> None:
        self._changes.append(LoraRemoval(slot))

    def take(self) -> list[LoraChange]:
        """The changes since the last call, in order."""
        changes, self._changes = self._changes, []
        return changes
