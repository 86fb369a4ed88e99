"""TensorBoard and Weights & Biases, which show runs (`torch_utils.tracking`). Each is imported where it is used."""

import dataclasses
import importlib
import json
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import PIL.Image

from dnnlib import UserError, write_atomically
from dnnlib.errors import printable

MAX_PIXELS = 2048  # width and height of a picture; larger ones are shrunk
WANDB_FILE = "wandb.json"  # in a run folder: the run's id at W&B, and up to which image W&B has it
PROJECT = "sid"  # at W&B, unless WANDB_PROJECT names another
FINISH_SEC = 60  # how long the end of a run may wait for W&B


@dataclasses.dataclass
class Moment:
    """What a run recorded after `nimg` images: figures by curve, picture files by name, and the Unix time if known."""

    nimg: int
    curves: dict[str, float] = dataclasses.field(default_factory=dict)
    pictures: dict[str, Path] = dataclasses.field(default_factory=dict)
    timestamp: float | None = None

    def opened(self) -> Iterator[tuple[str, PIL.Image.Image]]:
        """(name, picture) of those that can be read."""
        for name, path in self.pictures.items():
            try:
                with PIL.Image.open(path) as file:
                    image = file.convert("RGB")
            except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError):
                continue
            image.thumbnail((MAX_PIXELS, MAX_PIXELS))
            yield name, image


class Tracker(Protocol):
    """Shows a run somewhere. Its methods may raise any error.

    Made as Tracker(run_dir, nimg, options): nimg, the images of the state that the run goes on from; options, as the
    run recorded them.
    """

    first_nimg: int  # it has what was recorded before

    def show(self, moment: Moment) -> None:
        """Called in the order of the run."""
        ...

    def close(self, failed: bool) -> None: ...


class TensorBoard:
    """Writes event files into the run's folder. A step is an image."""

    def __init__(self, run_dir: Path, nimg: int, options: dict[str, Any]):
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        folder = run_dir / "tensorboard"
        self.first_nimg = nimg if any(folder.glob("events.out.tfevents.*")) else 0
        # The run repeats what came after the state, so that is purged.
        self._writer: Any = SummaryWriter(str(folder), purge_step=self.first_nimg)
        text = json.dumps(options, indent=2, ensure_ascii=False)
        self._writer.add_text("options", "".join(f"    {line}\n" for line in text.split("\n")), self.first_nimg)
        plain = {name: value for name, value in options.items() if isinstance(value, bool | int | float | str)}
        for summary in hparams(plain, {}):
            self._writer.file_writer.add_summary(summary)
        self._writer.flush()
        print(f"TensorBoard: tensorboard --logdir={folder}", flush=True)

    def show(self, moment: Moment) -> None:
        for name, value in moment.curves.items():
            self._writer.add_scalar(name, value, moment.nimg, moment.timestamp)
        for name, image in moment.opened():
            self._writer.add_image(name, np.asarray(image), moment.nimg, moment.timestamp, dataformats="HWC")
        self._writer.flush()

    def close(self, failed: bool) -> None:
        self._writer.close()


class WeightsAndBiases:
    """Sends the run to W&B, or stores it for `wandb sync` with WANDB_MODE=offline. A step is an image.

    W&B gets figures, pictures and options from the run's folder and adds the host's name; it gets no code, no output
    and no measurements of the machine. It can't forget what it has, so a resumed run sends only what comes after that.
    """

    def __init__(self, run_dir: Path, nimg: int, options: dict[str, Any]):
        import wandb  # pyright: ignore[reportMissingImports]  an optional package

        self._file = run_dir / WANDB_FILE
        known = {"id": secrets.token_hex(4), "nimg": -1}
        if nimg and self._file.exists():  # a run that begins again is another one there
            known = json.loads(self._file.read_text())
        self._id, self.first_nimg = str(known["id"]), int(known["nimg"]) + 1
        settings = wandb.Settings(
            silent=True,
            console="off",
            disable_code=True,
            disable_git=True,
            x_disable_meta=True,
            x_disable_machine_info=True,
            x_disable_stats=True,
            x_save_requirements=False,
            finish_timeout=FINISH_SEC,
        )
        self._run = wandb.init(
            id=self._id,
            resume="allow",
            name=run_dir.resolve().name,
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            dir=str(run_dir),
            config=options,
            allow_val_change=True,
            settings=settings,
        )
        self._run.define_metric("kimg")
        self._run.define_metric("*", step_metric="kimg")
        self._remember(self.first_nimg - 1)
        print(f"W&B: {f'wandb sync {run_dir}/wandb/*' if self._run.offline else self._run.url}", flush=True)
        if nimg and self.first_nimg > nimg + 1:
            known_kimg = (self.first_nimg - 1) / 1e3
            print(f"W&B already has this run up to {known_kimg:g} kimg; its curves go on from there", flush=True)

    def show(self, moment: Moment) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        pictures = {name: wandb.Image(image) for name, image in moment.opened()}
        values = {"kimg": moment.nimg / 1e3, **moment.curves, **pictures}
        self._run.log(values, step=moment.nimg, commit=True)
        self._remember(moment.nimg)

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))

    def _remember(self, nimg: int) -> None:
        with write_atomically(self._file) as file:
            file.write(json.dumps({"id": self._id, "nimg": nimg}).encode())


TRACKERS: dict[str, Callable[[Path, int, dict[str, Any]], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
}
# A module of each and a name in it. A folder such as ./wandb can be imported, too, but lacks the name.
NEEDED = {"tensorboard": ("torch.utils.tensorboard", "SummaryWriter"), "wandb": ("wandb", "init")}


def check_trackers(names: str | None) -> list[str]:
    """The trackers that --log names, ready for use; none by default.

    Errors: UserError when one is unknown, isn't installed or has no login.
    """
    found = list(dict.fromkeys(name.strip() for name in (names or "").split(",") if name.strip()))
    for name in found:
        if name not in TRACKERS:
            raise UserError(f"--log={names}: there is no {name}; give {' or '.join(TRACKERS)}, or both with a comma")
        module, attribute = NEEDED[name]
        remedy = f"pip install '.[{name}]', or leave {name} out"
        try:
            getattr(importlib.import_module(module), attribute)
            has_login = name != "wandb" or _has_login()
        except (ImportError, AttributeError) as error:
            raise UserError(f"--log={names}: {name} isn't installed ({printable(str(error))}); {remedy}") from None
        except Exception as error:  # of any kind, such as of another release
            raise UserError(f"--log={names}: {name} can't be used ({printable(str(error))}); {remedy}") from None
        if not has_login:
            raise UserError(f"--log={names}: not logged in at W&B; set WANDB_API_KEY, or WANDB_MODE=offline")
    return found


def _has_login() -> bool:
    """Whether W&B has the login it needs. Never asks for one, and needs no network."""
    import wandb  # pyright: ignore[reportMissingImports]

    settings = wandb.setup(wandb.Settings(silent=True)).settings
    return settings.mode != "online" or wandb.login(prompt=False, verify=False)
