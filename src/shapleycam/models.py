"""Classifiers by name: the public name of :mod:`shapleycam.model.zoo`."""

from .model.zoo import DEFAULT_MODEL, Classifier, imagenet_classes, load_classifier

__all__ = ["DEFAULT_MODEL", "Classifier", "imagenet_classes", "load_classifier"]
