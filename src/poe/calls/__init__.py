"""What a call is: conversations, tool schemas, call forms, prompt forms, parsing, and checking."""
