"""Results of segmentation models: images, predicted segments, metrics of pixels, and maps."""

from lightning_gradmetrics.pictures.pixels.settings import Pixels

__all__ = ["Pixels"]
