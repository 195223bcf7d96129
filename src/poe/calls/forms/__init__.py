"""How tools, calls and results are told in text: every way is defined here once, its writing beside its reading."""
