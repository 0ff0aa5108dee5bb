"""From a trained model to something that runs elsewhere. Takes any nn.Module; knows no training framework."""

from .export import export_program

__all__ = ['export_program']
