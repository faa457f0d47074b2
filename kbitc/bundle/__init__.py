"""Bundles: the folder that kbitc compiles a model to."""
