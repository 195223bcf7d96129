"""Recipes: one YAML per specialist, one dataclass that is at once the file, the Python API and the command line."""

from poe.stages.augmentation import Augmentation
from poe.stages.recipe import BaseRecipe, Recipe, list_recipes, load_base_recipe, load_recipe

__all__ = ["Augmentation", "BaseRecipe", "Recipe", "list_recipes", "load_base_recipe", "load_recipe"]
