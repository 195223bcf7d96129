"""Recipes of stages and bases; folding a chain of stages; compressing a head."""

from poe.stages.augmentation import Augmentation
from poe.stages.recipe import BaseRecipe, Recipe, list_recipes, load_base_recipe, load_recipe

__all__ = ["Augmentation", "BaseRecipe", "Recipe", "list_recipes", "load_base_recipe", "load_recipe"]
