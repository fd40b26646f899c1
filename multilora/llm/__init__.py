"""The Python doors: `LLM` steps an engine in this process, `AsyncLLM` talks to one in a process of its own.

Both put requests and changes of adapters through the same front as the server. Import them from `multilora`.
"""
