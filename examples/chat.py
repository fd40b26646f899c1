"""A conversation with the base model and with an adapter, by the openai client, streamed.

multilora serve --lora-paths pirate=PATH
python examples/chat.py http://localhost:30000 pirate
"""

import sys

import openai


def main(url: str, adapter: str) -> None:
    """Ask both the same."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    base = client.models.list().data[0].id
    for model in (base, adapter):
        stream = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": "What is the capital of France?"}],
            temperature=0,
            stream=True,
        )
        sys.stdout.write(f"{model}: ")
        for chunk in stream:
            if chunk.choices:
                sys.stdout.write(chunk.choices[0].delta.content or "")
        sys.stdout.write("\n")


if __name__ == "__main__":
    main(*sys.argv[1:3])
