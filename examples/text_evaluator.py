"""Trains a small CLIP on captioned emoji, which says how well pictures match their captions.

    apt install fonts-noto-color-emoji
    pip install '.[text]'
    python examples/text_evaluator.py --out=CLIP
    python fid.py eval --network=TEACHER --prompts=TEACHER/held-out.txt --clip=CLIP --metrics=clip1k

CLIP is a folder as the transformers library saves it: a CLIPModel in half precision, its tokenizer and the settings of
its image processor. It learns from the captions that examples/text_teacher.py trains on, by the library's own
contrastive loss. The pairs of picture and colour that are held out there are held out here, too, and measured at the
end.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
import transformers
from text_teacher import LENGTH, begin, make_tokenizer, train
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel

from edm.metrics.clip import ClipEncoder
from edm.metrics.text_alignment import align
from edm.small_teachers.captions import GROUNDS, PLACES, CaptionedEmoji, is_held_out

BATCH = 128
WIDTH, HEADS, PATCH = 96, 4, 8
MOST_NOISE, MOST_BLUR = 0.2, 0.7  # of the pictures that it learns from, since generated ones are less clean


def damaged(pictures: torch.Tensor) -> torch.Tensor:
    """Pictures [N, C, H, W], each with as much blur and noise as is drawn for it."""
    amounts = torch.rand(2, len(pictures), 1, 1, 1) ** 2
    blurred = F.avg_pool2d(F.pad(pictures, [1] * 4, mode="replicate"), 3, stride=1)
    return pictures.lerp(blurred, MOST_BLUR * amounts[0]) + MOST_NOISE * amounts[1] * torch.randn_like(pictures)


def measure(source: CaptionedEmoji, folder: Path) -> dict[str, float]:
    """CLIP score and ranks of one picture for each caption that was held out, among all captions."""
    prompts = [*source.captions(held_out=True), *source.captions(held_out=False)]
    pictures = [
        source.picture(index, ground, place)
        for index, name in enumerate(source.names)
        for ground in GROUNDS
        if is_held_out(name, ground)
        for place in PLACES
    ]
    images, encoder = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2), ClipEncoder(folder)
    numbers = torch.arange(len(pictures))
    return align(encoder.embed_images(images), encoder.embed_texts(prompts), prompts, numbers).values()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kimg", type=float, default=90, help="thousands of pictures to train it on")
    arguments, out, source = begin(parser)

    tokenizer = make_tokenizer(source.captions(held_out=False), out)
    common = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_attention_heads": HEADS}
    text = {
        "vocab_size": len(tokenizer),
        "num_hidden_layers": 2,
        "max_position_embeddings": LENGTH,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {"num_hidden_layers": 3, "image_size": source.resolution, "patch_size": PATCH}
    model = CLIPModel(CLIPConfig(text_config={**common, **text}, vision_config={**common, **vision}, projection_dim=64))
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} million parameters", flush=True)

    def loss() -> torch.Tensor:
        pictures, captions = source.draw(BATCH)
        _, first = np.unique(captions, return_index=True)  # a caption's second picture would count as a wrong one
        tokens = tokenizer([captions[i] for i in first], padding=True, return_tensors="pt")
        return model(**tokens, pixel_values=damaged(pictures[torch.from_numpy(first)]), return_loss=True).loss

    train("CLIP", loss, model, round(arguments.kimg * 1000 / BATCH))
    model.half().save_pretrained(out)
    size = {"height": source.resolution, "width": source.resolution}
    settings = {"size": size, "crop_size": size, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    name = "CLIPImageProcessorPil" if hasattr(transformers, "CLIPImageProcessorPil") else "CLIPImageProcessor"
    getattr(transformers, name)(**settings).save_pretrained(out)  # the former needs no torchvision
    print("held out:", ", ".join(f"{name} {value:.4g}" for name, value in measure(source, out).items()), flush=True)


if __name__ == "__main__":
    main()
