"""Binarized and multiplication-free backbones, as they are trained."""
