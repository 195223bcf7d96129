"""Augmentation: change rows so that a caller handles other names, formats and wordings, and learns to abstain.

Each module is one augmentation, a function of a row and a `random.Random`. `pipeline` applies them in order. The random
choices for a row depend on the seed, the epoch and the row's content; they do not depend on its position, on other rows
or on the number of workers. Rows are never modified in place.
"""

from poe.data.augment.case import change_case
from poe.data.augment.distractors import ToolPool, add_distractors
from poe.data.augment.formats import set_random_form
from poe.data.augment.irrelevance import make_contrast_pair, make_irrelevant
from poe.data.augment.masking import mask
from poe.data.augment.paraphrase import paraphrase
from poe.data.augment.pipeline import augment

__all__ = [
    "ToolPool",
    "add_distractors",
    "augment",
    "change_case",
    "make_contrast_pair",
    "make_irrelevant",
    "mask",
    "paraphrase",
    "set_random_form",
]
