"""Read rows from sources, augment them, render them with the chat template, and pack them into batches."""
