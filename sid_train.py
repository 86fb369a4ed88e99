"""Distils a diffusion model into a one-step generator: torchrun sid_train.py --duration=500"""

import dataclasses

import click

from dnnlib import FiniteRange, IntList, LongCommand, WholeRange
from sid import recipes
from sid.config import ADAM_STATES, OBJECTIVES, WEIGHTINGS, DistillationConfig

D = DistillationConfig  # its class attributes are the defaults
POSITIVE = FiniteRange(0, min_open=True)


@click.command(cls=LongCommand, context_settings={"show_default": True})
@click.option("--recipe", help="Settings by name; those given beside it win", type=click.Choice(list(recipes.RECIPES)),
              callback=recipes.use, is_eager=True, expose_value=False)  # fmt: skip
# Where things are.
@click.option("--edm_model", help="Teacher: short name, path or URL", default="edm-cifar10-32x32-uncond-vp")
@click.option("--outdir", help="Where to make the run folder", default="training-runs")
@click.option("--data", help="Real images, only for the picture, metrics and --gan")
@click.option("--data_stat", help="Reference statistics (.npz) for FID  [default: the published teacher's]")
@click.option("--detector", help="Detector for metrics  [default: the one of --data_stat]")
@click.option("--metrics", help="fid50k_full,is50k,kid50k_full,pr50k3_full or none  [default: fid50k_full]")
@click.option("--metrics-batch", help="Images per step of the metrics", type=WholeRange(1), default=64)
@click.option("--transfer", help="Network whose weights the generator starts from")
@click.option("--resume", help="Training state or run folder to continue; auto: this command's own run folder, if it"
              " is there  [default: auto with --nosubdir]")  # fmt: skip
@click.option("--override", help="Let --resume change options of the method", is_flag=True)
# The method.
@click.option("--objective", help="The generator's; sid is L2 - alpha L1, *-l1 takes alpha L1 from another",
              type=click.Choice(OBJECTIVES), default=D.objective)  # fmt: skip
@click.option("--alpha", help="Weight of L1 in L2 - alpha L1", type=FiniteRange(), default=D.alpha)
@click.option("--weighting", help="Divide by omega, sigma^2 or nothing  [default: none for diff-instruct, else omega]",
              type=click.Choice(WEIGHTINGS))  # fmt: skip
@click.option("--huber", help="c of the pseudo-Huber distance, in pixels of [-1, 1]  [default: squared]", type=POSITIVE)
@click.option("--score-gradient", help="Through both score networks: on, off or from=KIMG", default=D.score_gradient)
@click.option("--sigma-schedule", default=D.sigma_schedule,
              help="Noise levels of the generator's loss: karras, lognormal[=MEAN,STD] or single=SIGMA")  # fmt: skip
@click.option("--fake-sigma-schedule", help="Those of the fake score's loss", default=D.fake_sigma_schedule)
@click.option("--tmax", help="Highest time of the noise levels by karras, of 1000", default=D.tmax,
              type=FiniteRange(0, 1000))  # fmt: skip
@click.option("--fake-score-updates", help="Updates of the fake score for each of the generator",
              type=WholeRange(1), default=D.fake_score_updates)  # fmt: skip
@click.option("--guidance", help="Of a class-conditional teacher: long=K, short=K or long-short=K  [default: none]")
@click.option("--gan", help="SiDA: an adversarial loss from the images of --data", is_flag=True)
@click.option("--gan-freeze", help="With --gan, the generator stays as it is for so many kimg", type=FiniteRange(0),
              default=D.gan_freeze_kimg)  # fmt: skip
@click.option("--gan-start", help="With --gan, the generator's adversarial loss begins after so many kimg",
              type=FiniteRange(0), default=D.gan_start_kimg)  # fmt: skip
@click.option("--lsd", help="Scale of the discriminator's loss", type=POSITIVE, default=D.lsd)
@click.option("--lsg_gan", help="Scale of the generator's adversarial loss", type=POSITIVE, default=D.lsg_gan)
@click.option("--init_sigma", help="Noise level at which the generator starts", type=POSITIVE, default=D.init_sigma)
@click.option("--lr", help="Learning rate of the fake score network", type=POSITIVE, default=D.lr)
@click.option("--glr", help="Learning rate of the generator", type=POSITIVE, default=D.glr)
@click.option("--g_beta1", help="Adam's beta1 for the generator", type=FiniteRange(0, 1, max_open=True),
              default=D.g_beta1)  # fmt: skip
@click.option("--lr-rampup", help="Warm-up of both learning rates in kimg", type=FiniteRange(0), default=0.0)
@click.option("--lr-decay", help="Of both learning rates", type=click.Choice(["none", "linear", "cosine"]),
              default=D.lr_decay)  # fmt: skip
@click.option("--ls", help="Scale of the fake score's loss", type=POSITIVE, default=D.ls)
@click.option("--lsg", help="Scale of the generator's loss", type=POSITIVE, default=D.lsg)
@click.option("--ema", help="Half-life of the generator's average in Mimg", type=FiniteRange(0), default=0.5)
@click.option("--ema-rampup", help="The half-life is at most this share of the images since the generator learns",
              type=FiniteRange(0), default=D.ema_rampup_ratio)  # fmt: skip
@click.option("--spike-guard", help="Skip updates with a gradient norm so many times the usual, such as 10"
              "  [default: off]", type=FiniteRange(1, min_open=True))  # fmt: skip
@click.option("--augment", help="Augmentation probability, 0 = off  [default: 0.12, or 0 for a teacher without]",
              type=FiniteRange(0, 1))  # fmt: skip
@click.option("--dropout", help="[default: the teacher's]", type=FiniteRange(0, 1, max_open=True))
@click.option("--fp16", help="Half precision on a GPU  [default: the teacher's]", type=bool)
# Speed and memory: docs/performance.md.
@click.option("--precision", help="Of the networks' layers  [default: fp32, or fp16 with --fp16 on a GPU]",
              type=click.Choice(["fp32", "tf32", "bf16", "fp16"]))  # fmt: skip
@click.option("--compile", help="Compile the networks: a slow start, faster steps", type=bool, default=D.compile)
@click.option("--channels-last", help="Memory layout of the images", type=bool, default=D.channels_last)
@click.option("--chunk", help="Images per pass through teacher and fake score in the generator's phase  [default: all]",
              type=WholeRange(1))  # fmt: skip
@click.option("--checkpoint", help="Recompute activations instead of keeping them", type=bool, default=D.checkpoint)
@click.option("--share-images", help="One batch of generated images for both phases", type=bool,
              default=D.share_images)  # fmt: skip
@click.option("--share-noise", help="The same noisy images, too: the fake score is asked once", type=bool,
              default=D.share_noise)  # fmt: skip
@click.option("--adam-state", help="Adam's second moments; bf16 is rounded at random", type=click.Choice(ADAM_STATES),
              default=D.adam_state)  # fmt: skip
@click.option("--lora-rank", help="Learn updates of this rank, with one copy of the weights in memory  [default: all]",
              type=WholeRange(1))  # fmt: skip
# The teacher's architecture: checked against its own record.
@click.option("--cond", help="Class-conditional", type=bool)
@click.option("--arch", type=click.Choice(["ddpmpp", "ncsnpp", "adm"]))
@click.option("--precond", type=click.Choice(["vp", "ve", "edm"]))
@click.option("--cbase", help="Channels at full resolution", type=WholeRange(1))
@click.option("--cres", help="Channel multiplier per resolution", type=IntList())
# The run.
@click.option("--duration", help="Length in Mimg", type=POSITIVE, default=500.0)
@click.option("--batch", help="Images per update", type=WholeRange(1), default=D.batch)
@click.option("--batch-gpu", help="Images per process and round  [default: the most that fits]", type=WholeRange(1))
@click.option("--tick", help="Report every so many kimg", type=POSITIVE, default=D.kimg_per_tick)
@click.option("--snap", help="Snapshot, picture and metrics every so many ticks", type=WholeRange(1),
              default=D.snapshot_ticks)  # fmt: skip
@click.option("--dump", help="Training state every so many ticks", type=WholeRange(1), default=D.state_ticks)
@click.option("--save-every", help="Training state every so many minutes, 0 = by --dump only", type=FiniteRange(0),
              default=D.save_minutes)  # fmt: skip
@click.option("--keep", help="How many training states to keep, 0 = all", type=WholeRange(0), default=D.keep_states)
@click.option("--timeout", help="End the run when its processes make no progress for so many minutes", default=30.0,
              type=FiniteRange(0, 1e5, min_open=True))  # fmt: skip
@click.option("--seed", type=WholeRange(0), default=D.seed)
@click.option("--device", type=click.Choice(["cuda", "mps", "cpu"]), help="[default: the first there]")
@click.option("--bench", help="cuDNN benchmarking", type=bool, default=True)
@click.option("--xflip", help="Mirror half of --data", type=bool, default=False)
@click.option("--cache", help="Keep the images of --gan in memory", type=bool, default=True)
@click.option(
    "--workers", help="Accepted for EDM's command lines; --gan reads its images itself", type=WholeRange(0), default=1
)
@click.option("--desc", help="Description in the run folder's name")
@click.option("--nosubdir", help="Use --outdir itself as the run folder", is_flag=True)
@click.option("-n", "--dry-run", help="Print the options and the memory they take, and stop", is_flag=True)
def main(**options):
    """Distil a pretrained EDM diffusion model into a generator that needs one evaluation, without any data.

    The defaults are the published CIFAR-10 recipe; --recipe takes others. Several processes: torchrun.
    """
    config = build_config(options)
    from sid.run import distil  # torch loads here, not for --help

    distil(options, config)


def build_config(options: dict) -> DistillationConfig:
    """Moves the numbers of the method out of `options` into a DistillationConfig."""
    same = {field.name for field in dataclasses.fields(DistillationConfig)} & options.keys()
    return DistillationConfig(
        total_kimg=options.pop("duration") * 1000,
        lr_rampup_kimg=options.pop("lr_rampup"),
        ema_halflife_kimg=options.pop("ema") * 1000,
        ema_rampup_ratio=options.pop("ema_rampup"),
        use_fp16=options.pop("fp16"),
        gan_freeze_kimg=options.pop("gan_freeze"),
        gan_start_kimg=options.pop("gan_start"),
        kimg_per_tick=options.pop("tick"),
        snapshot_ticks=options.pop("snap"),
        state_ticks=options.pop("dump"),
        save_minutes=options.pop("save_every"),
        keep_states=options.pop("keep"),
        **{name: options.pop(name) for name in same},
    )


if __name__ == "__main__":
    main()
