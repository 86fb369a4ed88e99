"""What a resumed run takes from its state, what it keeps of its own, and which state it goes on from."""

import shutil

import pytest
import torch
from tiny import CPU, equal, save, smoothed, tiny_config, tiny_distillation, tiny_teacher, weights

from dnnlib import UserError
from sid import prepare
from sid.distillation import Distillation
from sid.inputs import Inputs
from sid.state import SavedState, WeightHashes
from torch_utils import checkpoint, run_folder


def after_one_more(path, **changes):
    resumed = smoothed(tiny_distillation(resume=path, **changes))
    resumed.iteration()
    return weights(resumed)


@pytest.mark.parametrize("beta1", [0.0, 0.9])
@pytest.mark.parametrize("saved", [False, True])
def test_another_memory_layout_changes_rounding_only(tmp_path, beta1, saved):
    """Adam's fused kernel goes through weights and moments in memory order."""
    options = {"g_beta1": beta1, "dropout": 0.0}  # dropout draws as the activations lie
    distillation = smoothed(tiny_distillation(**options, channels_last=saved))
    for _ in range(3):
        distillation.iteration()
    path, before = save(distillation, tmp_path), weights(distillation)
    one, other = (after_one_more(path, **options, channels_last=layout) for layout in (False, True))
    for name, value in one.items():
        if value.is_floating_point():
            moved = (value - before[name]).abs().max()
            assert (other[name] - value).abs().max() <= 0.01 * moved + 1e-6, name


def test_rates_and_betas_are_those_of_the_resumed_run(tmp_path):
    """With --override; the moments and Adam's count of updates are the state's."""
    distillation = tiny_distillation(g_beta1=0.9)
    distillation.iteration()
    resumed = tiny_distillation(resume=save(distillation, tmp_path), g_beta1=0.5, glr=7e-3)
    old, new = (d.state.generator_updater.optimizer for d in (distillation, resumed))
    assert (old.param_groups[0]["betas"], new.param_groups[0]["betas"]) == ((0.9, 0.999), (0.5, 0.999))
    resumed.iteration()
    assert new.param_groups[0]["lr"] == 7e-3
    assert {int(moments["step"]) for moments in new.state.values()} == {2}


def test_options_are_compared_before_anything_is_built(tmp_path, monkeypatch):
    distillation = tiny_distillation()
    distillation.iteration()
    teacher, asked = tiny_teacher(), tiny_config(alpha=0.5, batch_gpu=4)
    hashes = WeightHashes.of(teacher, None, asked)
    inputs = Inputs(teacher, start=None, dataset=None, evaluator=None, hashes=hashes)
    state = SavedState(checkpoint.StateFile(save(distillation, tmp_path)), hashes)
    with monkeypatch.context() as patches:
        patches.setattr(prepare, "prepare", lambda *_: pytest.fail("was built"))
        with pytest.raises(UserError, match=r"--alpha=0.5: the run in .* has --alpha=1.2; give that, or --override"):
            prepare.build(inputs, asked, CPU, state, override=False)
    assert prepare.build(inputs, asked, CPU, state, override=True).state.nimg == distillation.state.nimg


def test_images_at_once_that_were_tried_fit_the_chunks(tmp_path, monkeypatch):
    """So that the same command can go on from its own state."""
    tried = []
    monkeypatch.setattr(Distillation, "fits", lambda self: tried.append(self.batch_gpu) or self.batch_gpu <= 6)
    options = {"batch": 12, "batch_gpu": None, "chunk": 4}
    found = tiny_distillation(**options)
    assert (tried, found.batch_gpu) == ([12, 4], 4)
    found.iteration()
    assert tiny_distillation(resume=save(found, tmp_path), **options).batch_gpu == 4


# --- after torchrun has started the processes again


@pytest.fixture
def restarted(tmp_path, monkeypatch):
    """(resolve, make): of the second start by the torchrun "this"; make(number, launch, images) makes a run folder."""
    distillation = tiny_distillation()

    def make(number, launch, *images):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", launch)
        folder = tmp_path / f"{number:05d}-x"
        with run_folder.create(str(folder), "x", nosubdir=True, options={}, resume=None):
            for distillation.state.nimg in images:
                save(distillation, folder)
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "this")
        return folder

    def resolve(resume=None):
        found = run_folder.find_run(resume and str(resume), str(tmp_path), "x", nosubdir=False)
        return found and found.state.path

    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    return resolve, make


def test_a_restarted_run_goes_on_where_it_was(restarted):
    resolve, make = restarted
    make(0, "other", 5000)
    own = make(1, "this", 1000, 2000)
    make(2, "other", 6000)
    assert resolve() == checkpoint.state_path(own, 2000, 8)


def test_a_run_that_was_restarted_before_it_had_a_folder_takes_no_other(restarted):
    resolve, make = restarted
    make(0, "other", 5000)
    assert resolve() is None


def test_a_restarted_run_that_was_given_a_state_keeps_its_progress(restarted):
    resolve, make = restarted
    own, other = make(0, "this", 1000, 2000), make(1, "other", 1000, 2000)
    given = [checkpoint.state_path(folder, 1000, 8) for folder in (own, other)]
    assert resolve(given[0]) == checkpoint.state_path(own, 2000, 8)
    assert resolve(given[1]) == given[1]  # it hasn't come so far that what is newer there is its own


def test_runs_of_plain_torchrun_are_distinguished(tmp_path, monkeypatch, restarted):
    """Without a rendezvous its id is "none" for all."""
    resolve, make = restarted
    own = make(0, "none", 1000)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert resolve() == checkpoint.state_path(own, 1000, 8)
    monkeypatch.setattr("os.getppid", lambda: 0)
    assert resolve() is None


# --- from one folder into another


def run_in(outdir, nosubdir=True, resume=None, given=None, images=()):
    """A run's folder, with states of a tiny distillation: new, or as `resume` (of the option `given`) goes on."""
    distillation = tiny_distillation()
    with run_folder.create(str(outdir), "x", nosubdir, {"resume": given}, resume) as path:
        for distillation.state.nimg in images:
            save(distillation, path)
        (path / "stats.jsonl").touch()
    return path


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("nosubdir", [True, False])
def test_a_run_that_goes_on_elsewhere_leaves_the_old_one_as_it_is(tmp_path, nosubdir):
    old = run_in(tmp_path / "old", images=[1000, 2000, 3000])
    before, new = contents(old), tmp_path / "new"
    state = checkpoint.state_path(old, 2000, 8)
    assert run_folder.find_run(str(state), str(new), "x", nosubdir).state.path == state
    path = run_in(new, nosubdir, state, given=str(state), images=[4000])
    assert path == (new if nosubdir else new / "00000-x")
    assert contents(old) == before
    again = run_folder.find_run(str(state), str(new), "x", nosubdir)  # the same command goes on in its own folder
    assert again.state.path == (checkpoint.state_path(new, 4000, 8) if nosubdir else state)


def test_a_run_goes_on_in_no_folder_of_another(tmp_path):
    old, new = (run_in(tmp_path / name, images=[1000]) for name in ("old", "new"))
    with pytest.raises(UserError, match=r"--resume=.*old: --outdir=.*new holds another run; .*--resume=.*new"):
        run_folder.find_run(str(old), str(new), "x", nosubdir=True)


def test_a_restarted_run_from_elsewhere_keeps_its_progress(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "first")
    old = run_in(tmp_path / "old", images=[1000])
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "this")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    state = checkpoint.state_path(old, 1000, 8)
    new = run_in(tmp_path / "new", False, state, given=str(old))
    for images, expected in (((), state), ([2000], checkpoint.state_path(new, 2000, 8))):
        for nimg in images:
            shutil.copy(state, checkpoint.state_path(new, nimg, 8))
        found = run_folder.find_run(str(old), str(tmp_path / "new"), "x", nosubdir=False)
        assert found.state.path == expected


@pytest.mark.parametrize("place", ["run", "."])
def test_the_folder_of_the_state_may_be_named_by_either_option(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    old = run_in("run", images=[1000, 2000])
    path = run_in(place, False, checkpoint.state_path(old.resolve(), 1000, 8), images=[1500])
    assert path.resolve() == tmp_path / "run"
    assert [state.name for state in checkpoint.states(path)] == [
        "training-state-000001.500.pt",
        "training-state-000001.pt",
    ]
    assert (path / "training-state-000002.pt.unused").exists()


def test_resuming_is_exact_with_layout_and_first_moment(tmp_path):
    """A state in one layout, resumed in the same one, goes on bit for bit."""
    options = {"g_beta1": 0.9, "channels_last": True}
    whole = tiny_distillation(**options)
    whole.iteration()
    path = save(whole, tmp_path)
    whole.iteration()
    resumed = tiny_distillation(resume=path, **options)
    resumed.iteration()
    assert equal(weights(whole), weights(resumed))
    assert all(torch.isfinite(value).all() for value in weights(whole).values())
