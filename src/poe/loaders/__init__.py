"""Load bases and stages from files, save them, and publish them."""
