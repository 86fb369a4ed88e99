"""The published files that have a short name here: their addresses, hashes, results and licences.

None of them is part of this project. They are downloaded when first used, under their owners' licences.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from training.steps import INIT_SIGMA

NVIDIA = "https://nvlabs-fi-cdn.nvidia.com"
EDM = f"{NVIDIA}/edm"
EDM2 = f"{NVIDIA}/edm2"
SID = "https://huggingface.co/UT-Austin-PML/SiD/resolve/main"
SIDA = "https://huggingface.co/UT-Austin-PML/SiDA/resolve/main/EDM_distillation"

NVIDIA_LICENCE = "CC BY-NC-SA 4.0"
DISTILLED_LICENCE = "from CC BY-NC-SA 4.0 weights"
IMAGENET_LICENCE = "ImageNet terms of access"
NETWORK_KINDS = ("teacher", "sid-generator", "sida-generator")
EDM2_NFE = 63  # 32 steps of Heun's sampler


# The names that the published SiD code gives the teachers (its --edm_model).
SID_NAMES = {
    "cifar10-uncond": "edm-cifar10-32x32-uncond-vp",
    "cifar10-cond": "edm-cifar10-32x32-cond-vp",
    "imagenet64-cond": "edm-imagenet-64x64-cond-adm",
    "ffhq64": "edm-ffhq-64x64-uncond-vp",
    "afhq64-v2": "edm-afhqv2-64x64-uncond-vp",
}


@dataclass(frozen=True, kw_only=True)
class Published:
    """One published file. `fid` (50 000 images) and `nfe` (network evaluations per image) are its owners' numbers."""

    name: str
    url: str
    kind: str  # one of NETWORK_KINDS, 'reference' (mu and sigma for FID), 'images' or 'detector'
    licence: str
    description: str
    sha256: str | None = None
    bytes: int | None = None
    fid: float | None = None
    nfe: int | None = None
    init_sigma: float | None = None  # of one-step generators


def find(name: str) -> Published | None:
    """The file of a short name, SiD's own names of the teachers included; None if no file has that name."""
    return FILES.get(SID_NAMES.get(name, name))


def names_of_kinds(kinds: Iterable[str]) -> list[str]:
    """All short names of the files of these kinds, SiD's own names of the teachers included."""
    return [name for name in (*FILES, *SID_NAMES) if FILES[SID_NAMES.get(name, name)].kind in kinds]


def reference_of(network: Published) -> str | None:
    """The short name of the reference statistics for the data set of a teacher; None for other networks."""
    if network.kind != "teacher":
        return None
    return next((file.name for file in FILES.values() if file.kind == "reference" and file.name in network.name), None)


def _teacher(name: str, url: str, description: str, **results: Any) -> Published:
    return Published(name=name, url=url, kind="teacher", licence=NVIDIA_LICENCE, description=description, **results)


def _edm_teacher(name: str, fid: float | None, nfe: int | None, description: str, **file: Any) -> Published:
    url = f"{EDM}/pretrained/{name}.pkl"
    return _teacher(name, url, f"EDM teacher, {description}", fid=fid, nfe=nfe, **file)


def _edm2_teacher(name: str, snapshot: str, fid: float | None, description: str = "") -> Published:
    """snapshot: kimg of the training and relative width of the average (`edm.train --ema-std`), as in file names."""
    data = "latents of ImageNet at 512x512" if "img512" in name else "ImageNet at 64x64"
    url = f"{EDM2}/posthoc-reconstructions/{'-'.join(name.split('-')[:3])}-{snapshot}.pkl"
    description = f"EDM2 teacher, {data} with classes, EMA {snapshot.partition('-')[2]}{description}"
    return _teacher(name, url, description, fid=fid, nfe=EDM2_NFE)


def _generator(name: str, url: str, fid: float | None, description: str, **kwargs: Any) -> Published:
    method = name.partition("-")[0]
    return Published(
        name=name,
        url=url,
        kind=f"{method}-generator",
        licence=DISTILLED_LICENCE,
        description=f"{'SiDA' if method == 'sida' else 'SiD'} one-step generator, {description}",
        fid=fid,
        nfe=1,
        init_sigma=INIT_SIGMA,
        **kwargs,
    )


def _reference(name: str, description: str, url: str | None = None) -> Published:
    return Published(
        name=name,
        url=url or f"{EDM}/fid-refs/{name}.npz",
        kind="reference",
        licence=NVIDIA_LICENCE,
        description=f"Inception statistics of {description}",
    )


_FILES = [
    _edm_teacher(
        "edm-cifar10-32x32-uncond-vp",
        1.97,
        35,
        "CIFAR-10, DDPM++",
        sha256="4d5dcc1f1d0d41c8934ad21626eeddbdc0460182becf9fc059a0631b1eedb4da",
    ),
    _edm_teacher("edm-cifar10-32x32-cond-vp", 1.79, 35, "CIFAR-10 with classes, DDPM++"),
    _edm_teacher("edm-cifar10-32x32-uncond-ve", None, None, "CIFAR-10, NCSN++"),
    _edm_teacher("edm-imagenet-64x64-cond-adm", 1.36, 511, "ImageNet with classes, ADM"),
    _edm_teacher("edm-ffhq-64x64-uncond-vp", 2.39, 79, "FFHQ, DDPM++"),
    _edm_teacher("edm-afhqv2-64x64-uncond-vp", 1.96, 79, "AFHQ-v2, DDPM++"),
    _edm2_teacher("edm2-img512-xs", "2147483-0.135", 3.53),
    _edm2_teacher("edm2-img512-s", "2147483-0.130", 2.56),
    _edm2_teacher("edm2-img512-m", "2147483-0.100", 2.25),
    _edm2_teacher("edm2-img512-l", "1879048-0.085", 2.06),
    _edm2_teacher("edm2-img512-xl", "1342177-0.085", 1.96),
    _edm2_teacher("edm2-img512-xxl", "0939524-0.070", 1.91),
    _edm2_teacher("edm2-img64-s", "1073741-0.075", 1.58),
    _edm2_teacher("edm2-img64-m", "2147483-0.060", 1.43),
    _edm2_teacher("edm2-img64-l", "1073741-0.040", 1.33),
    _edm2_teacher("edm2-img64-xl", "0671088-0.040", 1.33),
    _edm2_teacher("edm2-img512-s-autoguided", "2147483-0.070", None, ", FID 1.34 with a weaker guide at 2.1"),
    _edm2_teacher("edm2-img512-xs-guide", "0134217-0.125", None, ", the guide of edm2-img512-s-autoguided"),
    _edm2_teacher("edm2-img64-s-autoguided", "1073741-0.045", None, ", FID 1.01 with a weaker guide at 1.7"),
    _edm2_teacher("edm2-img64-xs-guide", "0134217-0.110", None, ", the guide of edm2-img64-s-autoguided"),
    _generator(
        "sid-cifar10-uncond",
        f"{SID}/cifar10-uncond/alpha1.2/network-snapshot-1.200000-403968.pkl",
        1.923,
        "CIFAR-10, alpha 1.2",
        sha256="13cb3be19dd92c67f423db24839919c92b23179d8bce9c9a7badd508f99ff15b",
        bytes=223_165_173,
    ),
    _generator(
        "sid-cifar10-cond",
        f"{SID}/cifar10-cond/alpha1.2/network-snapshot-1.200000-713312.pkl",
        1.710,
        "CIFAR-10 with classes, alpha 1.2",
        sha256="75668815b0426f51cfb81657b502f528ee9e2de4a91f3c68bc60fa7303a1f1d7",
        bytes=223_171_880,
    ),
    _generator(
        "sid-imagenet64-cond",
        f"{SID}/imagenet64/alpha1.2/network-snapshot-1.200000-939176.pkl",
        1.524,
        "ImageNet with classes, alpha 1.2",
    ),
    _generator("sid-ffhq64", f"{SID}/ffhq64/alpha1.2/network-snapshot-1.200000-498176.pkl", 1.550, "FFHQ, alpha 1.2"),
    _generator("sid-afhq64-v2", f"{SID}/afhq64/alpha1/network-snapshot-1.000000-371712.pkl", 1.628, "AFHQ-v2, alpha 1"),
    _generator(
        "sid-cifar10-uncond-alpha1",
        f"{SID}/cifar10-uncond/alpha1/network-snapshot-1.000000-416768.pkl",
        None,
        "CIFAR-10, alpha 1",
        sha256="9415754179d74f9bae81eaabb18fa7db75443f408bd88a34e1972dc0fac39ae5",
    ),
    _generator(
        "sid-imagenet64-cond-alpha1",
        f"{SID}/imagenet64/alpha1/network-snapshot-1.000000-492836.pkl",
        None,
        "ImageNet with classes, alpha 1",
        sha256="75055ac5669e2884cf325440d26499cfb4d9f0f8b9e408aeb2f956b56c8ca446",
    ),
    _generator(
        "sid-ffhq64-alpha1",
        f"{SID}/ffhq64/alpha1/network-snapshot-1.000000-453120.pkl",
        None,
        "FFHQ, alpha 1",
        sha256="9a3dba47976e0496d74dc1eb0ad5b45b64499827a1ac418f73697d76e160b4a1",
    ),
    _generator("sida-cifar10-uncond", f"{SIDA}/cifar10_uncond_sid2a_alpha1-028160.pkl", 1.499, "CIFAR-10"),
    _generator("sida-cifar10-cond", f"{SIDA}/cifar10_cond_sid2a_alpha1.2-053760.pkl", 1.396, "CIFAR-10 with classes"),
    _generator("sida-imagenet64-cond", f"{SIDA}/imgnet64_sid2a_alpha1.2-021471.pkl", 1.110, "ImageNet with classes"),
    _generator("sida-ffhq64", f"{SIDA}/ffhq64_sid2a_alpha1-168960.pkl", 1.040, "FFHQ"),
    _generator("sida-afhq64-v2", f"{SIDA}/afhq64-v2_sid2a_alpha1-175104.pkl", 1.276, "AFHQ-v2"),
    _reference("cifar10-32x32", "CIFAR-10"),
    _reference("imagenet-64x64", "ImageNet at 64x64"),
    _reference("ffhq-64x64", "FFHQ at 64x64"),
    _reference("afhqv2-64x64", "AFHQ-v2 at 64x64"),
    _reference("img512", "ImageNet at 512x512, as EDM2 counts FID", f"{EDM2}/dataset-refs/img512.pkl"),
    _reference("img64", "ImageNet at 64x64, as EDM2 counts FID", f"{EDM2}/dataset-refs/img64.pkl"),
    Published(
        name="imagenet-64x64-images",
        url="https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/64/"
        "VIRTUAL_imagenet64_labeled.npz",
        kind="images",
        licence=IMAGENET_LICENCE,
        description="ImageNet images for precision and recall, uint8 NHWC in `arr_0`",
    ),
    Published(
        name="inception-2015-12-05",
        url=f"{NVIDIA}/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt",
        kind="detector",
        licence="Apache-2.0 (TensorFlow's Inception-v3, converted by NVIDIA)",
        description="Inception-v3 for FID, IS, KID, precision and recall",
        sha256="f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4",
        bytes=95_607_719,
    ),
]
FILES: dict[str, Published] = {file.name: file for file in _FILES}
