"""Conversations, tool schemas, call forms and prompt forms: the format of calls, their parsing and checking."""
