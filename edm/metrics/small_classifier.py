"""A small classifier whose last hidden layer serves as the feature space for small images."""

import torch
from torch import nn
from torch.nn import functional as F

FEATURE_DIM = 128


class SmallClassifier(nn.Module):
    """Residual convolutional classifier of square images of 8 to 64 pixels, with 128 features.

    The features are the last hidden layer before its activation: no unit can be dead, so the covariance of the
    features keeps its full rank, as the Fréchet distance wants.

    img_resolution: height and width in pixels, a multiple of 4.
    img_channels: 1 or 3.
    num_classes: number of logits.
    width: channels at full resolution; twice and four times as many at a half and a quarter of it.
    """

    def __init__(self, img_resolution: int, img_channels: int, num_classes: int, width: int = 32):
        super().__init__()
        self.img_resolution, self.img_channels, self.num_classes = img_resolution, img_channels, num_classes
        self.feature_dim = FEATURE_DIM
        self.stem = _ConvNorm(img_channels, width)
        self.down1 = _ConvNorm(width, 2 * width, stride=2)
        self.block1 = _ConvNorm(2 * width, 2 * width)
        self.down2 = _ConvNorm(2 * width, 4 * width, stride=2)
        self.block2 = _ConvNorm(4 * width, 4 * width)
        self.hidden = nn.Linear(4 * width * 4, FEATURE_DIM)
        self.output = nn.Linear(FEATURE_DIM, num_classes)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(features [N, 128], logits [N, num_classes]) of uint8 images [N, C, H, W]."""
        x = images.to(torch.float32) / 127.5 - 1
        x = self.down1(self.stem(x))  # [N, 2w, H/2, W/2]
        x = self.down2(x + self.block1(x))  # [N, 4w, H/4, W/4]
        x = x + self.block2(x)
        x = F.adaptive_avg_pool2d(x, 2)  # coarse positions stay visible: a shirt differs from its mirror image
        features = self.hidden(x.flatten(1))
        return features, self.output(F.silu(features))


class _ConvNorm(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, stride: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.norm(self.conv(x)))
