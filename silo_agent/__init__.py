"""A hospital: the agent, its ingest and its trainer, in rooms that each have a licence to import."""
