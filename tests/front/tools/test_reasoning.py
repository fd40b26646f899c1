import pytest
from answers import PLACES, answers, cut, joined, read
from hypothesis import given

from multilora.front.tools.base import Content, Reasoning, collect
from multilora.front.tools.reasoning import REASONING, opened_by


def parts(name: str, text: str, prompt: str = "") -> tuple[str, str]:
    events = read(REASONING[name](prompt), [text])
    assert joined(read(REASONING[name](prompt), text)) == joined(events)
    answer = collect(events)
    return answer.reasoning, answer.content


@pytest.mark.parametrize(
    ("text", "reasoning", "content"),
    [
        ("I think.</think>42", "I think.", "42"),
        ("<think>I think.</think>42", "I think.", "42"),
        ("<think>\nI think.\n\nMore.\n</think>\n\n42\n", "I think.\n\nMore.", "42\n"),
        ("cut in the mid", "cut in the mid", ""),
        ("cut at </thi", "cut at </thi", ""),
        ("</think>42", "", "42"),
        ("<think></think>", "", ""),
        ("a</think>b</think>c <think>", "a", "b</think>c <think>"),
        ("a <think> b</think>c", "a <think> b", "c"),
        ("a\n<tool_call>b</think>c", "a\n<tool_call>b", "c"),
        ("", "", ""),
        (" \n", "", ""),
    ],
)
def test_deepseek_r1(text, reasoning, content):
    assert parts("deepseek_r1", text) == (reasoning, content)


@pytest.mark.parametrize(
    ("text", "reasoning", "content"),
    [
        ("<think>\nI think.\n</think>\n\n42", "I think.", "42"),
        ("\n<think>\nI think.\n</think>\n\n42", "I think.", "42"),
        ("42", "", "42"),
        (" 42 ", "", " 42 "),
        ("<thin", "", "<thin"),
        ("<b>42</b>", "", "<b>42</b>"),
        ("42 <think>a</think>", "", "42 <think>a</think>"),
        ("<think>cut", "cut", ""),
        ("<think>a\n<tool_call>\n{}", "a", "<tool_call>\n{}"),
        ("<think>\n<tool_call>\n{}", "", "<tool_call>\n{}"),
        ("<think><tool_call>{}", "", "<tool_call>{}"),
        ("<think>a, by <tool_call> perhaps</think>b", "a, by <tool_call> perhaps", "b"),
        ("<think>a\n<tool_c", "a\n<tool_c", ""),
    ],
)
def test_qwen3(text, reasoning, content):
    assert parts("qwen3", text) == (reasoning, content)


def test_the_prompt_may_have_opened_or_closed_the_thoughts():
    assert parts("qwen3", "a</think>b", "<|im_start|>assistant\n<think>\n") == ("a", "b")
    assert parts("qwen3", "<tool_call>\n{}", "assistant\n<think>\n") == ("", "<tool_call>\n{}")
    assert parts("qwen3", "b", "assistant\n<think>\n\n</think>\n\n") == ("", "b")
    assert parts("deepseek_r1", "b", "assistant\n<think>\n\n</think>\n\n") == ("", "b")
    assert parts("qwen3-thinking", "a</think>b") == ("a", "b")
    assert opened_by("What is <think>?\nassistant\n") is None


def test_deltas():
    parser = REASONING["deepseek-r1"]("")
    assert parser.push("<th") == []
    assert parser.push("ink>\nI") == [Reasoning("I")]
    assert parser.push(" think.\n</") == [Reasoning(" think.")]
    assert parser.push("b") == [Reasoning("\n</b")]
    assert parser.push("</think>\n") == []
    assert parser.push("\n4") == [Content("4")]
    assert parser.push("2") == [Content("2")]
    assert parser.finish() == []


@pytest.mark.parametrize("name", sorted(REASONING))
@given(text=answers("<think>", "</think>", "<tool_call>", "\n<tool_call>", "thought", " " * 300), places=PLACES)
def test_any_text_in_any_pieces(name, text, places):
    events = read(REASONING[name](""), [text])
    assert joined(read(REASONING[name](""), cut(text, places))) == joined(events)
    answer = collect(events)
    every = iter(text)
    assert all(ch in every for ch in answer.reasoning + answer.content), "nothing is added"
    kept, written = ("".join(t.split()) for t in (answer.reasoning + answer.content, text))
    letters = iter(written)
    assert all(ch in letters for ch in kept)
    assert len(written) - len(kept) in (0, len("<think>"), len("</think>"), len("<think></think>"))
