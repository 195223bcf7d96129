"""The forms of tools, calls and results in text. Each form defines its writer and its parser in one place."""
