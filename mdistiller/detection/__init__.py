"""Distillation of object detectors: Faster R-CNN with a feature pyramid on torchvision."""
