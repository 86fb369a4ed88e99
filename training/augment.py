"""Non-leaking augmentation for small data sets (arXiv:2006.06676, with the settings of arXiv:2206.00364, appendix F.2).

Images are flipped and warped at random, and the network is told how through augmentation labels. Asked for label zero,
it then draws images as they were before augmentation.

Snapshots embed this file's source, so it imports nothing but torch, numpy, the standard library and
torch_utils.persistence.
"""

import math

import torch
import torch.nn.functional as F

from torch_utils import persistence

# Multipliers of p in EDM's trainings; the images are mirrored half of the time whatever p is.
EDM_MULTIPLIERS = {"xflip": 1e8, "yflip": 1, "scale": 1, "rotate_frac": 1, "aniso": 1, "translate_frac": 1}

# Low-pass filter of the sym6 wavelet (Daubechies, Ten Lectures on Wavelets): warping happens at twice the resolution.
SYM6 = [
    0.015404109327027373,
    0.0034907120842174702,
    -0.11799011114819057,
    -0.048311742585633,
    0.4910559419267466,
    0.787641141030194,
    0.3379294217276218,
    -0.07263752278646252,
    -0.021060292512300564,
    0.04472490177066578,
    0.0017677118642428036,
    -0.007800708325034148,
]
FILTER_MARGIN = len(SYM6) // 4  # pixels of the image that the filter reaches beyond an edge, at twice the resolution


@persistence.persistent_class
class AugmentPipe:
    """Draws a transform for each image and applies it: `pipe(images) -> (images, labels)`.

    p: probability of a transform, times its multiplier below; a multiplier of 0 takes the transform and its labels out.
    xflip, yflip: mirror left-right, up-down (one label each).
    scale: zoom by 2^(scale_std·w), w ~ N(0, 1) (one label).
    rotate_frac: turn by up to rotate_frac_max half turns either way (two labels).
    aniso: stretch by 2^(aniso_std·w) along an axis and shrink across it; the axis is turned with probability
        aniso_rotate_prob (two labels).
    translate_frac: shift by translate_frac_std·w of the image's size in x and y (two labels).
    """

    def __init__(
        self,
        p: float = 1,
        xflip: float = 0,
        yflip: float = 0,
        scale: float = 0,
        rotate_frac: float = 0,
        aniso: float = 0,
        translate_frac: float = 0,
        scale_std: float = 0.2,
        rotate_frac_max: float = 1,
        aniso_std: float = 0.2,
        aniso_rotate_prob: float = 0.5,
        translate_frac_std: float = 0.125,
    ):
        self.p = float(p)
        self.xflip, self.yflip = float(xflip), float(yflip)
        self.scale, self.scale_std = float(scale), float(scale_std)
        self.rotate_frac, self.rotate_frac_max = float(rotate_frac), float(rotate_frac_max)
        self.aniso, self.aniso_std, self.aniso_rotate_prob = float(aniso), float(aniso_std), float(aniso_rotate_prob)
        self.translate_frac, self.translate_frac_std = float(translate_frac), float(translate_frac_std)

    @property
    def augment_dim(self) -> int:
        """Labels per image: 9 with every transform on."""
        one, two = (self.xflip, self.yflip, self.scale), (self.rotate_frac, self.aniso, self.translate_frac)
        return sum(m > 0 for m in one) + 2 * sum(m > 0 for m in two)

    def __call__(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Augments float images [N, C, H, W]; returns them with their labels [N, augment_dim], zero where untouched."""
        images, flip_labels = self._flip(images)
        inverse, warp_labels = self._draw_warp(images)
        if warp_labels:
            images = _warp(images, inverse)
        labels = flip_labels + warp_labels
        return images, torch.stack(labels, dim=1) if labels else images.new_zeros(len(images), 0)

    def _flip(self, images: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        labels = []
        for multiplier, axis in (self.xflip, 3), (self.yflip, 2):
            if multiplier > 0:
                bit = self._use(torch.randint(2, (len(images), 1, 1, 1), device=images.device), multiplier)
                images = torch.where(bit == 1, images.flip(axis), images)
                labels.append(bit.flatten().to(images.dtype))
        return images, labels

    def _draw_warp(self, images: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The map [N, 3, 3] from pixels of the result to pixels of `images`, about the centre; its labels, [N] each."""
        n, _, height, width = images.shape
        like = {"dtype": images.dtype, "device": images.device}
        inverse, labels = torch.eye(3, **like).expand(n, 3, 3), []
        if self.scale > 0:
            w = self._use(torch.randn(n, **like), self.scale)
            s = torch.exp2(self.scale_std * w)
            inverse = inverse @ _scaling(1 / s, 1 / s)
            labels += [w]
        if self.rotate_frac > 0:
            w = self._use((2 * torch.rand(n, **like) - 1) * (math.pi * self.rotate_frac_max), self.rotate_frac)
            inverse = inverse @ _rotation(w)
            labels += [w.cos() - 1, w.sin()]
        if self.aniso > 0:
            w, axis = torch.randn(n, **like), (2 * torch.rand(n, **like) - 1) * math.pi
            w = self._use(w, self.aniso)
            axis = torch.where(torch.rand(n, **like) < self.aniso_rotate_prob, axis, 0)
            s = torch.exp2(self.aniso_std * w)
            inverse = inverse @ _rotation(-axis) @ _scaling(1 / s, s) @ _rotation(axis)
            labels += [w * axis.cos(), w * axis.sin()]
        if self.translate_frac > 0:
            w_x, w_y = self._use(torch.randn(2, n, **like), self.translate_frac, (1, n))
            std = self.translate_frac_std
            inverse = inverse @ _translation(-std * width * w_x, -std * height * w_y)
            labels += [w_x, w_y]
        return inverse, labels

    def _use(self, values: torch.Tensor, multiplier: float, shape: tuple[int, ...] | None = None) -> torch.Tensor:
        """`values`, each used with its probability, else 0. shape: of the draws that decide, if several share one."""
        return torch.where(torch.rand(shape or values.shape, device=values.device) < self.p * multiplier, values, 0)


def _warp(images: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """Moves images [N, C, H, W] along `inverse` [N, 3, 3], with their mirrored continuation around them."""
    n, channels, height, width = images.shape
    one = images.new_ones(n)

    # As far as mirroring allows, whatever is drawn: asking how far is needed would make the host wait for a GPU.
    images = F.pad(images, (width - 1, width - 1, height - 1, height - 1), mode="reflect")

    # Twice the resolution: a pixel's centre moves from x to 2x, and the whole by half a pixel of the new ones.
    images = _upsample(images)
    inverse = _scaling(2 * one, 2 * one) @ inverse @ _scaling(one / 2, one / 2)
    inverse = _translation(-one / 2, -one / 2) @ inverse @ _translation(one / 2, one / 2)

    # affine_grid measures both images from -1 to 1.
    new_height, new_width = 2 * (height + 2 * FILTER_MARGIN), 2 * (width + 2 * FILTER_MARGIN)
    to_unit = _scaling(2 / images.shape[3] * one, 2 / images.shape[2] * one)
    inverse = to_unit @ inverse @ _scaling(new_width / 2 * one, new_height / 2 * one)
    grid = F.affine_grid(inverse[:, :2], [n, channels, new_height, new_width], align_corners=False)
    images = F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return _downsample(images)[:, :, FILTER_MARGIN:-FILTER_MARGIN, FILTER_MARGIN:-FILTER_MARGIN]


def _upsample(images: torch.Tensor) -> torch.Tensor:
    """[N, C, H, W] -> [N, C, 2H, 2W], by zeros in between and the low-pass filter."""
    n, channels, height, width = images.shape
    spread = images.new_zeros(n, channels, 2 * height, 2 * width)
    spread[:, :, ::2, ::2] = images
    return _filter(spread[:, :, :-1, :-1], SYM6[::-1], padding=len(SYM6) // 2, stride=1)


def _downsample(images: torch.Tensor) -> torch.Tensor:
    """[N, C, 2H, 2W] -> [N, C, H, W], by the low-pass filter and every second pixel."""
    return _filter(images, SYM6, padding=(len(SYM6) - 1) // 2, stride=2)


def _filter(images: torch.Tensor, taps: list[float], padding: int, stride: int) -> torch.Tensor:
    """Correlates each channel with `taps` along x and then along y."""
    n, channels = images.shape[:2]
    kernel = torch.tensor(taps, dtype=images.dtype).to(images.device, non_blocking=True)
    planes = images.flatten(0, 1).unsqueeze(1)  # [N·C, 1, H, W]
    planes = F.conv2d(planes, kernel.view(1, 1, 1, -1), padding=(0, padding), stride=(1, stride))
    planes = F.conv2d(planes, kernel.view(1, 1, -1, 1), padding=(padding, 0), stride=(stride, 1))
    return planes.view(n, channels, *planes.shape[2:])


def _scaling(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Scaling by x and y, [N] each, as [N, 3, 3]."""
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    return _matrices([x, zero, zero], [zero, y, zero], [zero, zero, one])


def _rotation(angle: torch.Tensor) -> torch.Tensor:
    """Rotation that takes the x axis towards the y axis, by angles [N] in radians, as [N, 3, 3]."""
    zero, one = torch.zeros_like(angle), torch.ones_like(angle)
    cos, sin = angle.cos(), angle.sin()
    return _matrices([cos, -sin, zero], [sin, cos, zero], [zero, zero, one])


def _translation(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Shift by x and y, [N] each, as [N, 3, 3]."""
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    return _matrices([one, zero, x], [zero, one, y], [zero, zero, one])


def _matrices(*rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)
