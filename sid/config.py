"""What a distillation run is made of. No torch here: command lines read it before anything heavy loads."""

import dataclasses

AUGMENT = 0.12  # EDM's probability for CIFAR-10


@dataclasses.dataclass
class DistillationConfig:
    """Numbers of a distillation run; the defaults are the cifar10-uncond recipe. kimg: thousands of images."""

    total_kimg: float = 500_000
    batch: int = 256  # images per update, all processes together
    batch_gpu: int | None = None  # images per process and round; None: the most that fits
    alpha: float = 1.2  # weight of L1 in L2 - alpha L1
    tmax: float = 800  # the generator's loss sees noise levels up to t = tmax / 1000
    init_sigma: float = 2.5  # noise level at which the generator starts
    lr: float = 1e-5  # fake score network
    glr: float = 1e-5  # generator
    g_beta1: float = 0.0  # Adam's first beta for the generator
    lr_rampup_kimg: float = 0
    lr_decay: str = "none"  # none, linear or cosine, over total_kimg; both learning rates
    ls: float = 1.0  # scales the fake score's loss
    lsg: float = 100.0  # scales the generator's loss
    ema_halflife_kimg: float = 500
    ema_rampup_ratio: float | None = 0.05
    dropout: float | None = None  # of generator and fake score; None: the teacher's
    use_fp16: bool | None = None  # None: the teacher's
    augment: float | None = None  # probability of augmentations for the fake score; None: AUGMENT if the teacher can
    precision: str | None = None  # of the layers: fp32, tf32, bf16, fp16; None: fp16 if use_fp16 and a GPU, else fp32
    compile: bool = False  # torch.compile
    channels_last: bool = False
    chunk: int | None = None  # images per pass through teacher and fake score in the generator's phase; None: all
    checkpoint: bool = False  # recompute activations instead of keeping them
    share_images: bool = False  # one batch of generated images for both phases
    kimg_per_tick: float = 10
    snapshot_ticks: int = 50
    state_ticks: int = 500
    seed: int = 0
