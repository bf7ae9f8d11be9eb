"""Training on Lightning: recipes, configuration, the module, callbacks, the run."""

from .config import TrainConfig
from .recipes import RECIPES, Recipe, make_recipe
from .run import train

__all__ = ["RECIPES", "Recipe", "TrainConfig", "make_recipe", "train"]
