"""What performs the effects of the front: asyncio beside an engine process, or the steps of an engine in this one."""
