"""Routes that read prompts and answer with numbers: embeddings, in OpenAI's, vLLM's and SGLang's forms."""
