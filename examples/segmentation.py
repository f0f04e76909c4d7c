"""
Segmentation
============

Score pixels of a segmentation model: detect wrong pixels, wrong segments and unknown objects.

The images show handwritten digits on noise. The model is trained on the digits 0 to 7; the test
images also contain 8 and 9. The score maps are written to ``maps/*.png``.
"""

import torch
from lightning.pytorch import LightningModule, Trainer
from matplotlib import pyplot
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_gradmetrics as lgm

BACKGROUND, UNKNOWN, IGNORED = 8, 9, 255
"""Labels of the noise, of the digits 8 and 9, and of the edges of digits; no metric counts the edges."""


def scenes(count: int, seed: int, digits: range) -> list[tuple[Tensor, Tensor]]:
    """Return images ``(3, 40, 56)`` with six digits each, and their label maps ``(40, 56)``."""
    digit_images, digit_labels = load_digits(return_X_y=True)
    generator = torch.Generator().manual_seed(seed)
    usable = torch.tensor([index for index, label in enumerate(digit_labels) if label in digits])
    labelled_images = []
    for _ in range(count):
        image = 0.4 * torch.rand(40, 56, generator=generator)
        labels = torch.full((40, 56), BACKGROUND)
        for cell in range(6):
            chosen = int(usable[torch.randint(len(usable), (1,), generator=generator)])
            digit = (
                torch.tensor(digit_images[chosen] / 16, dtype=torch.float32)
                .view(8, 8)
                .repeat_interleave(2, 0)
                .repeat_interleave(2, 1)
            )
            top, left = 20 * (cell // 3) + 2, 18 * (cell % 3) + 2
            area = slice(top, top + 16), slice(left, left + 16)
            image[area] = torch.maximum(image[area], digit)
            label = int(digit_labels[chosen])
            labels[area][digit > 0.4] = label if label < 8 else UNKNOWN
            labels[area][(digit > 0.2) & (digit <= 0.4)] = IGNORED
        labelled_images.append((image.expand(3, -1, -1), labels))
    return labelled_images


class Segmenter(LightningModule):
    """A small network with the usual steps; it does not use this package."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers: list[nn.Module] = [nn.Conv2d(3, 24, 3, stride=2, padding=1), nn.ReLU()]
        for dilation in (1, 2, 4):
            convolution = nn.Conv2d(24, 24, 3, padding=dilation, dilation=dilation)
            layers += [convolution, nn.BatchNorm2d(24), nn.ReLU()]
        self.body, self.head = nn.Sequential(*layers), nn.Conv2d(24, 9, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``(N, 9, H, W)`` at the resolution of the images."""
        logits = self.head(self.body(images))
        size = images.shape[2:]
        return nn.functional.interpolate(logits, size, mode="bilinear", align_corners=False)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the cross-entropy of the labelled pixels."""
        images, labels = batch
        return nn.functional.cross_entropy(self(images), labels, ignore_index=IGNORED)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Run the model; the callback scores its output."""
        self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam."""
        return torch.optim.Adam(self.parameters(), 0.01)


def main() -> None:
    """Train and score the model; print how well the scores detect wrong pixels and segments."""
    settings = lgm.Pixels(
        ignore_index=IGNORED,
        ood_labels=[UNKNOWN],
        class_names=[*(str(digit) for digit in range(8)), "background"],
        segments=10,
        every=1,
        maps=2,
    )
    callback = lgm.GradientMetrics(
        ["max_softmax", "pseudo_label", "gradnorm"],
        pixels=settings,
        datasets={"scenes": "id"},
        print_summary=False,
    )
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
    }
    trainer = Trainer(max_epochs=12, accelerator="cpu", callbacks=[callback], **quiet)
    model = Segmenter()
    trainer.fit(model, DataLoader(scenes(160, 0, range(8)), batch_size=8, shuffle=True))
    trainer.test(model, DataLoader(scenes(40, 1, range(10)), batch_size=8), verbose=False)
    columns = ["index", "pixels", "error", "miou", "max_softmax"]
    print(callback.results.select(columns).slice(0, 3).to_pandas())
    for row in callback.pixel_metrics.to_pylist():
        if row["metric"] == "auroc":
            question = f"{row['unit']:7} {row['task']:17} within {row['within']:15}"
            interval = f"{100 * row['low']:.1f} to {100 * row['high']:.1f}"
            print(f"{question} {row['score']:12} {100 * row['value']:5.1f} ({interval})")
    paths = callback.write_maps("maps")
    print(*paths, sep="\n")
    axes = pyplot.figure(figsize=(12, 2), layout="constrained").subplots()
    axes.imshow(pyplot.imread(next(path for path in paths if path.suffix == ".png")))
    axes.axis("off")


if __name__ == "__main__":
    main()
