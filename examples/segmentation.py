"""
Segmentation
============

Score every pixel of a segmentation model, and find wrong pixels, wrong segments and objects of unknown classes.

The images show handwritten digits on noise. The model knows the digits 0 to 7; 8 and 9 are objects that it has never seen.
The maps are written to ``maps/*.png``.
"""

import torch
from lightning.pytorch import LightningModule, Trainer
from matplotlib import pyplot
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_gradmetrics as lgm

IGNORED, UNKNOWN = 255, 9
"""Labels of the pixels around a digit, which no metric uses, and of the digits 8 and 9; 8 is the background."""


def scenes(count: int, seed: int, digits: range) -> list[tuple[Tensor, Tensor]]:
    """Return images ``(3, 40, 56)`` with six digits each, and their label maps ``(40, 56)``."""
    pictures, names = load_digits(return_X_y=True)
    generator = torch.Generator().manual_seed(seed)
    usable = torch.tensor([place for place, name in enumerate(names) if name in digits])
    found = []
    for _ in range(count):
        image, labels = 0.4 * torch.rand(40, 56, generator=generator), torch.full((40, 56), 8)
        for cell in range(6):
            place = int(usable[torch.randint(len(usable), (1,), generator=generator)])
            digit = (
                torch.tensor(pictures[place] / 16, dtype=torch.float32)
                .view(8, 8)
                .repeat_interleave(2, 0)
                .repeat_interleave(2, 1)
            )
            area = slice(20 * (cell // 3) + 2, 20 * (cell // 3) + 18), slice(18 * (cell % 3) + 2, 18 * (cell % 3) + 18)
            image[area] = torch.maximum(image[area], digit)
            labels[area][digit > 0.4] = int(names[place]) if names[place] < 8 else UNKNOWN
            labels[area][(digit > 0.2) & (digit <= 0.4)] = IGNORED
        found.append((image.expand(3, -1, -1), labels))
    return found


class Segmenter(LightningModule):
    """A small network with the usual steps; it knows nothing of this package."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers: list[nn.Module] = [nn.Conv2d(3, 24, 3, stride=2, padding=1), nn.ReLU()]
        for dilation in (1, 2, 4):
            layers += [nn.Conv2d(24, 24, 3, padding=dilation, dilation=dilation), nn.BatchNorm2d(24), nn.ReLU()]
        self.body, self.head = nn.Sequential(*layers), nn.Conv2d(24, 9, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``(N, 9, H, W)``, resized to the images."""
        logits = self.head(self.body(images))
        return nn.functional.interpolate(logits, images.shape[2:], mode="bilinear", align_corners=False)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the cross-entropy."""
        images, labels = batch
        return nn.functional.cross_entropy(self(images), labels, ignore_index=IGNORED)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Run the model; the callback scores what it returns."""
        self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam."""
        return torch.optim.Adam(self.parameters(), 0.01)


def main() -> None:
    """Train, score, and print what the scores find."""
    settings = lgm.Pixels(
        ignore_index=IGNORED,
        ood_labels=[UNKNOWN],
        class_names=[*(str(digit) for digit in range(8)), "background"],
        segments=10,
        every=1,
        maps=2,
    )
    callback = lgm.GradientMetrics(
        ["max_softmax", "pseudo_label", "gradnorm"], pixels=settings, datasets={"scenes": "id"}, print_summary=False
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
    print(callback.results.select(["index", "pixels", "error", "miou", "max_softmax"]).slice(0, 3).to_pandas())
    for row in callback.pixel_metrics.to_pylist():
        if row["metric"] == "auroc":
            interval = f"{100 * row['low']:.1f} to {100 * row['high']:.1f}"
            print(
                f"{row['unit']:7} {row['task']:17} within {row['within']:15} {row['score']:12} {100 * row['value']:5.1f} ({interval})"
            )
    paths = callback.write_maps("maps")
    print(*paths, sep="\n")
    axes = pyplot.figure(figsize=(12, 2), layout="constrained").subplots()
    axes.imshow(pyplot.imread(next(path for path in paths if path.suffix == ".png")))
    axes.axis("off")


if __name__ == "__main__":
    main()
