"""Distils a diffusion model into a one-step generator: torchrun sid_train.py --duration=500"""

import click

from dnnlib import LongCommand
from sid.options import CHECKS, SECTIONS, options_of


@click.command(cls=LongCommand, sections=SECTIONS, checks=CHECKS, context_settings={"show_default": True})
@click.pass_context
def main(context, **_options):
    """Distil a pretrained diffusion model into a generator that needs one evaluation, without any data.

    The defaults are the published CIFAR-10 recipe; --recipe takes others. Several processes: torchrun.
    """
    config, options = options_of(context)
    from sid.run import run  # torch loads here, not for --help

    run(options, config)


if __name__ == "__main__":
    main()
