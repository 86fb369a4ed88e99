"""--trials: settings are tried on the teacher at hand, and the best goes on."""

import dataclasses
import json
import math
import re
import signal

import pytest
import torch
from tiny import tiny_config, tiny_teacher

import sid.plan
from dnnlib import UserError
from edm import zoo
from sid import trials
from sid.distillation import Distillation
from sid.options import parse
from sid.trials import RATES, REFERENCE_FAN_IN, plan_trials, rate_scale
from torch_utils import checkpoint
from torch_utils.interruption import EXIT_CODE
from torch_utils.updates import DivergenceError

SHARE = 0.5
CANDIDATES = trials.CANDIDATES["adam"]
# The defaults of the rates, so that the candidates' matter.
SAME = {"augment": 0, "lr": 1e-5, "glr": 1e-5, "total_kimg": 0.08, "kimg_per_tick": 0.016}


def run(folder, teacher=None, **changes):
    """(the generator's hash, the trials' results) of a short run with trials in `folder`."""
    teacher = teacher or tiny_teacher(label_dim=0, augment_dim=0)
    net = sid.distil(teacher, tiny_config(**{**SAME, **changes}), folder, device="cpu", trials=SHARE).net
    return zoo.network_hash(net), json.loads((folder / "trials" / "results.json").read_text())


@pytest.fixture(scope="module", autouse=True)
def few_samples():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sid.teacher_samples.NUM_IMAGES", 16)
        patch.setattr("sid.teacher_samples.STEPS", 2)
        yield


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    return folder, *run(folder)


def test_lengths_and_settings_of_the_trials():
    teacher = tiny_teacher()
    config, options = parse(["--recipe=auto", "--duration=0.02", "--alpha=1.1"])
    plan = plan_trials(config, options.trials, options.given, teacher)
    assert options.trials == 0.2
    assert plan.images == 1984  # a tenth of 20 kimg, in batches of 32
    assert {c.total_kimg for c in plan.configs.values()} == {20 - 1.984}  # one trial is lost, the other goes on
    assert plan.images * len(plan.configs) <= 0.2 * 20_000
    for name, candidate in plan.configs.items():
        assert {rate: getattr(candidate, rate) for rate in RATES} == trials.CANDIDATES["muon"][name]
        assert candidate.alpha == 1.1  # which the command line has settled
        assert candidate.options()["fake_sigma_schedule"] == "karras"
        assert candidate.lr_decay == "linear"


def test_in_half_precision(tmp_path):
    """Each trial stores weights of a teacher of its own in bf16."""
    _, results = run(tmp_path / "run", precision="bf16")
    assert set(results) == set(CANDIDATES)


def test_what_the_command_line_gives_is_not_varied():
    teacher = tiny_teacher()
    config, options = parse(["--recipe=auto", "--glr=3e-4"])
    plan = plan_trials(config, options.trials, options.given, teacher)
    assert [(c.lr, c.glr) for c in plan.configs.values()] == [(0.02, 3e-4)]  # both would be the same
    with pytest.raises(UserError, match="--trials"):
        plan_trials(tiny_config(total_kimg=0.008), SHARE, [], teacher)


def test_rates_go_down_with_the_width():
    def net(*fan_ins):
        return torch.nn.ModuleList(torch.nn.Linear(fan_in, 8, bias=True) for fan_in in fan_ins)

    assert rate_scale(net(16, 32)) == 1
    wide = 16 * REFERENCE_FAN_IN
    assert rate_scale(net(int(wide))) == pytest.approx(1 / 16)
    assert rate_scale(torch.nn.ReLU()) == 1
    plan = plan_trials(tiny_config(**SAME), SHARE, ["lr"], net(int(wide)))
    assert {c.lr for c in plan.configs.values()} == {1e-5}
    assert plan.configs["equal-rates"].glr == pytest.approx(CANDIDATES["equal-rates"]["glr"] / 16)


def test_the_chosen_one_goes_on_from_its_own_state(unbroken):
    folder, _, results = unbroken
    assert set(results) == set(CANDIDATES)
    best = trials.choose(results)
    assert [name for name in results if results[name]["best"]] == [best]
    assert {result["kimg"] for result in results.values()} == {0.016}
    options = json.loads((folder / "training_options.json").read_text())
    assert {name: options[name] for name in CANDIDATES[best]} == CANDIDATES[best]
    assert options["total_kimg"] == 0.08 - 0.016
    assert not [state for name in results for state in checkpoint.states(folder / "trials" / name)]
    kimg = [json.loads(line)["Progress/kimg"] for line in (folder / "stats.jsonl").read_text().splitlines()]
    assert kimg[0] <= 0.016  # the trial's records are the run's
    assert kimg[-1] == 0.064
    assert (folder / "fakes_init.png").exists()


@pytest.mark.parametrize(
    ("fast", "slow", "chosen"),
    [
        (0.029, 0.027, "fast"),  # as on the emoji, where the fast one's FID was lower
        (0.19, 0.032, "slow"),  # as on the crops
        (0.028, 0.048, "fast"),
        (0.004, -0.001, "fast"),  # both are the noise of 256 images
        (math.inf, 0.3, "slow"),
        (0.3, math.inf, "fast"),
        (math.inf, math.inf, "fast"),
    ],
)
def test_a_slower_one_must_be_clearly_closer(fast, slow, chosen):
    assert trials.choose({"fast": {"distance": fast}, "slow": {"distance": slow}}) == chosen


@pytest.mark.parametrize(
    ("fast", "slow", "chosen"),
    [
        (3.03, 2.95, "fast"),  # as on emoji of another teacher, where the energy distances are .051 and .027
        (2.5, 1.5, "slow"),
        (5.40, 3.68, "fast"),  # as on icons from the moments of images, where the slow one ended far higher
        (1.2, 0.95, "fast"),  # both may be other samples of the teacher
        (None, 4.0, "slow"),  # it diverged
    ],
)
def test_features_decide_where_they_are_known(fast, slow, chosen):
    known = {"distance": 0.051, "features": fast} if fast else {"distance": math.inf}
    assert trials.choose({"fast": known, "slow": {"distance": 0.027, "features": slow}}) == chosen


@pytest.mark.parametrize(("slow", "lines"), [(2.95, 3), (3.5, 2), (1.5, 2)])
def test_it_is_said_when_the_farther_one_goes_on(slow, lines):
    results = {
        "fast": {"distance": 0.051, "features": 3.03, "kimg": 2.0},
        "slow": {"distance": 0.027, "features": slow, "kimg": 2.0},
    }
    for name, result in results.items():
        result["best"] = name == trials.choose(results)
    found = trials.table(results)
    assert len(found) == lines
    assert ("Not clearly farther away" in found[-1]) == (lines == 3)
    assert max(map(len, found)) <= 80


def test_energy_distances_decide_if_one_has_no_features():
    assert trials.choose({"fast": {"distance": 0.19}, "slow": {"distance": 0.03, "features": 9.0}}) == "slow"


def test_the_percentage_counts_all_trials(unbroken):
    """Each trial is 16 of 80 images; whichever goes on, the other one's images are spent, too."""
    log = (unbroken[0] / "log.txt").read_text()
    assert re.findall(r"kimg +(\d+)% .* left", log) == ["20", "40", "60", "80", "100"]


@pytest.mark.parametrize("share", [-0.1, 0.6, math.nan, "much"])
def test_a_share_that_the_option_would_refuse(tmp_path, share):
    with pytest.raises(UserError, match=f"^trials={share}: "):
        sid.distil(tiny_teacher(), tiny_config(), tmp_path / "run", device="cpu", trials=share)
    assert not (tmp_path / "run").exists()


def test_the_distance_decides(tmp_path, monkeypatch):
    real, chosen = trials._trial, {}
    for name in CANDIDATES:

        def trial(plan, number, config, folder, build, report, name=name):
            result = real(plan, number, config, folder, build, report)
            return {**result, "features": 2.0 if folder.name == name else 4.0}

        monkeypatch.setattr(trials, "_trial", trial)
        run(tmp_path / name)
        chosen[name] = json.loads((tmp_path / name / "training_options.json").read_text())["glr"]
    assert chosen == {name: settings["glr"] for name, settings in CANDIDATES.items()}


@pytest.mark.parametrize("updates", [1, 6])  # amid the first trial, after both
def test_an_interrupted_run_ends_with_the_same_weights(tmp_path, monkeypatch, unbroken, updates):
    done = 0
    average = Distillation.average

    def interrupted(self):
        nonlocal done
        average(self)
        done += 1
        if done == updates:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Distillation, "average", interrupted)
    with pytest.raises(SystemExit) as stop:
        run(tmp_path)
    assert stop.value.code == EXIT_CODE
    assert done == updates
    assert run(tmp_path) == unbroken[1:]


@pytest.mark.parametrize("step", ["unlink", "replace"])
def test_a_kill_while_the_best_is_settled(tmp_path, monkeypatch, unbroken, step):
    class Killed(BaseException):
        pass

    def kill(*_):
        raise Killed

    settle = trials._settle

    def settled(*arguments):
        target = (trials.Path, "unlink") if step == "unlink" else (trials.os, "replace")
        if step == "replace":  # write_atomically uses it, too
            real = trials.os.replace
            monkeypatch.setattr(*target, lambda a, b: kill() if "training-state" in str(b) else real(a, b))
        else:
            monkeypatch.setattr(*target, kill)
        settle(*arguments)

    monkeypatch.setattr(trials, "_settle", settled)
    with pytest.raises(Killed):
        run(tmp_path)
    monkeypatch.undo()
    assert run(tmp_path) == unbroken[1:]


def test_a_candidate_that_diverges_loses(tmp_path, monkeypatch, capsys):
    loop = trials.training_loop

    def diverging(distillation, folder, *arguments, **options):
        if folder.name == "equal-rates":
            raise DivergenceError("its weights aren't finite")
        return loop(distillation, folder, *arguments, **options)

    monkeypatch.setattr(trials, "training_loop", diverging)
    _, results = run(tmp_path)
    assert results["equal-rates"]["distance"] == math.inf
    assert results["slow-generator"]["best"]
    assert "equal-rates after 0 kimg: distance diverged" in capsys.readouterr().out
    monkeypatch.setattr(trials, "training_loop", lambda *_, **__: diverging(None, trials.Path("equal-rates")))
    with pytest.raises(DivergenceError, match="every trial diverged"):
        run(tmp_path / "all")


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"x": {"best": true}}', '{"equal-rates": {"best": 1}}', "{" * 9999]
)
def test_damaged_results_are_none(tmp_path, content):
    (tmp_path / "results.json").write_text(content)
    assert trials._read_results(tmp_path) is None


def test_a_trial_without_its_distance_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(trials, "sound_records", lambda *_: [{"kimg": 0.0, "value": 0.1}])
    with pytest.raises(UserError, match="lacks the trial's end"):
        run(tmp_path)


def test_trials_that_are_over_without_a_state_are_an_error(tmp_path):
    results = {"equal-rates": {"lr": 4e-4, "glr": 4e-4, "kimg": 1.0, "distance": 0.1, "best": True}}
    (tmp_path / trials.TRIALS / "equal-rates").mkdir(parents=True)
    with pytest.raises(UserError, match=r"no state is left; remove .*trials to begin again"):
        trials._settle(tmp_path / trials.TRIALS, results, tmp_path)


def test_other_options_than_those_of_the_begun_trials_are_refused(tmp_path, monkeypatch):
    loop = trials.training_loop

    def stopping(distillation, folder, *arguments, **options):
        loop(distillation, folder, *arguments, **options)
        raise SystemExit(EXIT_CODE)

    monkeypatch.setattr(trials, "training_loop", stopping)
    with pytest.raises(SystemExit):
        run(tmp_path)
    monkeypatch.undo()
    with pytest.raises(UserError, match="--batch=16"):
        run(tmp_path, batch=16)


@pytest.mark.parametrize(("share", "changes"), [(0.4, {}), (SHARE, {"total_kimg": 0.1})])
def test_begun_trials_keep_their_lengths(tmp_path, monkeypatch, share, changes):
    def stopping(*arguments, **options):
        raise SystemExit(EXIT_CODE)

    monkeypatch.setattr(trials, "training_loop", stopping)
    with pytest.raises(SystemExit):
        run(tmp_path)
    monkeypatch.undo()
    config = tiny_config(**{**SAME, **changes})
    begun = "begun with --duration=8e-05 --trials=0.5"
    with pytest.raises(UserError, match=f"^--duration={config.total_kimg / 1000:g} --trials={share}: .*{begun}; give"):
        sid.distil(tiny_teacher(label_dim=0, augment_dim=0), config, tmp_path, device="cpu", trials=share)


def test_a_run_that_has_had_its_trials_counts_them(tmp_path, capsys):
    """The other one took 16 of 80 images, and the command line's lengths include them."""
    ended = run(tmp_path, lr_decay="linear")
    longer = tiny_config(**{**SAME, "lr_decay": "linear", "total_kimg": 0.16})
    teacher = tiny_teacher(label_dim=0, augment_dim=0)
    with pytest.raises(UserError, match=r"^--duration=0.00016: .* has --duration=8e-05; give that, or --override"):
        sid.distil(teacher, longer, tmp_path, device="cpu", trials=SHARE)
    other_share = sid.distil(teacher, tiny_config(**SAME, lr_decay="linear"), tmp_path, device="cpu", trials=0.3)
    assert zoo.network_hash(other_share.net) == ended[0]
    sid.distil(teacher, longer, tmp_path, device="cpu", trials=SHARE, override=True)
    assert "--duration=0.00016 from here on, instead of --duration=8e-05" in capsys.readouterr().out
    for _ in range(2):  # once more, now at the end
        options = json.loads((tmp_path / "training_options.json").read_text())
        assert (options["total_kimg"], options["dropped_kimg"]) == pytest.approx((0.144, 0.016))
        assert checkpoint.states(tmp_path)[0].name == "training-state-000000.144.pt"
        sid.distil(teacher, longer, tmp_path, device="cpu", trials=SHARE)


def test_a_run_without_trials_goes_on_without_any(tmp_path):
    teacher, config = tiny_teacher(label_dim=0, augment_dim=0), tiny_config(**SAME, lr_decay="linear")
    ended = sid.distil(teacher, config, tmp_path, device="cpu")
    again = sid.distil(teacher, config, tmp_path, device="cpu", trials=SHARE)
    assert zoo.network_hash(again.net) == zoo.network_hash(ended.net)


def test_a_begun_run_is_found_again(tmp_path):
    """Without --nosubdir, too: by --resume=auto or the folder's name."""
    teacher = tiny_teacher(label_dim=0, augment_dim=0)
    config = dataclasses.replace(tiny_config(**SAME))
    folder = tmp_path / "00000-sid-8x8-uncond-auto-batch8"
    (folder / "trials").mkdir(parents=True)
    for resume in ("auto", str(folder)):
        options = parse([f"--outdir={tmp_path}", f"--resume={resume}", f"--trials={SHARE}"])[1]
        place, state = sid.plan.find_place(options, sid.plan.describe(teacher, config, True))
        assert place == (str(folder), "", True)
        assert state is None
    options = dataclasses.replace(options, outdir=str(tmp_path / "elsewhere"))
    with pytest.raises(UserError, match=f"has no training state yet.* give --outdir={tmp_path}"):
        sid.plan.find_place(options, "x")
