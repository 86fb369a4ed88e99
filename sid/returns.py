"""Going back: a run that diverges, or clearly leaves the teacher, goes on from its last good state: `--returns`.

Each return lowers both learning rates. It is part of the training state, and what it depends on is a function of the
steps so far, so a run that is killed and resumed at any moment, before, during or after a return, ends with the same
weights. What the run had made after that state is removed, and made again.
"""

import json
import math
from pathlib import Path

from dnnlib import UserError, write_atomically
from torch_utils import checkpoint, distributed
from torch_utils.records import sound_records
from torch_utils.updates import DivergenceError

from .distillation import Distillation
from .monitor.closeness import counted, has_lost
from .monitor.records import DISTANCES_FILE, RETURNS_FILE


class Returns:
    """The last good snapshot of a running distillation, and the way back to its state.

    A snapshot is good unless its distance from the teacher's samples is clearly above the lowest one so far. The
    start counts as a far one; a distance that isn't measured says nothing against one. Every process has the same.
    """

    def __init__(self, distillation: Distillation, run_dir: Path):
        self._distillation, self._run_dir = distillation, run_dir
        state, config = distillation.state, distillation.config
        former = state.setting.get("options", {})
        if any(former.get(rate, own) != own for rate, own in (("lr", config.lr), ("glr", config.glr))):
            state.returns = []  # --override has set other rates, which count as they are
        self._record()

    def kept_state(self) -> Path | None:
        """The state of the last good snapshot, which must stay."""
        good = self._distillation.state.good
        return None if good is None else self._path(good["nimg"])

    def judge(self) -> None:
        """Judges the snapshot that was just published; every process must call it.

        Errors: DivergenceError when the run has clearly gone away from the teacher and may go back.
        """
        config, state = self._distillation.config, self._distillation.state
        if not config.returns:
            return
        value, is_saved = distributed.from_process_0(self._look())
        lowest = math.inf if state.good is None else state.good["lowest"]
        if has_lost(value, lowest):
            if len(state.returns) < config.returns:
                kimg, best = state.nimg / 1000, f"{lowest:.3g} at best"
                raise DivergenceError(
                    f"its images were {value:.3g} from the teacher's samples at {kimg:g} kimg, after {best}"
                )
            return
        if not is_saved:  # the start, or what a run in another folder went on from
            self._save()
        state.good = {"nimg": state.nimg, "lowest": min(counted(value, state.nimg / 1000), lowest)}

    def go_back(self, error: DivergenceError) -> None:
        """Puts the last good state back, with lower rates; every process must call it.

        Errors: `error`, if the run may not go back again or that state can't be read.
        """
        distillation, state = self._distillation, self._distillation.state
        config, path = distillation.config, self.kept_state()
        if path is None or len(state.returns) >= config.returns:
            raise error
        kept = {"returns": state.returns, "good": state.good, "elapsed_sec": state.elapsed_sec}
        from_kimg = state.nimg / 1000
        try:
            with distributed.shared_errors():
                state.load(path)
        except UserError:
            raise error from None
        for name, value in kept.items():
            setattr(state, name, value)
        distillation.collector.load_state_dict(state.statistics, distillation.device)
        line = {"kimg": state.nimg / 1000, "from_kimg": from_kimg, "why": error.reason}
        state.returns = [*state.returns, line]
        line |= state.rates(config)
        self._save()
        if distributed.rank() == 0:
            checkpoint.remove_later(self._run_dir, state.nimg, config.batch)
        self._record()
        place = f"{line['kimg']:g} kimg" if state.nimg else "the start"
        distributed.print0(f"back to {place} with --lr={line['lr']:g} --glr={line['glr']:g}: {error.reason}")

    def _look(self) -> tuple[float, bool]:
        """The snapshot's distance, NaN if it wasn't measured, and whether its state is saved; on process 0."""
        nimg = self._distillation.state.nimg
        if distributed.rank() != 0:
            return math.nan, False
        records = sound_records(self._run_dir / DISTANCES_FILE, "kimg", "value")
        found = [record["value"] for record in records if round(1000 * record["kimg"]) == nimg]
        return found[-1] if found else math.nan, self._path(nimg).exists()

    def _save(self) -> None:
        distillation, state = self._distillation, self._distillation.state
        contents = state.contents(distillation.config, distillation.collector.state_dict())
        if distributed.rank() == 0:
            path = self._path(state.nimg)
            checkpoint.attempt(f"saving {path.name}", lambda: checkpoint.save_state(path, contents))

    def _record(self) -> None:
        """Writes the returns that the state records into the run's folder, and no others."""
        path = self._run_dir / RETURNS_FILE
        text = "".join(f"{json.dumps(line)}\n" for line in self._distillation.state.returns)

        def write() -> None:
            with write_atomically(path) as file:
                file.write(text.encode())

        if distributed.rank() == 0 and (text or path.exists()):
            checkpoint.attempt(f"writing {path.name}", write)

    def _path(self, nimg: int) -> Path:
        return checkpoint.state_path(self._run_dir, nimg, self._distillation.config.batch)
