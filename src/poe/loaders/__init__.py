"""Everything that turns files into a cascade and back."""
