"""Act: run calls of Python functions and MCP servers, run plans, and ask a model until it answers."""
