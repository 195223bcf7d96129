"""The programs `poe` and `poe-train`: parse the command line, call the package, print the result."""
