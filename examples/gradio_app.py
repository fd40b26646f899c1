"""A chat in the browser, by Gradio: a list to choose base model or adapter from, and answers that stream.

pip install 'gradio>=6' openai
python examples/gradio_app.py http://localhost:30000
"""

import sys
from collections.abc import Iterator
from typing import Any

import gradio
import openai


class Chat:
    """The server as Gradio's chat sees it."""

    def __init__(self, url: str):
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
        self.models = [model.id for model in self.client.models.list()]

    def answer(self, message: str, history: list[dict[str, Any]], model: str) -> Iterator[str]:
        """The answer so far, again and again."""
        messages: list[Any] = [{"role": turn["role"], "content": text_of(turn["content"])} for turn in history]
        messages.append({"role": "user", "content": message})
        text = ""
        stream = self.client.chat.completions.create(
            model=model, messages=messages, temperature=0, max_tokens=256, stream=True
        )
        for chunk in stream:
            for choice in chunk.choices:
                text += choice.delta.content or ""
            yield text

    def page(self) -> Any:
        """Gradio's chat with one more input: which model answers."""
        choice = gradio.Dropdown(choices=self.models, value=self.models[0], label="model or adapter")
        return gradio.ChatInterface(self.answer, additional_inputs=[choice], title="multilora")


def text_of(content: Any) -> str:
    """Gradio keeps what was said as text, or as a list of parts."""
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content if isinstance(part, dict))


if __name__ == "__main__":
    Chat(sys.argv[1]).page().launch()
