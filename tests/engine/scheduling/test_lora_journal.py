from multilora.engine.plan import LoraInstall, LoraRemoval
from multilora.engine.scheduling.lora_journal import LoraJournal
from multilora.lora.panels import AdapterShape, PanelLayout


def test_changes_in_order_once() -> None:
    journal, shape, pages = LoraJournal(), AdapterShape(((8,),)), [4, 2]
    layout = PanelLayout(2, shape, (), (), (), 0)
    journal.install(3, layout, pages)
    journal.remove(3)
    pages.clear()  # the journal keeps its own
    assert journal.take() == [LoraInstall(3, shape, [4, 2]), LoraRemoval(3)]
    assert journal.take() == []
