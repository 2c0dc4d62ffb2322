"""mdistiller: knowledge distillation for vision."""

__version__ = "1.0.0.dev0"
