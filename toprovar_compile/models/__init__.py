"""Visual autoregressive models that come with the project."""

from toprovar_compile.models.loading import find_class, load, load_folder, load_official, names

__all__ = ["find_class", "load", "load_folder", "load_official", "names"]
