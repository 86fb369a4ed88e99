"""Trains a small text-to-image pipeline by the diffusers and transformers libraries, to be distilled afterwards.

    apt install fonts-noto-color-emoji
    pip install '.[text]'
    python examples/text_teacher.py --out=TEACHER

TEACHER is a StableDiffusionPipeline as the library saves it: tokenizer, CLIP text encoder, VAE, U-Net with
cross-attention, scheduler. It draws food and animals of the emoji font on coloured grounds: "a red apple on a blue
ground, left". Captions of one in ten pairs of picture and colour are held out (held-out.txt); prompts.txt has the
others, and pictures.zip all their pictures, for FID. Pictures and captions come from this project, the rest from the
libraries.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from edm.metrics.caption_template import CAPTIONS_FILE
from edm.small_teachers.captions import DEMO_PICTURES, CaptionedEmoji, template
from edm.small_teachers.pictures import write_data
from torch_utils.muon import Muon

BATCH, VAE_BATCH, WARMUP = 32, 16, 100
DROPPED = 0.1  # share of captions that are replaced by the empty one
LENGTH = 20  # tokens of a prompt
KL_WEIGHT = 1e-3
LATENT_CHANNELS = 4
VAE_RATE, RATE, MOMENTUM = 0.05, 0.04, 0.95


def make_tokenizer(captions: list[str], folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer with a vocabulary of its own, in which every word of the captions is one token."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern=Regex(r"[a-z]+|[^a-z\s]"), behavior="removed", invert=True)
    tokenizer.train_from_iterator(
        captions,
        trainers.BpeTrainer(
            vocab_size=4000,
            special_tokens=["<|startoftext|>", "<|endoftext|>"],
            end_of_word_suffix="</w>",
            show_progress=False,
        ),
    )
    content = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in content["merges"]]
    own = CLIPTokenizer(vocab=content["vocab"], merges=merges, model_max_length=LENGTH)
    own.save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


def train_vae(source: CaptionedEmoji, kimg: float) -> AutoencoderKL:
    """A VAE that makes 16x16 latents of 32x32 pictures."""
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=(24, 48),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=source.resolution,
    )

    def loss() -> torch.Tensor:
        x, _ = source.draw(VAE_BATCH)
        raw = vae.encode(x).latent_dist
        error = vae.decode(raw.sample()).sample - x
        return error.abs().mean() + error.square().mean() + KL_WEIGHT * raw.kl().mean() / x[0].numel()

    train("VAE", loss, vae, round(kimg * 1000 / VAE_BATCH), VAE_RATE)
    vae.eval().requires_grad_(False)
    with torch.no_grad():
        latents = torch.cat([vae.encode(source.draw(VAE_BATCH)[0]).latent_dist.mean for _ in range(8)])
    vae.register_to_config(scaling_factor=1 / latents.std().item())
    return vae


def forget_paths(folder: Path) -> None:
    """Takes the paths on this machine out of the configurations that the libraries save."""
    for file in folder.rglob("*.json"):
        values = json.loads(file.read_text(encoding="utf-8"))
        if not {"_name_or_path", "name_or_path"}.isdisjoint(values):
            kept = {name: value for name, value in values.items() if not name.endswith("name_or_path")}
            file.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")


def train(name: str, loss, net: torch.nn.Module, steps: int, rate=RATE, average=None, save=lambda: None) -> None:
    """Takes so many steps along the gradients of `loss`. average: of the weights, which are those that `save` saves."""
    parameters = list(net.parameters())
    optimizer = Muon.of(net, rate, momentum=MOMENTUM)
    rates = get_cosine_schedule_with_warmup(optimizer, WARMUP, steps)
    start, total = time.time(), 0.0
    for step in range(1, steps + 1):
        value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
        if average is not None:
            average.step(parameters)
        total += value.item()
        if step % 100 == 0 or step == steps:
            count = (step - 1) % 100 + 1
            print(f"{name}: step {step} of {steps}, loss {total / count:.4f}, {time.time() - start:.0f} s", flush=True)
            total = 0.0
        if average is not None and (step % 500 == 0 or step == steps):
            average.store(parameters)
            average.copy_to(parameters)
            save()
            average.restore(parameters)


def begin(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, Path, CaptionedEmoji]:
    """(options, the folder --out, the pictures): with the options --out, --pictures and --seed, and seeded."""
    parser.add_argument("--out", required=True, help="folder for what is made")
    parser.add_argument("--pictures", choices=["demo", "all"], default="all", help="forty pictures, or all 144")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    return arguments, out, CaptionedEmoji(arguments.seed, DEMO_PICTURES if arguments.pictures == "demo" else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae-kimg", type=float, default=40, help="thousands of pictures to train the VAE on")
    parser.add_argument("--kimg", type=float, default=120, help="thousands of pictures to train the U-Net on")
    parser.add_argument("--width", type=int, default=32, help="channels of the U-Net's first level")
    parser.add_argument("--prediction", choices=["epsilon", "v_prediction"], default="v_prediction")
    parser.add_argument("--half", action="store_true", help="save it in half precision in the end")
    arguments, out, source = begin(parser)

    (out / "prompts.txt").write_text("\n".join(source.captions(held_out=False)) + "\n", encoding="utf-8")
    (out / "held-out.txt").write_text("\n".join(source.captions(held_out=True)) + "\n", encoding="utf-8")
    (out / CAPTIONS_FILE).write_text(json.dumps(template(source.names).record(), indent=1) + "\n", encoding="utf-8")
    print(f"{len(source.names)} pictures, {len(source.captions(held_out=False))} captions", flush=True)
    write_data(source.all(), out / "pictures.zip")
    tokenizer = make_tokenizer(source.captions(held_out=False), out / "tokenizer")
    if (out / "vae" / "config.json").exists():
        vae = AutoencoderKL.from_pretrained(out / "vae").eval().requires_grad_(False)
    else:
        vae = train_vae(source, arguments.vae_kimg)
        vae.save_pretrained(out / "vae")

    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=256,
            projection_dim=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=source.resolution // 2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(arguments.width, 2 * arguments.width, 3 * arguments.width),
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    scheduler = DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        prediction_type=arguments.prediction,
        clip_sample=False,
    )
    trained = torch.nn.ModuleList([unet, text_encoder])
    print(f"{sum(p.numel() for p in trained.parameters()) / 1e6:.2f} million parameters", flush=True)
    average = EMAModel(trained.parameters(), decay=0.9995, use_ema_warmup=True, power=3 / 4)
    scale = vae.config.scaling_factor

    def loss() -> torch.Tensor:
        pictures, captions = source.draw(BATCH)
        captions = ["" if kept < DROPPED else text for text, kept in zip(captions, torch.rand(BATCH))]
        tokens = tokenizer(captions, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt")
        with torch.no_grad():
            latents = vae.encode(pictures).latent_dist.sample() * scale
        noise, t = torch.randn_like(latents), torch.randint(0, scheduler.config.num_train_timesteps, [BATCH])
        x_t = scheduler.add_noise(latents, noise, t)
        v = scheduler.get_velocity(latents, noise, t)
        answer = unet(x_t, t, encoder_hidden_states=text_encoder(tokens.input_ids)[0]).sample
        return (answer - (v if arguments.prediction == "v_prediction" else noise)).square().mean()

    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    steps = round(arguments.kimg * 1000 / BATCH)
    train("U-Net", loss, trained, steps, average=average, save=lambda: pipeline.save_pretrained(out))
    if arguments.half:
        StableDiffusionPipeline.from_pretrained(out).to(torch.float16).save_pretrained(out)
    forget_paths(out)


if __name__ == "__main__":
    main()
