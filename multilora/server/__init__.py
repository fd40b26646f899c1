"""HTTP: SGLang's native routes and the OpenAI routes. No file here imports torch."""
