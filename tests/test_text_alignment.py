"""CLIP scores, ranks and the table by prompt, against the transformers library and by hand-made embeddings."""

import csv
import json
import math
import shutil

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from tiny import CPU, tiny_teacher

import fid
from dnnlib import UserError
from edm import zoo
from edm.metrics import ground_colour, text_alignment
from edm.metrics.caption_template import CaptionTemplate
from edm.metrics.clip import ClipEncoder
from edm.metrics.evaluate import Evaluator
from edm.metrics.records import describe
from edm.metrics.sources import TensorSource
from edm.metrics.text_alignment import align, distinct

transformers = pytest.importorskip("transformers")
pytest.importorskip("diffusers")
import tiny_pipelines  # noqa: E402

CAPTIONS = CaptionTemplate(
    "{name} before {ground} wall",
    ["a pear", "a banana"],
    {
        "a red": (200, 40, 40),
        "a blue": (50, 90, 200),
        "an orange": (240, 150, 40),
        "a white": (245,) * 3,
        "no": (0,) * 3,
    },
)
TEXTS = ["a red apple", "dogs", "a cat in a hat", "a red apple", "a cat in a hat on a mat by a wall"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_pipelines.save_clip(tmp_path_factory.mktemp("made") / "clip")


@pytest.fixture(scope="module")
def encoder(folder):
    return ClipEncoder(folder)


def pictures(n, channels=3, size=32):
    return torch.randint(256, [n, channels, size, size], generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


# --- the library's CLIP


def test_scores_are_the_librarys_logits(folder, encoder):
    """logits_per_image / logit_scale of the library's own forward pass, on pixels resized by PIL."""
    images = pictures(5)
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    resized = [Image.fromarray(x.permute(1, 2, 0).numpy()).resize((24, 24), Image.Resampling.BICUBIC) for x in images]
    pixels = torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2) / 255
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).reshape(3, 1, 1)  # CLIP's own, which the file leaves out
    pixels = (pixels - mean) / torch.tensor([0.2, 0.3, 0.4]).reshape(3, 1, 1)
    tokens = tiny_pipelines.clip_tokenizer()(TEXTS, padding="max_length", truncation=True, return_tensors="pt")
    with torch.no_grad():
        cosines = model(**tokens, pixel_values=pixels).logits_per_image / model.logit_scale.exp()
    prompts, numbers = distinct(TEXTS)
    found = align(encoder.embed_images(images), encoder.embed_texts(prompts), prompts, numbers)
    assert torch.allclose(found.scores, 100 * cosines.diagonal().double().clamp(min=0), atol=1e-3)
    assert (cosines.diagonal() > 0.01).any()
    different = cosines[:, [0, 1, 2, 4]]
    assert found.matches.tolist() == different.argmax(1).tolist()
    assert found.ranks.tolist() == (1 + (different > cosines.diagonal()[:, None]).sum(1)).tolist()


def test_gray_images_and_batches(encoder):
    gray = pictures(20, channels=1)
    found = encoder.embed_images(gray)
    assert torch.equal(found, encoder.embed_images(gray.expand(-1, 3, -1, -1)))
    assert torch.allclose(found[17:], encoder.embed_images(gray[17:]), atol=1e-5)


def test_long_prompts_are_cut_off_with_a_word(encoder, capsys):
    long = "a very long story of a cat"
    found = encoder.embed_texts(["a cat", long, long + " and a hat"])
    assert torch.allclose(found[1], found[2], atol=1e-6)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("2 of 3 prompts are longer than the 16 tokens that --clip takes and are cut off")
    encoder.embed_texts(["a cat"])
    assert not capsys.readouterr().err


def test_a_configuration_chooses_no_code(folder, encoder, tmp_path):
    """The library would download and run a kernel of that name."""
    shutil.copytree(folder, tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    for values in (config, config["vision_config"]):
        values["attn_implementation"] = "owner/kernel"
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config))
    assert torch.equal(ClipEncoder(tmp_path / "copy").embed_texts(TEXTS), encoder.embed_texts(TEXTS))


# --- scores, ranks and the table, by hand


class HandMade:
    """Embeds texts as VECTORS says, and an image as the vector whose number its first pixel is."""

    name, sha256, device, embedding_dim = "hand-made", "0" * 64, CPU, 2
    vectors = {"east": (1, 0), "north": (0, 2), "north-east": (3, 3), "west": (-1, 0)}  # noqa: RUF012

    def embed_images(self, images):
        return torch.tensor(list(self.vectors.values())).float()[images[:, 0, 0, 0].long()]

    def embed_texts(self, texts):
        return torch.tensor([self.vectors[text] for text in texts]).float()


class Captioned(TensorSource):
    def __init__(self, images, texts):
        super().__init__([torch.tensor(images, dtype=torch.uint8).reshape(-1, 1, 1, 1).expand(-1, 3, 8, 8)])
        self.texts = texts

    def prompts(self, num):
        return self.texts, list(range(num))


def measured(images, texts, *metrics):
    evaluator = Evaluator(metrics, encoder=HandMade(), batch=3)
    return evaluator(Captioned(images, texts)), text_alignment.alignments_of(evaluator.metrics)


def test_values_by_hand():
    """Images east, west, north-east and east of the prompts east, east, north and north-east, among three prompts."""
    texts = ["east", "east", "north", "north-east"]
    (record, first), (found,) = measured([0, 3, 2, 0], texts, "clip4", "clip2")
    half = math.sqrt(0.5)
    scores = [100, 0, 100 * half, 100 * half]  # the cosine of west and east, -1, counts as 0
    mean = sum(scores) / 4
    assert found.scores.tolist() == pytest.approx(scores, abs=1e-4)
    # The second's cosines are -1, 0 and -0.7. The third's are 0.7, 0.7 and 1: two share the ranks 2 and 3.
    assert found.ranks.tolist() == [1, 3, 2.5, 2]
    sums = [scores[0] + scores[1] - 2 * mean, scores[2] - mean, scores[3] - mean]  # by prompt
    values = {
        "clip": mean,
        "clip_se": math.sqrt(sum(x * x for x in sums) * 3 / 2) / 4,
        "top1": 0.25,
        "mean_rank": 2.125,
    }
    assert record["values"] == pytest.approx(values, rel=1e-5)
    assert (record["ranked_among"], record["detector"], record["num_images"]) == (3, "hand-made", 4)
    assert first["values"]["clip_se"] == pytest.approx(50)  # one prompt: of its images, 100 and 0


def test_the_standard_error_of_single_images_is_the_usual_one():
    numbers, scores = torch.arange(6), torch.tensor([3.0, 1, 4, 1, 5, 9]).double()
    found = text_alignment.Alignment([*"abcdef"], numbers, scores, torch.ones(6), numbers)
    assert found.values()["clip_se"] == pytest.approx(np.std(scores.numpy(), ddof=1) / math.sqrt(6))


def test_an_encoder_that_sees_nothing_ranks_in_the_middle():
    prompts, numbers = distinct([*"abcde"])
    found = align(torch.ones(5, 3), torch.ones(5, 3), prompts, numbers)
    assert found.values() == pytest.approx({"clip": 100, "clip_se": 0, "top1": 0, "mean_rank": 3}, abs=1e-4)


def test_the_table(tmp_path):
    """The worst first; several passes count as one; both formats hold the same."""
    texts = ["east", "west", "north", "north-east"]
    alignments = [measured(images, texts, "clip3")[1][0] for images in ([0, 2, 1], [0, 2, 2])]
    rows = text_alignment.table(alignments)
    assert [(row["prompt"], row["images"], row["rank"], row["top1"]) for row in rows] == [
        ("west", 2, 4, 0),
        ("north", 2, 1.75, 0.5),  # equal to east at the second time
        ("east", 2, 1, 1),
    ]
    assert [row["best_match"] for row in rows] == ["north-east", "north", "east"]
    assert rows[1]["clip"] == pytest.approx(50 * (1 + math.sqrt(0.5)))
    for name in ("table.csv", "table.jsonl"):
        text_alignment.write_table(rows, str(tmp_path / name))
    with open(tmp_path / "table.csv", newline="") as file:
        read = list(csv.DictReader(file))
    assert [{name: str(value) for name, value in row.items()} for row in rows] == read
    assert [json.loads(line) for line in (tmp_path / "table.jsonl").read_text().splitlines()] == rows
    shown = text_alignment.describe_table(rows).splitlines()
    assert shown[2].split()[-2:] == ["west", "north-east"]
    assert shown[-1].endswith("the same")


# --- the ground


def test_the_ground_that_a_prompt_asks_for():
    """Grounds with noise and a picture in front, right or exchanged; the library isn't asked."""
    names = list(CAPTIONS.grounds)
    images = torch.full([len(names), 3, 12, 12], 255)
    images[:, :, [0, 1, -2, -1]] = torch.tensor(list(CAPTIONS.grounds.values()))[:, :, None, None]
    images = (images + torch.randint(-20, 21, images.shape)).clamp(0, 255).to(torch.uint8)
    images[:, :, :2, 3:5] = 0  # a minority
    prompts = [f"an apple before {name} wall" for name in names]
    assert ground_colour.share_right(ground_colour.colours(images), prompts, CAPTIONS) == 1
    assert ground_colour.share_right(ground_colour.colours(images.roll(1, dims=0)), prompts, CAPTIONS) == 0

    class Grounds(TensorSource):
        def prompts(self, num):
            return prompts, [*range(num - 2), 0, 0]

    evaluator = Evaluator(["ground5", "ground3"], batch=3, captions=CAPTIONS)
    records = evaluator(Grounds([images]))
    assert [record["values"] for record in records] == [{"ground": 3 / 5}, {"ground": 1}]
    assert "detector" not in records[0]
    assert describe(records[0]) == "ground5: ground 0.6; 5 images"
    with pytest.raises(UserError, match=r"'dogs' isn't like '{name} before {ground} wall'"):
        evaluator(Captioned([0] * 8, ["dogs"] * 8))
    with pytest.raises(UserError, match=r"'dogs before a pink wall' asks for no ground that .* lists: a red, a blue"):
        evaluator(Captioned([0] * 8, ["dogs before a pink wall"] * 8))
    with pytest.raises(UserError, match=r"captions\.json lists no grounds"):
        Evaluator(["ground5"], captions=CaptionTemplate("{name}"))(Grounds([images]))
    with pytest.raises(UserError, match=r"^--metrics=ground5 .*: give --prompts=FILE, with captions\.json next to it"):
        Evaluator(["ground5"])
    with pytest.raises(UserError, match="these images have none"):
        evaluator(TensorSource([images]))


# --- the name of the picture


class NameReader:
    """Sees, in the first pixel, the number of a picture; reads the names of three pictures, and nothing else."""

    name, sha256, device, embedding_dim = "reader", "f" * 64, CPU, 3
    names = ("pear", "banana", "robot")

    def embed_images(self, images):
        return torch.eye(3)[images[:, 0, 0, 0].long()]

    def embed_texts(self, texts):
        known = torch.tensor([[float(text.startswith(f"a {name} before")) for name in self.names] for text in texts])
        return torch.where(known.any(1, keepdim=True), known, -1.0)


def test_the_name_of_a_picture_is_ranked_among_all_names():
    """Among those of the template and of the prompts; others before the same wall don't matter."""
    prompts = ["a pear before a red wall", "a banana before an orange wall", "a robot before a red wall"]
    numbers = [0, 1, 2, 0, 0]
    pixels = torch.tensor([0, 1, 2, 0, 1], dtype=torch.uint8)  # the last image is a banana, not a pear

    class Pictures(TensorSource):
        def prompts(self, num):
            return prompts, numbers[:num]

    source = Pictures([pixels[:, None, None, None].expand(5, 3, 8, 8)])
    records = Evaluator(["name5", "name4"], encoder=NameReader(), batch=2, captions=CAPTIONS)(source)
    assert records[0]["values"] == {"name": 4 / 5, "mean_rank": (4 + 2.5) / 5}  # the robot is no more a banana
    assert records[1]["values"] == {"name": 1, "mean_rank": 1}
    assert records[0]["ranked_among"] == len(CAPTIONS.names) + 1
    with pytest.raises(UserError, match=r"'dogs' isn't like '{name} before {ground} wall'"):
        Evaluator(["name2"], encoder=NameReader(), captions=CAPTIONS)(Captioned([0, 0], ["dogs"] * 2))
    with pytest.raises(UserError, match=r"captions\.json lists no names"):
        Evaluator(["name2"], encoder=NameReader(), captions=CaptionTemplate("{name}"))(source)


# --- the command


def test_one_line_for_what_users_get_wrong(folder, tmp_path, monkeypatch):
    def damaged(name, **changes):
        """A copy of the CLIP, without the files whose value is None, with other values in config.json."""
        made = tmp_path / name
        made.mkdir()
        for file in folder.iterdir():
            if changes.get(file.stem, "") is not None:
                (made / file.name).write_bytes(file.read_bytes())
        values = {key: value for key, value in changes.items() if value is not None}
        config = json.loads((folder / "config.json").read_text())
        (made / "config.json").write_text(json.dumps({**config, **values}))
        return f"--clip={made}"

    pickled = damaged("pickled", model=None)
    torch.save({}, tmp_path / "pickled" / "pytorch_model.bin")
    vision = json.loads((folder / "config.json").read_text())["vision_config"]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "empty").mkdir()
    zoo.save_network(tiny_teacher(), tmp_path / "net.safetensors")
    clip = f"--clip={folder}"
    cases = [
        ([], "--metrics=clip6 compares images with their prompts: run fid.py eval with --clip=MODEL"),
        ([clip, "--metrics=fid9"], "--clip: --metrics=fid9 has no CLIP score"),
        (["--metrics=fid9", "--table=x.csv"], "--table: --metrics=fid9 has no CLIP score"),
        ([clip, "--metrics=clip1"], "clip needs at least 2 images"),
        ([clip], "these images have none"),
        ([clip, "--table=x.txt"], "must end in .csv or .jsonl"),
        ([clip, f"--table={tmp_path}/no/x.csv"], "there is no folder"),
        ([f"--clip={tmp_path}/none"], "is no folder"),
        (["--clip=owner/name"], "can't be downloaded from the Hugging Face Hub"),
        ([f"--clip={tmp_path}/empty"], "holds no config.json"),
        ([damaged("type", model_type="bert")], "is a model of type bert, not clip"),
        ([pickled], "holds no weights in safetensors (model.safetensors)"),
        ([damaged("processor", preprocessor_config=None)], "holds no settings of an image processor"),
        ([damaged("tokenizer", tokenizer=None)], "its tokenizer has no vocabulary"),
        ([damaged("layers", vision_config={**vision, "num_hidden_layers": 3})], "its weights lack"),
        ([damaged("many", vision_config={**vision, "num_hidden_layers": 10**9})], "not 1 to 1000"),
        ([damaged("size", vision_config={**vision, "hidden_size": 32})], "can't be loaded"),
    ]
    for options, expected in cases:
        command = ["eval", f"--network={tmp_path}/net.safetensors", "--metrics=clip6", "--device=cpu", *options]
        result = CliRunner().invoke(fid.main, command)
        assert result.exit_code == 2, (options, result.output)
        (line,) = result.output.strip().splitlines()
        assert line.startswith("Error: ")
        assert expected in line


def test_images_without_prompts_and_useless_embeddings(monkeypatch):
    with pytest.raises(UserError, match="these images have none"):
        Evaluator(["clip2"], encoder=HandMade())(TensorSource([pictures(2)]))
    for wrong in (0.0, math.nan):
        with pytest.raises(UserError, match="zeros, NaN or infinity"):
            align(torch.ones(2, 3), torch.full([2, 3], wrong), ["a", "b"], torch.arange(2))
    monkeypatch.setattr(text_alignment, "MAX_PROMPTS", 3)
    with pytest.raises(UserError, match="has 4 different prompts"):
        distinct([*"abcd"])
