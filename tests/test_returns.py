"""--returns: a run that diverges or leaves the teacher goes back to its last good state, with lower rates, exactly."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import slow_ones
from tiny import NoReport, equal, on_two_processes, save, tiny_config, tiny_distillation, tiny_teacher, weights

import sid
from edm import zoo
from sid import doctor, recipes
from sid.distillation import Distillation
from sid.monitor.records import read_options, read_returns, returns_text
from sid.options import parse
from sid.returns import Returns
from sid.run import train
from sid.teacher_distance import Distance, TeacherDistance
from torch_utils import checkpoint
from torch_utils.interruption import EXIT_CODE
from torch_utils.updates import DivergenceError

# Snapshots at 8, 16, 24 and 32 images. At the third the run goes wrong, until it has lower rates.
SETTINGS = {"augment": 0, "batch_gpu": 8, "total_kimg": 0.032, "snapshot_ticks": 1, "keep_states": 1, "returns": 2}
GOOD_AT, BAD_AT, END = 16, 24, 32


class Killed(BaseException):
    pass


def run(folder, **changes):
    """The hash of the generator of a short run in `folder`."""
    teacher = tiny_teacher(label_dim=0, augment_dim=0)
    return zoo.network_hash(sid.distil(teacher, tiny_config(**{**SETTINGS, **changes}), folder, device="cpu").net)


def leaves_the_teacher(self):
    """Stands in for `Returns._look`: the third snapshot is far away as long as the rates are high."""
    state = self._distillation.state
    lost = state.nimg == BAD_AT and not state.returns
    return 0.5 if lost else 0.1, self._path(state.nimg).exists()


def diverges(self):
    """Stands in for `Distillation.check`: it fails before the third snapshot, as long as the rates are high."""
    if self.state.nimg == BAD_AT and not self.state.returns:
        raise DivergenceError("its gradients aren't finite")


@pytest.fixture(autouse=True)
def few_samples(monkeypatch):
    monkeypatch.setattr("sid.teacher_samples.NUM_IMAGES", 16)
    monkeypatch.setattr("sid.teacher_samples.STEPS", 2)


@pytest.fixture(params=slow_ones(["lost", "diverged"], "diverged"))
def sick(request, monkeypatch):
    """Lets runs go wrong."""
    if request.param == "lost":
        monkeypatch.setattr(Returns, "_look", leaves_the_teacher)
    else:
        monkeypatch.setattr(Distillation, "check", diverges)


def trained(folder, **changes):
    """The weights after a short training in `folder` from its newest state, without pictures and pages."""
    folder.mkdir(exist_ok=True)
    state, options = checkpoint.newest_good_state(folder), {**SETTINGS, **changes}
    distillation = tiny_distillation(tiny_teacher(label_dim=0, augment_dim=0), state, **options)
    train(distillation, folder, NoReport())
    return weights(distillation)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def contents(folder):
    """What a run leaves that doesn't depend on the clock: names of files, and figures."""
    ticks = [
        {n: v for n, v in line.items() if n.startswith(("Health", "Loss"))} for line in lines(folder / "stats.jsonl")
    ]
    return sorted(path.name for path in folder.iterdir()), ticks, lines(folder / "returns.jsonl")


def test_the_rates_are_lower_from_there_on(tmp_path, monkeypatch, capsys, sick):
    rates, iteration = [], Distillation.iteration

    def observed(self):
        iteration(self)
        optimizer = self.state.generator_updater.optimizer
        rates.append((self.state.nimg, optimizer.param_groups[0]["lr"]))

    monkeypatch.setattr(Distillation, "iteration", observed)
    run(tmp_path)
    assert rates == [(8, 2e-3), (16, 2e-3), (24, 2e-3), (24, 1e-3), (32, 1e-3)]
    place = "back to 0.016 kimg with --lr=0.0005 --glr=0.001: "
    [told] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("back to")]
    [line] = lines(tmp_path / "returns.jsonl")
    assert told == place + line["why"]
    assert (line["kimg"], line["from_kimg"], line["lr"], line["glr"]) == (0.016, 0.024, 5e-4, 1e-3)
    kimg = [line["Progress/kimg"] for line in lines(tmp_path / "stats.jsonl")]
    assert kimg == [0.008, 0.016, 0.024, 0.032]  # none twice
    first, last = (zoo.load_network(checkpoint.snapshot_path(tmp_path, nimg, 8)) for nimg in (8, END))
    assert "returns" not in first.metadata
    assert last.metadata["returns"] == [line]


def test_killed_at_every_moment_of_the_return(tmp_path, monkeypatch, sick):
    """Before each change of a file until the run trains again: the resumed run ends with the same bits."""
    changes, kill_at, is_returning = 0, 0, False
    back, snapshot = Returns.go_back, NoReport.snapshot

    def go_back(self, error):
        nonlocal is_returning, changes
        is_returning, changes = True, 0
        back(self, error)

    def at_snapshot(self, *arguments):
        nonlocal is_returning
        is_returning = False  # from here on it is an ordinary run
        return snapshot(self, *arguments)

    def killing(action):
        def changed(*arguments, **options):
            nonlocal is_returning, changes
            changes += is_returning
            if is_returning and changes == kill_at:
                is_returning = False
                raise Killed
            return action(*arguments, **options)

        return changed

    monkeypatch.setattr(Returns, "go_back", go_back)
    monkeypatch.setattr(NoReport, "snapshot", at_snapshot)
    for place, name in ((os, "replace"), (Path, "unlink"), (os, "fsync")):
        monkeypatch.setattr(place, name, killing(getattr(place, name)))
    whole, there = tmp_path / "whole", tmp_path / "there"
    expected = trained(whole)
    count, kill_at = changes, 1
    assert count > 5
    with pytest.raises(Killed):
        trained(there)
    for place in range(2, count + 1):
        folder, kill_at = shutil.copytree(there, tmp_path / str(place)), place
        with pytest.raises(Killed):
            trained(folder)
        kill_at = 0
        assert equal(trained(folder), expected), place
        assert contents(folder) == contents(whole), place


def test_stopped_before_and_after_the_return(tmp_path, monkeypatch, sick):
    done, stop_at, average = 0, 0, Distillation.average

    def interrupted(self):
        nonlocal done
        average(self)
        done += 1
        if done == stop_at:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Distillation, "average", interrupted)
    whole = tmp_path / "whole"
    expected = trained(whole)
    for updates in (2, 3, 4):  # the third is the one that goes wrong, the fourth the first after the return
        done, stop_at, folder = 0, updates, tmp_path / str(updates)
        with pytest.raises(SystemExit) as stop:
            trained(folder)
        assert stop.value.code == EXIT_CODE
        assert equal(trained(folder), expected)
        assert contents(folder) == contents(whole)


def sickly_trained(folder):
    Returns._look = leaves_the_teacher
    return trained(Path(folder), batch_gpu=4)


def test_two_processes_go_back_together(tmp_path):
    first, second = on_two_processes(sickly_trained, tmp_path, str(tmp_path))
    assert equal(first, second)
    assert [line["kimg"] for line in lines(tmp_path / "returns.jsonl")] == [GOOD_AT / 1000]


def test_it_gives_up_when_lower_rates_do_not_help(tmp_path, monkeypatch, capsys):
    def always(self):
        if self.state.nimg == 8:
            raise DivergenceError("its gradients aren't finite")

    monkeypatch.setattr(Distillation, "check", always)
    with pytest.raises(DivergenceError, match="its gradients aren't finite; go on from a state before"):
        trained(tmp_path)
    assert [(line["kimg"], line["lr"]) for line in lines(tmp_path / "returns.jsonl")] == [(0, 5e-4), (0, 2.5e-4)]
    assert capsys.readouterr().out.count("back to the start with --lr=0.0005 --glr=0.001: its gradients") == 1


def test_the_measured_distance_decides(tmp_path, monkeypatch):
    values = iter([0.1, 0.05, 0.2, 0.04, 0.03, 0.03])
    monkeypatch.setattr(TeacherDistance, "__call__", lambda self, net: Distance(next(values), 0.0))
    run(tmp_path)
    [line] = lines(tmp_path / "returns.jsonl")
    assert (line["kimg"], line["from_kimg"]) == (0.008, 0.016)
    assert line["why"] == "its images were 0.2 from the teacher's samples at 0.016 kimg, after 0.05 at best"
    measured = {line["kimg"]: line["value"] for line in lines(tmp_path / "teacher-distance.jsonl")}
    assert measured == {0: 0.1, 0.008: 0.05, 0.016: 0.04, 0.024: 0.03, 0.032: 0.03}
    text = returns_text(read_returns(tmp_path))
    expected = "the run went back once, from 0.016 to 0.008 kimg, and has --lr=0.0005 --glr=0.001 since then: "
    assert text == expected + line["why"]
    assert {rate: read_options(tmp_path)[rate] for rate in ("lr", "glr")} == {"lr": 5e-4, "glr": 1e-3}
    assert "went back once" in (tmp_path / "index.html").read_text()
    assert f"\n{text}\n" in CliRunner().invoke(doctor.main, [str(tmp_path)], catch_exceptions=False).output


def test_without_the_option_nothing_is_done(tmp_path, monkeypatch, sick):
    if Distillation.check is diverges:
        with pytest.raises(DivergenceError):
            trained(tmp_path, returns=0)
    else:
        trained(tmp_path, returns=0)
    assert not (tmp_path / "returns.jsonl").exists()
    assert not checkpoint.state_path(tmp_path, 0).exists()


def test_rates_that_a_resumed_run_gives_count_as_they_are(tmp_path):
    distillation = tiny_distillation()
    distillation.state.returns = [{"kimg": 0.008, "from_kimg": 0.016, "why": "", "lr": 5e-4, "glr": 1e-3}]
    path = save(distillation, tmp_path)
    for changes, factor in (({}, 0.5), ({"lr": 3e-3}, 1.0)):
        resumed = tiny_distillation(resume=path, **changes)
        Returns(resumed, tmp_path)
        assert resumed.state.rate_factor == factor
        assert len(lines(tmp_path / "returns.jsonl")) == (factor < 1)


def test_a_near_start_is_nothing_to_go_back_to(tmp_path, monkeypatch):
    """Of noise with the moments of images: of the crops' generator, which ends at 0.013, or worse."""
    distillation = tiny_distillation(returns=1)
    returns = Returns(distillation, tmp_path)
    for nimg, distance in ((0, 0.0101), (16, 0.0517), (32, 0.0130), (48, 0.0420)):
        distillation.state.nimg = nimg
        monkeypatch.setattr(Returns, "_look", lambda self, distance=distance: (distance, True))
        returns.judge()
    monkeypatch.setattr(Returns, "_look", lambda self: (0.0431, True))
    with pytest.raises(DivergenceError, match=r"0\.0431 .* after 0\.013 at best"):
        returns.judge()


def test_the_published_recipes_and_the_demo_never_go_back():
    for name in (*recipes.PUBLISHED, "demo", "demo-text"):
        assert parse([f"--recipe={name}"])[0].returns == 0
    assert parse(["--recipe=auto", "--edm_model=x"])[0].returns == 3


def test_what_is_later_is_removed(tmp_path):
    kept = ["fakes_init.png", "teacher.png", "training-state-000010.pt", "network-snapshot-000010.safetensors"]
    kept += ["fakes_000010.png", "training-state-000009.980.pt", "training-state-000020.pt.unused", "stats.jsonl"]
    removed = ["training-state-000010.048.pt", "network-snapshot-000011.safetensors", "fakes_000100.png"]
    for name in (*kept, *removed, "best.json"):
        (tmp_path / name).touch()
    (tmp_path / "best.safetensors").symlink_to(removed[1])
    checkpoint.remove_later(tmp_path, 10_016, 32)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)
