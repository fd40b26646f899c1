"""The console: one page that shows models, adapters, memory and load, and tries prompts on several adapters at once.

`page/` holds what the browser gets: no build step, nothing from elsewhere. `routes.py` serves it with what it asks
for beside the API's own routes (`state.py`). The page sends requests as any client does and has no rights of its own.
"""
