"""Kernels: from a layer's input and the gradient of its output to moments of each sample's weight gradient."""

from lightning_gradmetrics.engine.kernels.convolution import conv_gradient, conv_moments
from lightning_gradmetrics.engine.kernels.geometry import ConvGeometry
from lightning_gradmetrics.engine.kernels.group_norm import (
    covers_channels_last,
    native_group_norm,
    native_group_norm_gradients,
)
from lightning_gradmetrics.engine.kernels.layers import norm_weight_rows
from lightning_gradmetrics.engine.kernels.library import describe_kernels
from lightning_gradmetrics.engine.kernels.linear import embedding_moments, linear_gradient, linear_moments, touched_rows
from lightning_gradmetrics.engine.kernels.reduction import position_sums, row_moments
from lightning_gradmetrics.engine.kernels.residuals import class_residuals
from lightning_gradmetrics.engine.kernels.sums import native_layer_norm, native_norm
from lightning_gradmetrics.engine.kernels.totals import PositionTotals

__all__ = [
    "ConvGeometry",
    "PositionTotals",
    "class_residuals",
    "conv_gradient",
    "conv_moments",
    "covers_channels_last",
    "describe_kernels",
    "embedding_moments",
    "linear_gradient",
    "linear_moments",
    "native_group_norm",
    "native_group_norm_gradients",
    "native_layer_norm",
    "native_norm",
    "norm_weight_rows",
    "position_sums",
    "row_moments",
    "touched_rows",
]
