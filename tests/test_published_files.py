"""The list of published files against what their owners state: papers, model cards, addresses."""

import re

import pytest

from edm.published import FILES, NETWORK_KINDS, SID_NAMES, reference_of

# Kimg of the training and EMA length, which the addresses hold; FID at 63 evaluations (EDM2, arXiv:2312.02696).
EDM2 = {
    "edm2-img512-xs": ("2147483-0.135", 3.53),
    "edm2-img512-s": ("2147483-0.130", 2.56),
    "edm2-img512-m": ("2147483-0.100", 2.25),
    "edm2-img512-l": ("1879048-0.085", 2.06),
    "edm2-img512-xl": ("1342177-0.085", 1.96),
    "edm2-img512-xxl": ("0939524-0.070", 1.91),
    "edm2-img64-s": ("1073741-0.075", 1.58),
    "edm2-img64-m": ("2147483-0.060", 1.43),
    "edm2-img64-l": ("1073741-0.040", 1.33),
    "edm2-img64-xl": ("0671088-0.040", 1.33),
}
# FID and network evaluations per image. Teachers: EDM (arXiv:2206.00364), table 2, and for ImageNet the best of its
# stochastic sampler; generators: SiD (arXiv:2404.04057) and SiDA (arXiv:2410.14919), one evaluation.
RESULTS = {
    "edm-cifar10-32x32-uncond-vp": (1.97, 35),
    "edm-cifar10-32x32-cond-vp": (1.79, 35),
    "edm-imagenet-64x64-cond-adm": (1.36, 511),
    "edm-ffhq-64x64-uncond-vp": (2.39, 79),
    "edm-afhqv2-64x64-uncond-vp": (1.96, 79),
    "sid-cifar10-uncond": (1.923, 1),
    "sid-cifar10-cond": (1.710, 1),
    "sid-imagenet64-cond": (1.524, 1),
    "sid-ffhq64": (1.550, 1),
    "sid-afhq64-v2": (1.628, 1),
    "sida-cifar10-uncond": (1.499, 1),
    "sida-cifar10-cond": (1.396, 1),
    "sida-imagenet64-cond": (1.110, 1),
    "sida-ffhq64": (1.040, 1),
    "sida-afhq64-v2": (1.276, 1),
}
# Alpha and million images of the generators in SiD's table; the names of their files hold both.
TRAININGS = {
    "sid-cifar10-uncond": (1.2, 404),
    "sid-cifar10-cond": (1.2, 713),
    "sid-imagenet64-cond": (1.2, 939),
    "sid-ffhq64": (1.2, 498),
    "sid-afhq64-v2": (1.0, 372),
}
# Of the files as their hosts serve them, as far as known; that of the teacher from one source only.
HASHES = {
    "edm-cifar10-32x32-uncond-vp": "4d5dcc1f1d0d41c8934ad21626eeddbdc0460182becf9fc059a0631b1eedb4da",
    "sid-cifar10-uncond": "13cb3be19dd92c67f423db24839919c92b23179d8bce9c9a7badd508f99ff15b",
    "sid-cifar10-cond": "75668815b0426f51cfb81657b502f528ee9e2de4a91f3c68bc60fa7303a1f1d7",
    "sid-cifar10-uncond-alpha1": "9415754179d74f9bae81eaabb18fa7db75443f408bd88a34e1972dc0fac39ae5",
    "sid-imagenet64-cond-alpha1": "75055ac5669e2884cf325440d26499cfb4d9f0f8b9e408aeb2f956b56c8ca446",
    "sid-ffhq64-alpha1": "9a3dba47976e0496d74dc1eb0ad5b45b64499827a1ac418f73697d76e160b4a1",
    "inception-2015-12-05": "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4",
}
BYTES = {
    "sid-cifar10-uncond": 223_165_173,
    "sid-cifar10-cond": 223_171_880,
    "inception-2015-12-05": 95_607_719,
}


def test_results():
    found = {name: (file.fid, file.nfe) for name, file in FILES.items() if file.fid is not None}
    assert found == {**RESULTS, **{name: (fid, 63) for name, (_, fid) in EDM2.items()}}


def test_hashes_and_sizes():
    assert {name: file.sha256 for name, file in FILES.items() if file.sha256 is not None} == HASHES
    assert {name: file.bytes for name, file in FILES.items() if file.bytes is not None} == BYTES


@pytest.mark.parametrize("name", TRAININGS)
def test_a_generators_address_names_its_training(name):
    alpha, kimg = re.search(r"network-snapshot-([\d.]+)-(\d+)\.pkl$", FILES[name].url).groups()
    assert (float(alpha), round(int(kimg) / 1000)) == TRAININGS[name]
    assert f"alpha {float(alpha):g}" in FILES[name].description


def test_a_teachers_address_ends_with_its_name():
    """EDM's own names, which users of its code type."""
    teachers = [file for file in FILES.values() if file.kind == "teacher" and not file.name.startswith("edm2-")]
    assert all(file.url.endswith(f"/edm/pretrained/{file.name}.pkl") for file in teachers)
    references = [file for file in FILES.values() if file.kind == "reference" and "img" not in file.name]
    assert all(file.url.endswith(f"/edm/fid-refs/{file.name}.npz") for file in references)


@pytest.mark.parametrize("name", EDM2)
def test_edm2s_addresses_end_with_the_names_of_its_files(name):
    assert FILES[name].url.endswith(f"/edm2/posthoc-reconstructions/{name}-{EDM2[name][0]}.pkl")
    reference = FILES[reference_of(FILES[name]) or ""]
    assert reference.name == name.split("-")[1]
    assert reference.url.endswith(f"/edm2/dataset-refs/{reference.name}.pkl")


@pytest.mark.parametrize("name", FILES)
def test_name_address_and_kind_agree_on_the_data_set(name):
    """Each data set has words of its own in all names; the conditional CIFAR-10 networks say so, too."""
    words = {"cifar10": "cifar", "imagenet": "imagenet|imgnet", "ffhq": "ffhq", "afhq": "afhq"}
    own = {word for word in words if word in name}
    assert own == {word for word, pattern in words.items() if re.search(pattern, FILES[name].url)}
    if "cifar10" in name and FILES[name].kind in NETWORK_KINDS:
        assert ("uncond" in name) == ("uncond" in FILES[name].url)


def test_sids_names_of_the_teachers_are_those_of_its_generators():
    assert {f"sid-{name}" for name in SID_NAMES} == {name for name in FILES if name in TRAININGS}
    for name, teacher in SID_NAMES.items():
        short = name.split("-")[0].rstrip("0123456789") if "cifar" not in name else "cifar10"
        assert short in teacher
        assert FILES[teacher].kind == "teacher"
        assert ("uncond" in name) <= ("uncond" in teacher)
