"""torch's two settings of TF32 are read and restored."""

from __future__ import annotations

import pytest
import torch

from lightning_gradmetrics.gradients.precision import allows_tf32, full_float32

pytestmark = pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="this torch has one setting")


@pytest.fixture(autouse=True)
def _restored():
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    torch.backends.fp32_precision = "none"
    for setting in (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn):
        setting.fp32_precision = "none"
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def test_the_older_setting_is_read_and_restored():
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = True, False
    assert (allows_tf32(convolutions=False), allows_tf32(convolutions=True)) == (True, False)
    with full_float32(torch.device("cuda")):
        assert not allows_tf32(convolutions=False)
    assert torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize("precision", ["tf32", "ieee"])
def test_the_newer_setting_is_read_and_restored(precision):
    """Torch raises an error if the older setting is read after the newer one was changed."""
    settings = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn)
    for setting in settings:
        setting.fp32_precision = precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    torch.backends.cudnn.rnn.fp32_precision = "ieee"
    assert allows_tf32(convolutions=False)
    assert allows_tf32(convolutions=True) == (precision == "tf32")
    before = [setting.fp32_precision for setting in settings]
    with full_float32(torch.device("cuda")):
        assert [setting.fp32_precision for setting in settings] == ["ieee"] * 3
    assert [setting.fp32_precision for setting in settings] == before
