"""Augmentation: rows that make a caller robust to names, formats and wordings, faithful to schemas, able to abstain.

Each module is one augmentation, a function of a row and of a `random.Random`; `pipeline` puts them in order. The
randomness of a row depends on the seed, the epoch and what the row says, never on its place, its neighbors or the
number of workers. Rows are never changed in place.
"""

from poe.data.augment.case import change_case
from poe.data.augment.contrast import make_pair
from poe.data.augment.distractors import ToolPool, add_distractors
from poe.data.augment.formats import with_random_form
from poe.data.augment.irrelevance import make_irrelevant
from poe.data.augment.masking import mask
from poe.data.augment.paraphrase import paraphrase
from poe.data.augment.pipeline import augment

__all__ = [
    "ToolPool",
    "add_distractors",
    "augment",
    "change_case",
    "make_irrelevant",
    "make_pair",
    "mask",
    "paraphrase",
    "with_random_form",
]
