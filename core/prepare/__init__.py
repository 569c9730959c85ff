"""Inputs that Retort can make itself, so that a recipe runs where nothing has been provided: toy data, toy teachers.

A module here has `provides(recipe) -> list[str]` (addresses it can make) and `prepare(recipe, root, say)`, which makes
those that the recipe names and that are not there yet.
"""
