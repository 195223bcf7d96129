"""Rows -> `Conversation` -> text through the chat template -> packed token batches with a loss mask."""
